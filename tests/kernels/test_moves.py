"""Kept values into a weight, and its gradient out of one."""

import pytest
import torch
from helpers import DEVICE, rand, randn

from sparsecore.kernels import moves

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 63, 1024, 5000])
@pytest.mark.parametrize("wide", [False, True])
def test_scatter_touches_its_places_and_gather_reads_them(
    dtype: torch.dtype, size: int, wide: bool
) -> None:
    index = (rand(size, seed=size) < 0.4).nonzero()[:, 0]
    index = (index if wide else index.int()).to(DEVICE)
    values = randn(len(index)).to(DEVICE)
    dense = torch.full((size,), torch.nan, dtype=dtype, device=DEVICE)
    moves.launch_scatter(dense, values, index)
    expected = torch.full_like(dense, torch.nan)
    expected[index.long()] = values.to(dtype)
    assert torch.equal(dense.nan_to_num(7.0), expected.nan_to_num(7.0))
    out = torch.full_like(values, torch.nan)
    moves.launch_gather(dense, index, out)
    assert torch.equal(out, values.to(dtype).float())


@pytest.mark.gpu
def test_gather_gives_zero_for_places_that_are_none() -> None:
    index = torch.tensor([2, -1, 0, -1], device=DEVICE)
    out = torch.full((4,), torch.nan, device=DEVICE)
    moves.launch_gather(torch.tensor([1.0, 2.0, 3.0], device=DEVICE), index, out)
    assert out.tolist() == [3.0, 0.0, 1.0, 0.0]
