"""Block and channel gates: the kernels against float64, and what they skip."""

import pytest
import torch
from block_gates import (
    CONV,
    DTYPES,
    HARD,
    KERNELS,
    LAYER,
    LINEAR,
    SMALL,
    Case,
    Inputs,
    expected,
    inputs,
    launched,
    noise,
    one,
    output_like,
)
from bounds import require
from helpers import DEVICE
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels.blocks import gemm as block_gemm
from sparsecore.kernels.blocks import lists as block_lists
from sparsecore.kernels.blocks import weights as block_weights
from sparsecore.kernels.blocks.layout import gradient_rows, readable
from sparsecore.kernels.blocks.problem import problem_of
from sparsecore.kernels.reference import sample_ref
from sparsecore.kernels.units import apply_ref


def check(
    case: Case, dtype: torch.dtype, shift: float = -0.4, given: Inputs | None = None
) -> list[Tensor]:
    given = given or inputs(case, dtype, shift)
    dy = output_like(case, given)
    ours, right = launched(case, given, dy), expected(case, given, dy)
    for name, value in zip(KERNELS, ours, strict=True):
        require(name, value, right[name])
    return ours


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[i % len(DTYPES)]) for i, case in enumerate(CONV)],
    ids=str,
)
def test_conv(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [LINEAR[1], LINEAR[7]], ids=str)
def test_half_weights(case: Case) -> None:
    given = inputs(case, torch.float16)
    halves = given._replace(weight=given.weight.half(), bias=given.bias.half())
    results = check(case, torch.float16, given=halves)
    assert [result.dtype for result in results[:3]] == [torch.float16] * 3


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [LINEAR[1]._replace(gate=HARD), LINEAR[7], SMALL], ids=str)
def test_all_closed_and_all_open(case: Case) -> None:
    given = inputs(case, torch.float32)
    y, dx, dweight, dlogits, dgain = check(case, torch.float32, shift=-40.0)
    bias = given.bias if y.ndim == 2 else given.bias[:, None, None]
    assert torch.equal(y, bias.expand(y.shape))
    for gradient in (dx, dweight, dlogits, dgain):
        assert not gradient.any()
    *_, dlogits, _ = check(case, torch.float32, shift=40.0)
    assert not dlogits.any()  # z is clipped to 1


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [LINEAR[1], LINEAR[4], LINEAR[7], SMALL, CONV[3]], ids=str)
def test_closed_weights_are_not_read(case: Case) -> None:
    given = inputs(case, torch.float32)
    z = sample_ref(case.gate, given.logits, noise(case))
    closed = apply_ref(torch.ones_like(given.weight), z, case.unit) == 0
    assert closed.any() and not closed.all()
    dy = output_like(case, given)
    want = launched(case, given, dy)
    broken = given._replace(weight=given.weight.masked_fill(closed, torch.nan))
    for name, value, clean in zip(KERNELS, launched(case, broken, dy), want, strict=True):
        assert torch.equal(value, clean), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LINEAR[0], LINEAR[7], SMALL], ids=str)
def test_same_bits_every_time_and_in_any_layout(case: Case) -> None:
    given = inputs(case, torch.float32)
    dy = output_like(case, given)
    first = launched(case, given, dy)
    if dy.ndim == 2:
        wide = torch.stack((given.x, given.x), 2).flatten(1)  # every other column is x
        others = [(given.x.T.contiguous().T, dy.T.contiguous().T), (wide[:, ::2], dy)]
        others += [(torch.cat((given.x, given.x), 1)[:, : given.x.shape[1]], dy)]
        weights = [given.weight.T.contiguous().T] * 3
    else:
        last = torch.channels_last
        bigger = F.pad(given.x, (1, 2, 3, 1)).contiguous(memory_format=last)
        others = [(given.x.contiguous(memory_format=last), dy.contiguous(memory_format=last))]
        others += [(bigger[:, :, 3:-1, 1:-2], dy)]
        weights = [given.weight.contiguous(memory_format=last), given.weight.flip(0).flip(0)]
    others.append((given.x, dy))
    weights.append(given.weight)
    for (x, gradient), weight in zip(others, weights, strict=True):
        assert torch.equal(x, given.x)
        again = launched(case, given._replace(x=x, weight=weight), gradient)
        for name, value, want in zip(KERNELS, again, first, strict=True):
            assert torch.equal(value, want), name


@pytest.mark.gpu
def test_an_expanded_gradient() -> None:
    case = LINEAR[1]
    given = inputs(case, torch.float32)
    dy = torch.ones(1, 1, device=DEVICE).expand(case.x[0], case.weight[0])
    for a, b in zip(launched(case, given, dy), launched(case, given, dy.contiguous()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [LINEAR[2], LINEAR[8], SMALL], ids=str)
def test_splits_over_tokens_add_up(case: Case) -> None:
    case = case._replace(x=(200, *case.x[1:]) if len(case.x) == 2 else (7, *case.x[1:]))
    given = inputs(case, torch.float32)
    dy = output_like(case, given)
    axes = list(case.axes)
    problem = problem_of(given.x.shape, given.weight.shape, case.unit, axes)
    lists = block_lists.draw(given.logits, one(11), one(5), LAYER, case.gate, case.unit, problem.n)
    rows = gradient_rows(dy)
    if problem.rows:
        rows = block_weights.open_columns(rows, lists, False)
    x = readable(given.x, problem)
    dw = torch.zeros_like(given.weight)
    partial = block_weights.launch_dgate(
        dw, x, rows, given.weight, given.gain, lists, problem, False, splits=3
    )
    height = case.unit.h if problem.rows else 1
    dlogits, _ = block_lists.logit_gradients(
        partial, lists.z, given.logits, given.gain, case.gate, height, False
    )
    right = expected(case, given, dy)
    require("dweight", dw, right["dweight"])
    require("dlogits", dlogits, right["dlogits"])


@pytest.mark.gpu
def test_nothing_beyond_the_results_is_written() -> None:
    case = LINEAR[1]
    given = inputs(case, torch.float32)
    problem = problem_of(given.x.shape, given.weight.shape, case.unit, [])
    lists = block_lists.draw(given.logits, one(11), one(5), LAYER, case.gate, case.unit, problem.n)
    scaled = block_weights.scale(given.weight, lists, problem, torch.float32)
    tokens, k = case.x

    def poison(rows: int, columns: int) -> Tensor:
        return torch.full((rows + 3, columns), torch.nan, device=DEVICE)

    y, dx, dw = poison(tokens, problem.n), poison(tokens, k), poison(problem.n, k)
    dw[: problem.n] = 0
    block_gemm.launch_fwd(y[:tokens], given.x, scaled, None, None, lists, problem)
    across = block_lists.transposed(lists)
    block_gemm.launch_dx(dx[:tokens], y[:tokens], scaled, None, across, problem)
    block_weights.launch_dgate(
        dw[: problem.n], given.x, y[:tokens], given.weight, None, lists, problem, True
    )
    for out, rows in ((y, tokens), (dx, tokens), (dw, problem.n)):
        assert torch.isfinite(out[:rows]).all()
        assert torch.isnan(out[rows:]).all()
