"""Products with the stored blocks of decided masks: the kernels against float64."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from bounds import Expected, products, require
from helpers import DEVICE, rand, randn
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels.blocks import values as block_values
from sparsecore.kernels.blocks.gemm import launch_dx, launch_fwd
from sparsecore.kernels.blocks.plan import BlockPlan
from sparsecore.kernels.blocks.problem import problem_of
from sparsecore.kernels.blocks.products import (
    block_forward,
    block_grad_input,
    block_grad_packed,
    block_grad_values,
    pack,
    stored_blocks,
)
from sparsecore.kernels.moves import Packed, launch_gather, packed_by_kernel
from sparsecore.kernels.units import Unit

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
NAMES = ("y", "dx", "dvalues", "dpacked")


class Case(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    block: tuple[int, int]
    axes: tuple[int, ...] = ()  # stride, padding, dilation
    groups: int = 1
    blocks: float = 0.4  # share of blocks with a kept weight
    kept: float = 0.8  # share of the weights in them


class Inputs(NamedTuple):
    plan: BlockPlan
    mask: Tensor
    x: Tensor
    values: Tensor
    bias: Tensor
    dy: Tensor


def mask_of(case: Case) -> Tensor:
    n, k, *taps = case.weight
    h, w = case.block
    blocks = rand(-(-n // h), -(-k // w), *taps, seed=2) < case.blocks
    whole = blocks.repeat_interleave(h, 0)[:n].repeat_interleave(w, 1)[:, :k]
    return whole & (rand(*case.weight, seed=3) < case.kept)


def product(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    axes = case.axes
    return F.conv2d(x, weight, bias, axes[:2], axes[2:4], axes[4:], case.groups)


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    mask = mask_of(case)
    plan = BlockPlan.from_mask(mask, case.block, case.groups)
    tensors = [randn(*case.x, seed=1), randn(plan.nnz, seed=4) / 4, randn(case.weight[0], seed=5)]
    y = product(case, tensors[0], torch.zeros(case.weight), None)
    tensors.append(randn(*y.shape, seed=6))
    return Inputs(plan.to(DEVICE), mask.to(DEVICE), *(t.to(DEVICE, dtype) for t in tensors))


def expected(case: Case, given: Inputs) -> list[Expected]:
    """y and the gradients by PyTorch on the dense weight, in float64."""
    plan, mask, x, values, bias, dy = given
    weight = torch.zeros(case.weight, device=DEVICE).double().masked_scatter(mask, values.double())
    y, dx, dweight, _ = products(partial(product, case), x, weight, bias, dy)
    dvalues = Expected(*(t[mask] for t in dweight[:3]))
    dpacked = Expected(*(stored_blocks(t, plan) for t in dweight[:3]))
    return [y, dx, dvalues, dpacked]


def launched(case: Case, given: Inputs) -> list[Tensor]:
    plan, _, x, values, bias, dy = given
    packed = packed_by_kernel(values, plan.source, (plan.blocks, *plan.block), x.dtype)
    return [
        block_forward(x, packed, bias, plan, case.axes),
        block_grad_input(dy, packed, plan, case.x[2:], case.axes),
        block_grad_values(dy, x, plan, case.axes, x.dtype),
        block_grad_packed(dy, x, plan, case.axes, x.dtype),
    ]


def check(case: Case, dtype: torch.dtype) -> list[Tensor]:
    given = inputs(case, dtype)
    ours = launched(case, given)
    for name, value, right in zip(NAMES, ours, expected(case, given), strict=True):
        assert value.dtype == dtype, name
        require(name, value, right)
    return ours


SAME = (1, 1, 1, 1, 1, 1)  # axes of a 3x3 filter that keep the image's size
PLAIN = (1, 1, 0, 0, 1, 1)
LINEAR = [
    Case((70, 48), (48, 48), (16, 16)),
    Case((37, 75), (50, 75), (16, 16)),  # edge blocks
    Case((33, 150), (70, 150), (32, 16)),
    Case((1, 96), (40, 96), (16, 32), blocks=0.6),
    Case((70, 150), (130, 150), (64, 64)),
    Case((63, 130), (63, 130), (64, 128)),
    Case((33, 130), (150, 130), (128, 32)),
    Case((33, 140), (150, 140), (128, 128)),
    Case((63, 256), (64, 256), (32, 64), kept=0.02),  # mostly padding
    Case((5, 1), (1, 1), (16, 16), blocks=1, kept=1),
    Case((1, 63), (63, 63), (32, 32), blocks=1, kept=1),
]
CONV = [
    Case((2, 40, 5, 6), (20, 40, 3, 3), (16, 16), SAME),
    Case((2, 33, 7, 6), (33, 33, 3, 2), (16, 32), (2, 1, 1, 2, 2, 1)),
    Case((1, 64, 5, 5), (70, 64, 3, 3), (64, 64), (2, 2, 1, 1, 1, 1)),
    Case((1, 130, 4, 4), (128, 130, 3, 1), (128, 128), (1, 2, 1, 0, 1, 1)),
    Case((2, 40, 4, 5), (20, 40, 1, 1), (16, 16), PLAIN),
    Case((2, 40, 4, 5), (20, 40, 1, 1), (32, 16), (2, 2, 0, 0, 1, 1)),
    Case((2, 42, 5, 4), (64, 21, 3, 3), (16, 16), SAME, groups=2),
    Case((2, 70, 5, 4), (64, 35, 3, 2), (32, 16), (2, 2, 1, 1, 1, 1), groups=2),
    Case((2, 72, 3, 4), (96, 24, 1, 1), (32, 64), PLAIN, groups=3, blocks=0.8),
    Case((2, 1, 5, 4), (1, 1, 3, 3), (16, 16), SAME, blocks=1, kept=1),
    Case((3, 63, 1, 1), (1, 63, 1, 1), (16, 32), PLAIN, blocks=1, kept=1),
]
if DEVICE == "cuda":  # real sizes
    LINEAR += [
        Case((2048, 4096), (4096, 4096), (64, 64), blocks=0.1, kept=1),
        Case((12608, 768), (3072, 768), (32, 32), blocks=0.1),
        Case((8192, 1024), (1024, 1024), (128, 128), blocks=0.2),
        Case((8192, 1024), (1024, 1024), (16, 16), blocks=0.05),
    ]
    CONV += [
        Case((64, 256, 14, 14), (256, 256, 3, 3), (64, 64), SAME, blocks=0.1),
        Case((32, 256, 28, 28), (256, 128, 3, 3), (32, 32), SAME, groups=2, blocks=0.1),
    ]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % len(DTYPES)]) for i, case in enumerate(CONV)], ids=str
)
def test_conv(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [LINEAR[1], LINEAR[5], CONV[0], CONV[6]], ids=str)
def test_nothing_stored_and_everything(case: Case) -> None:
    given = inputs(case._replace(blocks=0), torch.float32)
    y, dx, dvalues, dpacked = check(case._replace(blocks=0), torch.float32)
    bias = given.bias if y.ndim == 2 else given.bias[:, None, None]
    assert torch.equal(y, bias.expand(y.shape))
    assert not dx.any() and not len(dvalues) and not len(dpacked)
    check(case._replace(blocks=1, kept=1), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_empty_rows_and_columns_between_full_ones() -> None:
    case = Case((20, 96), (96, 96), (16, 32))
    mask = torch.ones(96, 96, dtype=torch.bool, device=DEVICE)
    mask[16:48] = mask[80:] = False
    mask[:, 32:64] = False
    plan = BlockPlan.from_mask(mask, case.block)
    values = randn(plan.nnz, seed=4).to(DEVICE)
    given = inputs(case, torch.float32)._replace(plan=plan, mask=mask, values=values)
    found = launched(case, given)
    for name, value, right in zip(NAMES, found, expected(case, given), strict=True):
        require(name, value, right)
    y, dx, *_ = found
    assert torch.equal(y[:, 16:48], given.bias[16:48].expand(20, 32))
    assert not dx[:, 32:64].any()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [LINEAR[1], LINEAR[6], CONV[0], CONV[6]], ids=str)
def test_what_no_stored_block_reads_is_not_read(case: Case) -> None:
    """NaN in an input channel without weights reaches neither y nor the other weights' gradients."""
    given = inputs(case, torch.float32)
    width = min(case.block[1], case.weight[1])
    dead = given.mask.clone()
    dead[:, :width] = False  # the first column of blocks
    plan = BlockPlan.from_mask(dead, case.block, case.groups)
    values = randn(plan.nnz, seed=4).to(DEVICE)
    given = given._replace(plan=plan, mask=dead, values=values)
    clean = launched(case, given)
    x = given.x.clone()
    for group in range(case.groups):
        first = group * case.weight[1]
        x[:, first : first + width] = torch.nan
    for name, a, b in zip(NAMES, launched(case, given._replace(x=x)), clean, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LINEAR[2], CONV[1]], ids=str)
def test_same_bits_every_time_and_in_any_layout(case: Case) -> None:
    """What stands around x and dy is NaN: whatever is read beyond their edges shows."""
    given = inputs(case, torch.float32)
    first = launched(case, given)
    x, dy = given.x, given.dy
    if x.ndim == 2:
        wide = torch.stack((x, x * torch.nan), 2).flatten(1)  # every other column is x
        others = [(x.T.contiguous().T, dy.T.contiguous().T), (wide[:, ::2], dy), (x, dy)]
        inside = F.pad(x, (16, 16, 3, 3), value=torch.nan)[3:-3, 16:-16]
        others.append((inside, F.pad(dy, (0, 0, 3, 3), value=torch.nan)[3:-3]))
    else:
        last = torch.channels_last
        bigger = F.pad(x, (1, 2, 3, 1), value=torch.nan).contiguous(memory_format=last)
        others = [(x.contiguous(memory_format=last), dy.contiguous(memory_format=last)), (x, dy)]
        more = F.pad(dy, (0, 0, 0, 0, 0, 0, 1, 1), value=torch.nan)
        others.append((bigger[:, :, 3:-1, 1:-2], more.contiguous(memory_format=last)[1:-1]))
    for x, dy in others:
        again = launched(case, given._replace(x=x, dy=dy))
        for name, value, want in zip(NAMES, again, first, strict=True):
            assert torch.equal(value, want), name
            if value.ndim == 4:
                assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [LINEAR[2]._replace(x=(200, 150)), CONV[0]], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_splits_over_tokens_add_up(case: Case, packed: bool) -> None:
    given = inputs(case, torch.float32)
    plan, _, x, *_, dy = given
    want = expected(case, given)[2 + packed]
    problem = problem_of(x.shape, case.weight, Unit(*case.block), case.axes, packed=True)
    last = torch.channels_last
    if x.ndim == 4:
        x = x.contiguous(memory_format=last)
        dy = dy.contiguous(memory_format=last).permute(0, 2, 3, 1).flatten(0, 2)
    for splits in (2, 3):
        out = torch.empty_like(want.exact, dtype=torch.float32)
        block_values.launch_dvalues(out, x, dy, plan, problem, splits=splits)
        require(NAMES[2 + packed], out, want)


@pytest.mark.gpu
def test_nothing_beyond_the_results_is_written() -> None:
    case = LINEAR[1]
    plan, _, x, values, _, dy = inputs(case, torch.float32)
    (tokens, k), n = case.x, case.weight[0]
    problem = problem_of(x.shape, case.weight, Unit(*case.block), [], packed=True)
    packed = pack(values, plan, torch.float32)

    def poison(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=DEVICE)

    y, dx, dvalues = poison(tokens + 3, n), poison(tokens + 3, k), poison(plan.nnz + 3)
    dpacked, again = (poison(plan.blocks + 3, *case.block) for _ in range(2))
    launch_fwd(y[:tokens], x, packed, None, None, plan.rows, problem)
    launch_dx(dx[:tokens], dy, packed, None, plan.columns, problem)
    block_values.launch_dvalues(dvalues[: plan.nnz], x, dy, plan, problem)
    block_values.launch_dvalues(dpacked[: plan.blocks], x, dy, plan, problem)
    # Padding has no weight, not the one in front of the first.
    fenced = F.pad(values, (1, 1), value=torch.nan)[1:-1]
    launch_gather(fenced, plan.source, again[: plan.blocks])
    for out, rows in ((y, tokens), (dx, tokens), (dvalues, plan.nnz), (dpacked, plan.blocks)):
        assert torch.isfinite(out[:rows]).all()
        assert torch.isnan(out[rows:]).all()
    assert torch.equal(again[: plan.blocks], packed) and torch.isnan(again[plan.blocks :]).all()


@pytest.mark.gpu
def test_rows_far_apart() -> None:
    """Offsets pass 2**31; memory that is not touched is not taken."""
    case = Case((40, 32), (32, 32), (16, 16), blocks=1)
    given = inputs(case, torch.float16)
    space = torch.empty(40 * 2**26, dtype=torch.float16, device=DEVICE)
    far = space.as_strided((40, 32), (2**26, 1)).copy_(given.x)
    for a, b in zip(
        launched(case, given._replace(x=far)), launched(case, given), strict=True
    ):  # fmt: skip
        assert torch.equal(a, b)


def test_offsets_in_an_image_that_pass_int32_are_refused() -> None:
    """By padding in the forward product, by a dilated filter in dX; only touched memory is taken."""
    plan = BlockPlan.from_mask(torch.ones(16, 16, 1, 1, dtype=torch.bool), (16, 16))
    packed = torch.zeros(1, 16, 16, dtype=torch.float16)
    space = torch.empty(2**30, dtype=torch.float16)
    far = space.as_strided((1, 16, 4, 2), (0, 1, 2**28, 16))
    with pytest.raises(ValueError, match=r"below 2\*\*31"):
        block_forward(far, packed, None, plan, (1, 1, 5, 0, 1, 1))
    mask = torch.zeros(2**16, 1, 2, 1, dtype=torch.bool)
    mask[-1, 0, 1, 0] = True
    plan = BlockPlan.from_mask(mask, (16, 16))
    packed, dy = torch.zeros(1, 16, 16), torch.ones(1, 2**16, 3, 1)
    with pytest.raises(ValueError, match=r"below 2\*\*31"):
        block_grad_input(dy, packed, plan, [2**15 + 2, 1], (1, 1, 0, 0, 2**15 - 1, 1))


@pytest.mark.gpu
def test_splits_are_added_in_float32_whatever_the_default_dtype_is() -> None:
    case = Case((2100, 16), (16, 16), (16, 16), blocks=1, kept=1)
    given = inputs(case, torch.float32)
    want = block_grad_values(given.dy, given.x, given.plan, [], torch.float32)
    torch.set_default_dtype(torch.float16)
    try:
        value = block_grad_values(given.dy, given.x, given.plan, [], torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(value, want)


@pytest.mark.gpu
def test_packing_is_differentiable_on_every_device() -> None:
    given = inputs(LINEAR[1], torch.float32)
    plan, values = given.plan, given.values.requires_grad_()
    weights = randn(plan.blocks, 16, 16, seed=7).to(DEVICE)
    grads = []
    for packed in (
        pack(values, plan, torch.float32),
        Packed.apply(values, plan.source, plan.slot, (plan.blocks, *plan.block), torch.float32),
    ):
        grads += torch.autograd.grad((packed * weights).sum(), values)
    assert torch.equal(*grads)
    assert torch.equal(grads[0], weights.flatten()[plan.slot])


@pytest.mark.gpu
def test_no_tokens_and_an_expanded_gradient() -> None:
    case = LINEAR[1]
    given = inputs(case, torch.float32)
    y, dx, dvalues, dpacked = launched(case, given._replace(x=given.x[:0], dy=given.dy[:0]))
    assert y.shape == (0, 50) and dx.shape == (0, 75)
    assert not dvalues.any() and not dpacked.any()
    ones = torch.ones(1, 1, device=DEVICE).expand(given.dy.shape)
    for a, b in zip(
        launched(case, given._replace(dy=ones)),
        launched(case, given._replace(dy=ones.contiguous())),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_values_of_another_dtype() -> None:
    given = inputs(LINEAR[1], torch.float16)
    values = given.values.float()
    shape = (given.plan.blocks, *given.plan.block)
    packed = packed_by_kernel(values, given.plan.source, shape, torch.float16)
    assert packed.dtype == torch.float16
    assert torch.equal(packed, pack(values, given.plan, torch.float16))
    dvalues = block_grad_values(given.dy, given.x, given.plan, [], torch.float32)
    require("dvalues", dvalues, expected(LINEAR[1], given)[2])
