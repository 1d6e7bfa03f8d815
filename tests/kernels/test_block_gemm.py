"""Block and channel gates: the kernels against float64, what they skip, and the operation around them."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from helpers import DEVICE, randn
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels import block_gated, block_gemm, block_lists, block_weights, philox
from sparsecore.kernels.block_gated import block_gated_conv2d, block_gated_linear
from sparsecore.kernels.reference import (
    BERNOULLI,
    CONCRETE,
    GAUSSIAN,
    HARD_CONCRETE,
    GateSpec,
    sample_ref,
)
from sparsecore.kernels.units import Unit, apply_ref, gather_ref, unit_shape

HARD = GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1)
GAUSS = GateSpec(GAUSSIAN, 0.5)
STEP = GateSpec(BERNOULLI)
SOFT = GateSpec(CONCRETE, 0.7)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LAYER = 3
NAMES = ("y", "dx", "dweight", "dlogits", "dbias", "dgain")
KERNELS = ("y", "dx", "dweight", "dlogits", "dgain")  # dbias is one sum in PyTorch


class Case(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    unit: Unit
    gate: GateSpec
    axes: tuple[int, ...] = (1, 1, 0, 0, 1, 1)  # stride, padding, dilation


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    logits: Tensor
    bias: Tensor
    gain: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(tensor.detach().to(dtype) for tensor in self))


def one(value: int) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def inputs(case: Case, dtype: torch.dtype, shift: float = -0.4) -> Inputs:
    """x in dtype; everything that trains in float32."""
    weight = randn(*case.weight, seed=2) / case.weight[1] ** 0.5
    logits = randn(*unit_shape(case.weight, case.unit), seed=3) + shift
    bias = randn(case.weight[0], seed=4)
    x = randn(*case.x, seed=1)
    made = Inputs(x, weight, logits, bias, torch.tensor(1.3))
    return Inputs(*(tensor.to(DEVICE) for tensor in made))._replace(x=x.to(DEVICE, dtype))


def noise(case: Case) -> Tensor:
    u = torch.empty(unit_shape(case.weight, case.unit), device=DEVICE)
    return philox.uniform_(u, one(11), one(5), LAYER, exact=True)


def composed(case: Case, given: Inputs, dy: Tensor, u: Tensor) -> list[Tensor]:
    """y and the gradients by autograd, in x's dtype around the gates' and weights' own."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    x, weight, logits, bias, gain = leaves
    if case.gate.kind == BERNOULLI:  # straight through sigmoid
        soft = torch.sigmoid(logits)
        z = soft + (sample_ref(case.gate, logits, u.to(logits)) - soft).detach()
    else:
        z = sample_ref(case.gate, logits, u.to(logits))
    product = (apply_ref(weight, z, case.unit) * gain).to(x.dtype)
    if x.ndim == 2:
        y = F.linear(x, product, bias.to(x.dtype))
    else:
        axes = case.axes
        y = F.conv2d(x, product, bias.to(x.dtype), axes[:2], axes[2:4], axes[4:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Unset memory is NaN: whatever is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def launched(case: Case, given: Inputs, dy: Tensor) -> list[Tensor]:
    """y and the gradients from the kernels, in the order of `KERNELS`."""
    x, weight, logits, bias, gain = given
    rest = (one(11), one(5), LAYER, list(case.gate), list(case.unit), list(case.axes))
    y = block_gated.launch_forward(x, weight, logits, bias, gain, *rest)
    backward = block_gated.launch_backward(dy, x, weight, logits, gain, *rest, True, True)
    dx, dweight, dlogits, dgain = backward
    return [y, dx, dweight, dlogits, dgain]


def output_like(case: Case, given: Inputs) -> Tensor:
    if given.x.ndim == 2:
        return randn(case.x[0], case.weight[0], seed=9).to(given.x)
    axes = case.axes
    y = F.conv2d(given.x.float(), given.weight, None, axes[:2], axes[2:4], axes[4:])
    return randn(*y.shape, seed=9).to(given.x)


def check(
    case: Case, dtype: torch.dtype, shift: float = -0.4, given: Inputs | None = None
) -> list[Tensor]:
    """Each result's error against float64 is at most twice PyTorch's own in the same dtype."""
    given, u = given or inputs(case, dtype, shift), noise(case)
    dy = output_like(case, given)
    exact = composed(case, given.to(torch.float64), dy, u)
    plain = composed(case, given, dy, u)
    del exact[4], plain[4]  # dbias
    ours = launched(case, given, dy)
    # A sum's error is that of its terms, which may cancel: dgain is judged by their size.
    terms = exact[2] * given.weight.double() / given.gain.double()
    scales = [value.abs().max().item() for value in exact[:4]]
    scales.append(gather_ref(terms, case.unit).abs().sum().item())
    for name, value, torchs, truth, scale in zip(KERNELS, ours, plain, exact, scales, strict=True):
        assert value.shape == truth.shape, name
        assert torch.isfinite(value).all(), name
        error = (value.double() - truth).abs().max().item()
        limit = 2 * (torchs.double() - truth).abs().max().item() + 1e-6 * scale
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"
    return ours


LINEAR = [
    Case((70, 48), (48, 48), Unit(16, 16), HARD),
    Case((37, 75), (50, 75), Unit(16, 16), GAUSS),  # edge blocks
    Case((70, 75), (70, 75), Unit(32, 16), STEP),
    Case((1, 96), (40, 96), Unit(16, 32), SOFT),
    Case((70, 150), (130, 150), Unit(64, 64), HARD),
    Case((70, 130), (64, 130), Unit(64, 128), STEP),
    Case((33, 128), (256, 128), Unit(128, 128), HARD),
    Case((70, 75), (130, 75), Unit(1, 0), HARD),
    Case((70, 70), (150, 70), Unit(3, 0), STEP),
]
CONV = [
    Case((2, 40, 5, 6), (20, 40, 3, 3), Unit(16, 16), HARD, (1, 1, 1, 1, 1, 1)),
    Case((2, 33, 7, 6), (33, 33, 3, 2), Unit(16, 32), STEP, (2, 1, 1, 2, 2, 1)),
    Case((1, 64, 5, 5), (70, 64, 3, 3), Unit(64, 64), GAUSS, (2, 2, 1, 1, 1, 1)),
    Case((2, 20, 5, 4), (24, 20, 3, 3), Unit(1, 0), HARD, (2, 1, 0, 1, 1, 2)),
    Case((2, 40, 4, 5), (20, 40, 1, 1), Unit(16, 16), HARD),
    Case((2, 40, 4, 5), (20, 40, 1, 1), Unit(16, 16), HARD, (2, 2, 0, 0, 1, 1)),
]

if DEVICE == "cuda":  # real sizes
    LINEAR += [
        Case((2048, 4096), (4096, 4096), Unit(64, 64), HARD),
        Case((12608, 768), (3072, 768), Unit(32, 32), GAUSS),
        Case((2048, 4096), (4096, 4096), Unit(1, 0), HARD),
    ]
    CONV += [
        Case((64, 256, 14, 14), (256, 256, 3, 3), Unit(64, 64), HARD, (1, 1, 1, 1, 1, 1)),
        Case((64, 1024, 14, 14), (256, 1024, 1, 1), Unit(128, 128), HARD),
    ]

SMALL = Case((2, 20, 4, 5), (20, 20, 2, 2), Unit(16, 16), HARD, (1, 1, 1, 1, 1, 1))


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
        for name, value, expected in zip(KERNELS, again, first, strict=True):
            assert torch.equal(value, expected), name


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
    *_, want_weight, want_logits, _ = launched(case, given, dy)
    axes = list(case.axes)
    problem = block_gated._problem(given.x, given.weight, list(case.unit), axes)
    lists = block_lists.draw(given.logits, one(11), one(5), LAYER, case.gate, case.unit, problem.n)
    rows = block_gated._rows(
        dy.contiguous(memory_format=torch.channels_last) if dy.ndim > 2 else dy
    )
    if problem.rows:
        rows = block_weights.open_columns(rows, lists, False)
    x = block_gated._readable(given.x, problem)
    dw = torch.zeros_like(given.weight)
    partial = block_weights.launch_dgate(
        dw, x, rows, given.weight, given.gain, lists, problem, False, splits=3
    )
    height = case.unit.h if problem.rows else 1
    dlogits, _ = block_lists.logit_gradients(
        partial, lists.z, given.logits, given.gain, case.gate, height, False
    )
    torch.testing.assert_close(dw, want_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogits, want_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_nothing_beyond_the_results_is_written() -> None:
    case = LINEAR[1]
    given = inputs(case, torch.float32)
    problem = block_gated._problem(given.x, given.weight, list(case.unit), [])
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


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 40), (5, 1, 3, 3), (1, 300), (40, 3, 1, 2)], ids=str)
def test_lists_of_blocks(shape: tuple[int, ...]) -> None:
    logits = randn(*shape, seed=7).to(DEVICE)
    lists = block_lists.draw(logits, one(1), one(2), LAYER, HARD, Unit(16, 16), 0)
    u = philox.uniform_(torch.empty(shape, device=DEVICE), one(1), one(2), LAYER, exact=True)
    torch.testing.assert_close(lists.z, sample_ref(HARD, logits, u), rtol=1e-5, atol=1e-6)
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


# --- The operation -------------------------------------------------------------------------------------

OPERATIONS = [LINEAR[1], LINEAR[8], CONV[1], CONV[3]]


def call(case: Case, x: Tensor, weight: Tensor, logits: Tensor, bias, gain) -> Tensor:
    seed, step = (torch.tensor([value], device=x.device) for value in (11, 5))
    rest = {"gate": case.gate, "unit": case.unit, "seed": seed, "step": step, "layer": LAYER}
    if x.ndim != 4:
        return block_gated_linear(x, weight, logits, bias, gain=gain, **rest)
    names = ("stride", "padding", "dilation")
    pairs = {name: case.axes[2 * i : 2 * i + 2] for i, name in enumerate(names)}
    return block_gated_conv2d(x, weight, logits, bias, gain=gain, **pairs, **rest)


def on_cpu(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    return Inputs(*(tensor.to("cpu", dtype) for tensor in inputs(case, torch.float32)))


@pytest.mark.parametrize("case", OPERATIONS, ids=str)
def test_cpu_is_the_reference(case: Case) -> None:
    given = on_cpu(case)
    u = philox.uniform_(
        torch.empty(given.logits.shape), torch.tensor([11]), torch.tensor([5]), LAYER
    )
    leaves = [tensor.requires_grad_() for tensor in given]
    y = call(case, *leaves)
    dy = randn(*y.shape, seed=9, dtype=torch.float64)
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    for name, value, expected in zip(NAMES, results, composed(case, given, dy, u), strict=True):
        assert value.dtype == expected.dtype
        # The slope of a gate is computed from z, whose noise is float32.
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", [LINEAR[1], CONV[1]], ids=str)
def test_opcheck(case: Case) -> None:
    given = on_cpu(case, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in given]
    x, weight, logits, bias, gain = leaves
    rest = (torch.tensor([11]), torch.tensor([5]), LAYER, list(case.gate), list(case.unit))
    op = torch.ops.sparsecore.block_gated_conv
    torch.library.opcheck(op, (x, weight, logits, bias, gain, *rest, list(case.axes)))
    last = x.detach().contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.detach()
    frozen = (last, weight.detach(), logits, None, None, *rest, list(case.axes))
    torch.library.opcheck(op, frozen, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", [LINEAR[8], CONV[3]], ids=str)
def test_compiles_whole(case: Case) -> None:
    leaves = [tensor.requires_grad_() for tensor in on_cpu(case, torch.float32)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y, again = call(case, *leaves), compiled(case, *leaves)
    torch.testing.assert_close(y, again)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(again.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_autocast_decides_the_type_and_batches_keep_their_shape() -> None:
    case = LINEAR[1]
    given = on_cpu(case, torch.float32)
    x = given.x.expand(2, *given.x.shape).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, x, *given[1:4], None)
    assert y.dtype == torch.bfloat16 and y.shape == (2, case.x[0], case.weight[0])
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), call(case, x, *given[1:4], None), rtol=0.1, atol=0.1)


@pytest.mark.gpu
def test_no_tokens() -> None:
    case = LINEAR[0]._replace(x=(0, 48))
    given = inputs(case, torch.float32)
    y, dx, dweight, dlogits, dgain = launched(case, given, given.x.new_empty(0, 48))
    assert y.shape == (0, 48) and dx.shape == (0, 48)
    assert not dweight.any() and not dlogits.any() and not dgain.any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="the CPU's operation does not run the kernels")
@pytest.mark.parametrize("case", OPERATIONS, ids=str)
def test_the_operation_runs_the_kernels(case: Case) -> None:
    given = inputs(case, torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = call(case, *leaves)
    dy = output_like(case, given)
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    assert torch.equal(results.pop(4), dy.sum([d for d in range(dy.ndim) if d != 1]))  # dbias
    for name, value, expected in zip(KERNELS, results, launched(case, given, dy), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": Unit(16, 1)}, "sides among"),
        ({"unit": Unit(48, 48)}, "sides among"),
        ({"unit": Unit()}, "sides among"),
        ({"unit": Unit(1, 4, 2)}, "sides among"),
        ({"logits": torch.zeros(2, 2)}, "expected logits"),
        ({"x": torch.zeros(4, 5)}, "expected x"),
        ({"bias": torch.zeros(3)}, "expected bias"),
        ({"gain": torch.ones(1)}, "expected gain"),
        ({"seed": torch.tensor([1.0])}, "expected seed"),
        ({"step": torch.tensor([1, 2])}, "expected step"),
        ({"logits": torch.zeros(2, 3, device="meta")}, "expected logits on cpu"),
    ],
)
def test_bad_linear(change: dict, message: str) -> None:
    good = {
        "x": torch.zeros(4, 48),
        "weight": torch.zeros(32, 48),
        "logits": torch.zeros(2, 3),
        "bias": None,
        "gate": HARD,
        "unit": Unit(16, 16),
        "seed": torch.tensor([1]),
        "step": torch.tensor([1]),
        "layer": 0,
    }
    block_gated_linear(**good)
    with pytest.raises(ValueError, match=message):
        block_gated_linear(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 2}, "groups = 1"),
        ({"stride": 0}, "stride"),
        ({"padding": (1, 2, 3)}, "padding"),
        ({"dilation": 9}, "within the padded image"),
        ({"x": torch.zeros(16, 8, 8)}, "expected x"),
        ({"weight": torch.zeros(16, 8, 3, 3)}, "expected x"),
    ],
)
def test_bad_conv(change: dict, message: str) -> None:
    good = {
        "x": torch.zeros(1, 16, 8, 8),
        "weight": torch.zeros(16, 16, 3, 3),
        "logits": torch.zeros(1, 1, 3, 3),
        "gate": HARD,
        "unit": Unit(16, 16),
        "seed": torch.tensor([1]),
        "step": torch.tensor([1]),
        "layer": 0,
    }
    block_gated_conv2d(**good)
    with pytest.raises(ValueError, match=message):
        block_gated_conv2d(**(good | change))
