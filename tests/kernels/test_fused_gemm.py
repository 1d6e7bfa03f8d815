"""Products with gates sampled inside: every output and gradient against float64, with the same noise."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICE, randn
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels import philox
from sparsecore.kernels.gated.fused import (
    Gated,
    _launch_dlogits,
    _launch_dx,
    _launch_forward,
    _normal,
    fused_gated_conv2d,
    fused_gated_linear,
)
from sparsecore.kernels.gated.fused_kernels import _noise
from sparsecore.kernels.gated.fused_launch import Tiles, _config
from sparsecore.kernels.reference import (
    BERNOULLI,
    CONCRETE,
    GAUSSIAN,
    HARD_CONCRETE,
    GateSpec,
    sample_ref,
    slope_ref,
)

pytestmark = pytest.mark.gpu  # on the GPU where there is one, interpreted otherwise

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
GATES = [
    GateSpec(CONCRETE, 1.0),
    GateSpec(CONCRETE, 2 / 3),
    GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1),
    GateSpec(GAUSSIAN, 0.5),
    GateSpec(BERNOULLI),
]
PLAIN = (1, 1, 0, 0, 1, 1)


class Case(NamedTuple):
    x: tuple[int, ...]  # [t, k] or [b, k, h, w]
    w: tuple[int, ...]  # [n, k] or [n, k, r, s]
    conv: tuple[int, ...] = PLAIN
    layout: str = "contiguous"


CASES = {
    "one": Case((1, 1), (1, 1)),
    "quads": Case((65, 64), (63, 64)),
    "odd": Case((17, 65), (130, 65)),
    "long": Case((150, 36), (33, 36)),
    "transposed": Case((33, 20), (17, 20), layout="transposed"),
    "every-second": Case((33, 20), (17, 20), layout="every-second"),
    "3x3": Case((2, 19, 9, 8), (17, 19, 3, 3), (1, 1, 1, 1, 1, 1)),
    "3x3-channels-last": Case((2, 16, 5, 6), (18, 16, 3, 3), (1, 1, 1, 1, 1, 1), "channels_last"),
    "all-of-it": Case((2, 5, 9, 8), (7, 5, 3, 2), (2, 3, 1, 0, 2, 1), "channels_last"),
    "padding-past-the-filter": Case((1, 3, 4, 3), (5, 3, 2, 1), (3, 2, 3, 2, 1, 1)),
    "1x1": Case((3, 12, 4, 5), (9, 12, 1, 1)),
    "1x1-channels-last": Case((3, 12, 4, 5), (9, 12, 1, 1), PLAIN, "channels_last"),
    "1x1-strided": Case((3, 12, 4, 5), (9, 12, 1, 1), (2, 2, 0, 0, 1, 1), "channels_last"),
}

if DEVICE == "cuda":  # real sizes
    CASES |= {
        "4096": Case((64, 4096), (4096, 4096)),
        "vit-b": Case((512, 768), (3072, 768)),
        "resnet-50": Case((8, 256, 14, 14), (256, 256, 3, 3), (1, 1, 1, 1, 1, 1), "channels_last"),
    }


class Problem(NamedTuple):
    x: Tensor
    bias: Tensor
    dy: Tensor
    g: Gated


def one(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


def lay(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "every-second":
        return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]
    return tensor


def dense(tensor: Tensor) -> Tensor:
    return lay(tensor, "channels_last") if tensor.ndim == 4 else tensor.contiguous()


def problem(
    case: Case,
    dtype: torch.dtype,
    gate: GateSpec = GATES[1],
    *,
    shift: float = 0.0,
    weight_dtype: torch.dtype = torch.float32,
) -> Problem:
    x = lay(randn(*case.x, seed=1).to(DEVICE, dtype), case.layout)
    weight = lay(randn(*case.w, seed=2).to(DEVICE, weight_dtype), case.layout)
    logits = lay(randn(*case.w, seed=3).to(DEVICE) + shift, case.layout)
    bias = randn(case.w[0], seed=4).to(DEVICE)
    gain = torch.tensor(1.3, device=DEVICE)
    g = Gated(weight, logits, gain, one(5), one(2**33 + 6), 7, gate, case.conv)
    y = product_of(x, weight.to(dtype), bias.to(dtype), g)
    return Problem(x, bias, dense(randn(*y.shape, seed=5).to(DEVICE, dtype)), g)


def product_of(x: Tensor, weight: Tensor, bias: Tensor, g: Gated) -> Tensor:
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, g.conv[:2], g.conv[2:4], g.conv[4:])


def by_autograd(p: Problem, dtype: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by PyTorch: gates in `wide`, products in `dtype`, the kernels' noise."""
    g = p.g
    u = philox.storage_noise(_normal(g).logits, g.seed, g.step, g.layer, exact=True)
    logits = g.logits.to(wide)
    z = sample_ref(g.gate, logits, u.to(wide)).requires_grad_()
    x, dy = p.x.detach().to(dtype).requires_grad_(), p.dy.to(dtype)
    weight = g.weight.detach().to(wide).requires_grad_()
    gain = g.gain.detach().to(wide).requires_grad_()
    bias = p.bias.detach().to(wide).requires_grad_()
    product = (gain * weight * z).to(dtype)
    y = product_of(x, product, bias.to(dtype), g)
    dx, dz, dw, dgain, db = torch.autograd.grad(y, (x, z, weight, gain, bias), dy)
    dlogits = dz * slope_ref(g.gate, z.detach(), logits)
    found = {"y": y, "dx": dx, "dlogits": dlogits, "dweight": dw, "dgain": dgain, "dbias": db}
    return {name: value.detach() for name, value in found.items()}


def poisoned(like: Tensor, guard: list[Tensor]) -> Tensor:
    """NaN in the shape and layout of a tensor, with NaN around it to be checked afterwards."""
    room = torch.full((like.numel() + 128,), float("nan"), dtype=like.dtype, device=like.device)
    guard += [room[:64], room[-64:]]
    return room[64:-64].as_strided(like.shape, torch.empty_like(like).stride())


def by_kernels(p: Problem, tiles: dict[str, Tiles] | None = None) -> dict[str, Tensor]:
    tiles, guard = tiles or {}, []
    y, dx = poisoned(p.dy, guard), poisoned(dense(p.x), guard)
    ds, dw = poisoned(p.g.logits, guard), poisoned(p.g.weight, guard)
    dgain = poisoned(torch.empty((), device=DEVICE), guard)
    _launch_forward(y, p.x, p.bias, p.g, tiles=tiles.get("fwd"))
    _launch_dx(dx, p.dy, p.x, p.g, tiles=tiles.get("dx"))
    _launch_dlogits(ds, dw, dgain, p.dy, p.x, p.g, tiles=tiles.get("dlogits"))
    assert all(bool(edge.isnan().all()) for edge in guard), "memory beyond an output was written"
    return {"y": y, "dx": dx, "dlogits": ds, "dweight": dw, "dgain": dgain}


def check(p: Problem, found: dict[str, Tensor]) -> None:
    exact = by_autograd(p, torch.float64, torch.float64)
    torchs = by_autograd(p, p.x.dtype, torch.float32)
    for name, value in found.items():
        truth = exact[name]
        scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((value.double() - truth).abs().max() / scale).item()
        bound = 2 * ((torchs[name].double() - truth).abs().max() / scale).item() + 1e-6
        assert value.shape == truth.shape
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"  # also fails for NaN


@pytest.fixture(autouse=True)
def scratch_is_poisoned() -> Iterator[None]:
    """Memory that the launchers allocate themselves starts as NaN; PyTorch's float32 is float32."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8, device=DEVICE).isnan().all()
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_layouts(case: str, dtype: torch.dtype) -> None:
    p = problem(CASES[case], dtype)
    check(p, by_kernels(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(gate: GateSpec, dtype: torch.dtype) -> None:
    p = problem(Case((9, 20), (34, 20)), dtype, gate)
    check(p, by_kernels(p))


@pytest.mark.parametrize("shift", [-60.0, 60.0])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_all_gates_closed_or_open(gate: GateSpec, shift: float) -> None:
    p = problem(Case((9, 20), (34, 20)), torch.float32, gate, shift=shift)
    found = by_kernels(p)
    check(p, found)
    if shift > 0:  # then it is the plain product
        plain = F.linear(p.x, p.g.weight * p.g.gain, p.bias)
        torch.testing.assert_close(found["y"], plain)


def test_weights_in_the_compute_dtype() -> None:
    p = problem(CASES["quads"], torch.float16, weight_dtype=torch.float16)
    check(p, by_kernels(p))


@pytest.mark.parametrize(
    "case", [Case((33, 36), (34, 36)), Case((2, 5, 5, 4), (7, 5, 2, 2))], ids=str
)
def test_parts_and_slices(case: Case) -> None:
    p = problem(case, torch.float32)
    tiles = dict.fromkeys(("fwd", "dx", "dlogits"), Tiles(16, 16, 16, split=2, slices=4))
    first, again = by_kernels(p, tiles), by_kernels(p, tiles)
    check(p, first)
    assert all(torch.equal(first[name], again[name]) for name in first)  # no atomics


def test_logits_that_lie_unlike_the_weight() -> None:
    p = problem(CASES["3x3-channels-last"], torch.float32)
    p = p._replace(g=p.g._replace(logits=p.g.logits.contiguous()))
    check(p, by_kernels(p))


def test_without_gain_bias_and_trained_weights() -> None:
    p = problem(CASES["odd"], torch.float32)
    unit = p._replace(bias=torch.zeros_like(p.bias), g=p.g._replace(gain=torch.ones_like(p.g.gain)))
    g = p.g._replace(gain=None)
    y, ds = torch.full_like(p.dy, float("nan")), torch.full_like(g.logits, float("nan"))
    _launch_forward(y, p.x, None, g)
    _launch_dlogits(ds, None, None, p.dy, p.x, g)
    check(unit, {"y": y, "dlogits": ds})


def test_pixels_far_apart() -> None:
    """More than 2**31 elements between two rows of x: addresses are 64-bit."""
    room = torch.empty(1, dtype=torch.float16, device=DEVICE)
    try:
        torch.use_deterministic_algorithms(False)  # it would fill, and so touch, all of it
        room = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no 4 GiB to reserve")
    p = problem(Case((2, 16), (5, 16)), torch.float16)
    x = room.as_strided((2, 16), (2**31 + 8, 1)).copy_(p.x)
    check(p, by_kernels(p._replace(x=x)))


@triton.jit
def _noise_kernel(out_ptr, seed_ptr, step_ptr, first, length, w_k, QUAD: tl.constexpr):
    row = (first.to(tl.int64) + tl.arange(0, 2)) * length
    u = _noise(row, 4, w_k, tl.load(seed_ptr), tl.load(step_ptr), 3, 16, QUAD)
    at = tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, u)


@pytest.mark.parametrize(("taps", "quad"), [(1, True), (1, False), (9, False)])
def test_gates_beyond_two_to_the_31(taps: int, quad: bool) -> None:
    first, length = 2**24 + 3, 1024 * taps  # of a row
    out = torch.full((2, 16), float("nan"), device=DEVICE)
    _noise_kernel[(1,)](out, one(1), one(2), first, length, taps, QUAD=quad)
    for row in range(2):
        start = (first + row) * length + 4 * taps
        u = philox.uniform_ref(16 * taps, one(1), one(2), 3, offset=start)[::taps]
        assert torch.equal(out[row], u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["fwd", "dx", "dlogits"])
def test_tiles_suit_every_size(kind: str, dtype: torch.dtype) -> None:
    for t in (1, 16, 100, 10**6):
        for n in (1, 64, 5000):
            for k in (1, 100, 9000):
                for taps in (1, 9):
                    tiles = _config(kind, t, n, k, taps, dtype)
                    assert tiles == _config(kind, t, n, k, taps, dtype)
                    assert min(tiles.t, tiles.n, tiles.k) >= 16  # of tensor cores' products
                    blocks = {
                        "fwd": triton.cdiv(k, tiles.k) * taps,
                        "dx": triton.cdiv(n, tiles.n) * taps,
                        "dlogits": triton.cdiv(t, tiles.t),
                    }
                    assert 1 <= tiles.split <= blocks[kind]  # no empty part


# --- The operation ---------------------------------------------------------------------------------


@pytest.fixture
def kernels_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's operation with the kernels' noise."""
    uniform_ = philox.uniform_

    def exact(out: Tensor, seed: Tensor, step: Tensor, layer: int, **_) -> Tensor:
        return uniform_(out, seed, step, layer, exact=True)

    monkeypatch.setattr("sparsecore.kernels.philox.uniform_", exact)


def leaves(p: Problem) -> list[Tensor]:
    tensors = (p.x, p.g.weight, p.g.logits, p.bias, p.g.gain)
    return [tensor.detach().requires_grad_() for tensor in tensors]


def address(g: Gated) -> dict[str, Any]:
    return {"gate": g.gate, "seed": g.seed, "step": g.step, "layer": g.layer}


def apply(
    p: Problem, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor, gain: Tensor
) -> Tensor:
    if x.ndim == 2:
        return fused_gated_linear(x, weight, logits, bias, gain=gain, **address(p.g))
    slide = {"stride": p.g.conv[:2], "padding": p.g.conv[2:4], "dilation": p.g.conv[4:]}
    return fused_gated_conv2d(x, weight, logits, bias, gain=gain, **slide, **address(p.g))


@pytest.mark.parametrize("case", CASES)
def test_gradients_through_autograd(case: str, kernels_noise: None) -> None:
    p = problem(CASES[case], torch.float32)
    inputs = leaves(p)
    y = apply(p, *inputs)
    assert y.stride() == p.dy.stride()
    dx, dw, ds, db, dgain = torch.autograd.grad(y, inputs, p.dy)
    found = {"y": y.detach(), "dx": dx, "dlogits": ds, "dweight": dw, "dgain": dgain, "dbias": db}
    check(p, found)


def test_only_what_is_asked_for(kernels_noise: None) -> None:
    p = problem(CASES["odd"], torch.float32)
    truth = by_autograd(p, torch.float64, torch.float64)
    names = ["dx", "dweight", "dlogits", "dbias", "dgain"]
    for position, name in enumerate(names):
        inputs = [leaf.requires_grad_(i == position) for i, leaf in enumerate(leaves(p))]
        (gradient,) = torch.autograd.grad(apply(p, *inputs), inputs[position], p.dy)
        torch.testing.assert_close(gradient.double(), truth[name], rtol=1e-4, atol=1e-4)


def test_batches_and_expanded_gradients() -> None:
    p = problem(Case((6, 20), (5, 20)), torch.float32)
    rows = apply(p, *leaves(p))
    batch = fused_gated_linear(
        p.x.view(2, 3, 20), p.g.weight, p.g.logits, p.bias, gain=p.g.gain, **address(p.g)
    )
    assert torch.equal(batch.flatten(0, 1), rows)
    single = fused_gated_linear(p.x[0], p.g.weight, p.g.logits, **address(p.g))
    assert single.shape == (5,)
    inputs = leaves(p)
    apply(p, *inputs).sum().backward()  # a gradient of stride 0
    torch.testing.assert_close(inputs[3].grad, torch.full((5,), 6.0, device=DEVICE))


@pytest.mark.parametrize("case", ["odd", "all-of-it"])
def test_no_tokens(case: str) -> None:
    p = problem(CASES[case], torch.float32)
    inputs = leaves(p)
    y = apply(p, inputs[0][:0], *inputs[1:])
    assert y.shape == (0, *p.dy.shape[1:])
    y.sum().backward()
    assert all(not leaf.grad.any() for leaf in inputs[1:])


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels have no float64")
@pytest.mark.parametrize("gate", GATES[:4], ids=str)
@pytest.mark.parametrize("case", [Case((3, 4), (5, 4)), Case((1, 2, 4, 3), (3, 2, 2, 2))], ids=str)
def test_the_formula_and_its_gradient(case: Case, gate: GateSpec) -> None:
    p = problem(case, torch.float32, gate)
    inputs = [leaf.detach().double().requires_grad_() for leaf in leaves(p)]
    assert torch.autograd.gradcheck(partial(apply, p), inputs, fast_mode=True)


@pytest.mark.parametrize("case", ["odd", "all-of-it"])
def test_opcheck(case: str) -> None:
    p = problem(CASES[case], torch.float32)
    inputs = leaves(p)
    x, weight, logits, bias, gain = inputs
    g, conv = p.g, list(p.g.conv)
    forward = torch.ops.sparsecore.fused_gated_conv.default
    rest = (g.seed, g.step, g.layer, [float(v) for v in g.gate], conv)
    torch.library.opcheck(forward, (x, weight, logits, bias, gain, *rest))
    torch.library.opcheck(forward, (x, weight, logits, None, None, *rest))
    backward = torch.ops.sparsecore.fused_gated_conv_backward.default
    plain = [t.detach() for t in (p.dy, x, weight, logits, gain)]
    torch.library.opcheck(backward, (*plain, *rest, [False, True, False, True]))


@pytest.mark.parametrize("case", ["odd", "all-of-it"])
def test_compiles_in_one_graph(case: str) -> None:
    p = problem(CASES[case], torch.float32)
    torch.use_deterministic_algorithms(False)
    inputs = leaves(p)
    compiled = torch.compile(partial(apply, p), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(apply(p, *inputs), inputs, p.dy)
    found = torch.autograd.grad(compiled(*inputs), inputs, p.dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_x_alone() -> None:
    p = problem(CASES["odd"], torch.float32)
    inputs = leaves(p)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = apply(p, *inputs)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in inputs)
    assert torch.equal(y, apply(p, inputs[0].bfloat16(), *inputs[1:]))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 5)}, r"expected x \[\*batch, 4\]"),
    ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "expected x in one of"),
    ({"weight": torch.zeros(2, 4, dtype=torch.float16)}, "expected weight in"),
    ({"logits": torch.zeros(2, 1)}, "one logit for each weight"),
    ({"logits": torch.zeros(2, 4, dtype=torch.float16)}, "float32 logits"),
    ({"bias": torch.zeros(4)}, r"expected bias \[2\]"),
    ({"gain": torch.zeros(1)}, "expected gain as"),
    ({"seed": torch.zeros(1)}, "seed as one int64"),
    ({"step": torch.zeros(1, dtype=torch.int64, device="meta")}, "expected step on"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(3, 4), "weight": torch.zeros(2, 4), "logits": torch.zeros(2, 4)}
    good |= {"seed": torch.zeros(1, dtype=torch.int64), "step": torch.zeros(1, dtype=torch.int64)}
    arguments = {key: value.to(DEVICE) for key, value in good.items()}
    arguments |= {k: v if v.is_meta else v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        fused_gated_linear(**arguments, gate=GATES[0], layer=0)


def test_bad_convolutions() -> None:
    p = problem(CASES["3x3"], torch.float32)
    x, weight, logits, *_ = leaves(p)
    call = partial(fused_gated_conv2d, **address(p.g))
    with pytest.raises(ValueError, match="groups are not supported"):
        call(torch.cat((x, x), 1), weight, logits)
    with pytest.raises(ValueError, match="does not fit"):
        call(x, weight, logits, dilation=5)
    with pytest.raises(ValueError, match="expected stride as"):
        call(x, weight, logits, stride=0)
    with pytest.raises(ValueError, match="a weight of 4 dimensions"):
        call(x, weight[..., 0], logits[..., 0])
