"""Lists of open blocks and channels: what is drawn against PyTorch's gates, and the order of the lists."""

import pytest
import torch
from block_gates import HARD, LAYER, one
from bounds import gates
from helpers import DEVICE, randn

from sparsecore.kernels import philox
from sparsecore.kernels.blocks import lists as block_lists
from sparsecore.kernels.units import Unit


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 40), (5, 1, 3, 3), (1, 300), (40, 3, 1, 2)], ids=str)
def test_lists_of_blocks(shape: tuple[int, ...]) -> None:
    logits = randn(*shape, seed=7).to(DEVICE)
    lists = block_lists.draw(logits, one(1), one(2), LAYER, HARD, Unit(16, 16), 0)
    u = philox.uniform_(torch.empty(shape, device=DEVICE), one(1), one(2), LAYER, exact=True)
    (z, most), _ = gates(HARD, logits, u)
    assert bool(((lists.z - z).abs() <= most).all())
    by_row = lists.z.flatten(1)
    by_column = lists.z.flatten(2) if len(shape) > 2 else lists.z[..., None]
    by_column = by_column.transpose(0, 1).flatten(1)
    for found, z in ((lists, by_row), (block_lists.transposed(lists), by_column)):
        for row, order, count in zip(z, found.order, found.count, strict=True):
            assert torch.equal(order[:count].long(), row.nonzero().flatten())


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "height"), [(1, 1), (130, 1), (1500, 7)])
def test_order_of_channels(n: int, height: int) -> None:
    logits = randn(-(-n // height), 1, seed=7).to(DEVICE)
    lists = block_lists.draw(logits, one(1), one(2), LAYER, HARD, Unit(height, 0), n)
    is_open = lists.z.flatten().repeat_interleave(height)[:n] != 0
    count = int(lists.count)
    assert count == is_open.sum()
    assert torch.equal(lists.order[:count].long(), is_open.nonzero().flatten())
    assert torch.equal(lists.order.long().sort().values, torch.arange(n, device=DEVICE))
