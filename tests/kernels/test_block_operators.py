"""Blocks as a compiler has them: operators of triton kernels, against the layer outside of a graph."""

import pytest
import torch
from helpers import DEVICE, rand, randn
from torch import Tensor

from sparsecore import kernels
from sparsecore.kernels.blocks.operators import block_layer

pytestmark = pytest.mark.gpu


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, inputs, randn(*y.shape, seed=9).to(y))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ["linear", "conv", "groups", "last"])
def test_an_operator_is_the_layer(case: str, dtype: torch.dtype, bias: bool) -> None:
    """Bit for bit, as the same kernels run: values in float32, each product in tiles of its own."""
    n, k, groups = 24, 20, 1
    if case == "groups":
        n, groups = 32, 2
    conv = case != "linear"
    mask = (rand(n, k, *[3, 3][: 2 * conv]) < 0.2).to(DEVICE)
    slide = [2, 1, 1, 2, 1, 1] if conv else []
    names = ("block:16x16", "block:16x16/2", "block:16x16/1")
    plan = kernels.plan_of(mask, names, dtype=dtype, slide=slide, groups=groups)
    x = randn(2, k * groups, *[4, 5][: 2 * conv]).to(DEVICE, dtype)
    if case == "last":
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x, randn(plan.nnz, seed=2).to(DEVICE)]
    if bias:
        inputs.append(randn(n, seed=3).to(DEVICE))
    for t in inputs:
        t.requires_grad_()
    wanted = gradients(
        kernels.sparse_layer(x, inputs[1], inputs[2] if bias else None, plan), inputs
    )
    numbers = [storage.numbers for storage in plan.storages]
    y, packed = block_layer(
        x, inputs[1], inputs[2] if bias else None, plan.storages[0].tensors, *numbers, slide
    )
    assert packed.dtype == dtype
    for mine, theirs in zip(gradients(y, inputs), wanted, strict=True):
        assert mine.dtype == theirs.dtype
        if DEVICE != "cpu":  # where images are channels last
            assert mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)
