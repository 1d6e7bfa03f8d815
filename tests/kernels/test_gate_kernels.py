"""Sampling and its backward: the kernels against the formulas in float64, on the same noise."""

import pytest
import torch
from helpers import DEVICE, rand, randn
from torch import Tensor

from sparsecore.kernels import GateSpec, Unit, gated_weight, philox, unit_shape
from sparsecore.kernels import reference as ref
from sparsecore.kernels import units as algebra
from sparsecore.kernels.gates import weight as op

pytestmark = pytest.mark.gpu  # on the GPU where there is one, interpreted otherwise

GPU = DEVICE == "cuda"
GATES = {
    "concrete": GateSpec(ref.CONCRETE),
    "concrete-2/3": GateSpec(ref.CONCRETE, 2 / 3),
    "hard-concrete": GateSpec(ref.HARD_CONCRETE, 2 / 3, -0.1, 1.1),
    "gaussian": GateSpec(ref.GAUSSIAN, 0.5),
    "bernoulli": GateSpec(ref.BERNOULLI),
}
UNITS = {
    "weight": Unit(),
    "block": Unit(2, 3),
    "vector": Unit(4, 1),
    "channel": Unit(1, 0),
    "2:4": Unit(1, 4, 2),
}
SHAPES = [(1, 1), (7, 63), (33, 65), (5, 7, 3, 3)]
REAL = [(4096, 4096), (768, 3072), (512, 512, 3, 3)]  # on a GPU
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
LAYER = 3
by_gate = pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))
by_unit = pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
by_shape = pytest.mark.parametrize("shape", SHAPES + REAL * GPU, ids=str)


def one(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


SEED, STEP = 2**40 + 17, 5


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates is NaN until it is written."""
    empty_like = torch.empty_like

    def filled(t: Tensor, **kwargs) -> Tensor:
        out = empty_like(t, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty_like", filled)


def expected(
    weight: Tensor, logits: Tensor, gain: Tensor, grad: Tensor, gate: GateSpec, unit: Unit, dtype: torch.dtype
) -> list[Tensor]:  # fmt: skip
    """w_eff, ds, dw, dlog_gain by the formulas in `dtype`, on the kernel's own noise."""
    noise = philox.storage_noise(logits, one(SEED), one(STEP), LAYER, exact=True)
    weight, logits, noise, grad, gain = (
        t.to(dtype) for t in (weight, logits, noise, grad, gain.exp())
    )
    z = algebra.project_ref(ref.sample_ref(gate, logits, noise), unit)
    through = algebra.gather_ref(grad * weight * gain, unit)
    return [
        algebra.apply_ref(weight, z, unit) * gain,
        ref.slope_ref(gate, z, logits) * through,
        algebra.apply_ref(grad, z, unit) * gain,
        (through * z).sum(),
    ]


def within(found: Tensor, exact: Tensor, usual: Tensor, scale: Tensor | None = None) -> None:
    """The error is at most twice PyTorch's in the same dtype, + 1e-6 of the scale, by default the largest value."""
    scale = (exact.abs().max() if scale is None else scale).clamp_min(1e-30)
    error = (found.double() - exact).abs().max() / scale
    bound = 2 * (usual.double() - exact).abs().max() / scale + 1e-6
    assert bool(error <= bound), (float(error), float(bound))


def doubtful(gate: GateSpec, unit: Unit, logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weights whose gate rounding may decide: a sample at a clip or a step, two rivals for one place."""
    noise = philox.storage_noise(logits, one(SEED), one(STEP), LAYER, exact=True).double()
    low, z, high = (ref.sample_ref(gate, logits.double() + d, noise) for d in (-1e-5, 0.0, 1e-5))
    clipped = [(t <= 0) | (t >= 1) for t in (low, high)]
    near = ((high - low) > 0.5) | (clipped[0] != clipped[1])
    ones = torch.ones(shape, dtype=torch.float64, device=logits.device)
    if not unit.keep:
        return algebra.apply_ref(ones, near.double(), unit) > 0
    lanes = torch.nn.functional.pad(z.movedim(1, -1), (0, -shape[1] % unit.w), value=-1.0)
    best = lanes.unflatten(-1, (-1, unit.w)).sort(-1, descending=True).values
    apart = best[..., unit.keep - 1] - best[..., unit.keep]
    rivals = (apart < 1e-5) & (apart > 0)  # equals, clipped alike, go by their index
    groups = Unit(1, unit.w)
    near = (algebra.gather_ref(near.double(), groups) > 0) | rivals.movedim(-1, 1)
    return algebra.apply_ref(ones, near.double(), groups) > 0


@by_shape
@by_unit
@by_gate
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_forward_and_backward(
    gate: GateSpec, unit: Unit, shape: tuple[int, ...], fast: bool, poison: None
) -> None:
    weight, grad = randn(*shape).to(DEVICE), randn(*shape, seed=1).to(DEVICE)
    logits = randn(*unit_shape(shape, unit), seed=2).to(DEVICE)
    if len(shape) == 4 and unit.single:  # as convolutions like it
        last = torch.channels_last
        weight, logits = weight.to(memory_format=last), logits.to(memory_format=last)
    gain = torch.tensor(0.3, device=DEVICE)
    skipped = doubtful(gate, unit, logits, shape)
    assert skipped.double().mean() < 0.02
    hidden = skipped if unit.single else algebra.gather_ref(skipped.double(), unit) > 0
    arguments = (one(SEED), one(STEP), LAYER, [float(v) for v in gate], list(unit), fast)
    exact = expected(weight, logits, gain, grad, gate, unit, torch.float64)
    for dtype in DTYPES:
        out = op.launch_gated_weight(weight, logits, gain, *arguments, dtype)
        usual = expected(weight, logits, gain, grad, gate, unit, torch.float32)[0].to(dtype)
        within(*(t.masked_fill(skipped, 0) for t in (out, exact[0], usual)))
        given = grad.to(dtype)
        exact_here = expected(weight, logits, gain, given, gate, unit, torch.float64)
        usual_here = expected(weight, logits, gain, given, gate, unit, torch.float32)
        found = op.launch_gated_weight_backward(given, weight, logits, gain, *arguments, True)
        for i, mask in enumerate((hidden, skipped)):
            mine = (found[i], exact_here[i + 1], usual_here[i + 1])
            within(*(t.masked_fill(mask, 0) for t in mine))
        terms = exact[0] * given.double()  # whose sum is dlog_gain: its terms cancel
        within(found[2], exact_here[3], usual_here[3], scale=terms.abs().sum())
        again = op.launch_gated_weight_backward(given, weight, logits, gain, *arguments, True)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))  # deterministic


@by_unit
@pytest.mark.parametrize("level", [-80.0, 80.0])
def test_gates_that_are_all_closed_or_all_open(unit: Unit, level: float, poison: None) -> None:
    shape, gate = (6, 9, 2, 2), GATES["hard-concrete"]
    weight = randn(*shape).to(DEVICE)
    logits = torch.full(unit_shape(shape, unit), level, device=DEVICE)
    arguments = (one(SEED), one(STEP), LAYER, [float(v) for v in gate], list(unit), True)
    out = op.launch_gated_weight(weight, logits, None, *arguments, torch.float32)
    if level < 0:
        assert not out.any()
    elif not unit.keep:
        assert torch.equal(out, weight)
    else:
        assert (
            int((out != 0).sum()) == 6 * (2 + 2 + 1) * 4
        )  # of 9 inputs: two of four, twice, and one
    ds, dw, dgain = op.launch_gated_weight_backward(weight, weight, logits, None, *arguments, True)
    assert not ds.any() and torch.isfinite(dgain)  # clipped gates have no slope
    assert torch.equal(dw, out)


def test_nothing_beyond_the_end_is_written() -> None:
    weight = randn(5, 7).to(DEVICE)
    room = torch.full((64,), float("nan"), device=DEVICE)
    from sparsecore.kernels.gates.launch import launch_sample

    launch_sample(
        op._plan(op._geometry(weight, 0), Unit(), weight.device), GATES["concrete"], Unit(),
        weight=weight, logits=weight, out=room, q=None, log_gain=None, seed=one(1), step=one(0),
    )  # fmt: skip
    assert torch.isfinite(room[:35]).all() and torch.isnan(room[35:]).all()


@by_unit
@pytest.mark.parametrize("name", [n for n in GATES if n != "bernoulli"])  # a step has no derivative
def test_first_and_second_derivatives(name: str, unit: Unit) -> None:
    gate = GATES[name]
    # Away from clipping's corners; float64 is the reference's alone.
    weight = randn(4, 6, dtype=torch.float64).requires_grad_()
    logits = 0.3 * randn(*unit_shape((4, 6), unit), seed=1, dtype=torch.float64)
    logits.requires_grad_()
    gain = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    address = {"seed": torch.tensor([3]), "step": torch.tensor([2]), "layer": 1}

    def run(weight: Tensor, logits: Tensor, gain: Tensor) -> Tensor:
        return gated_weight(weight, logits, gain, gate=gate, unit=unit, **address)

    with torch.random.fork_rng(devices=[]):  # gradcheck draws its directions there
        assert torch.autograd.gradcheck(run, (weight, logits, gain))
        assert torch.autograd.gradgradcheck(run, (weight, logits, gain))


def test_opcheck_and_compile() -> None:
    weight = randn(6, 8).to(DEVICE).requires_grad_()
    logits = randn(6, 8, seed=1).to(DEVICE).requires_grad_()
    gain = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    gate = [float(v) for v in GATES["concrete"]]
    arguments = (weight, logits, gain, one(1), one(2), 0, gate, [1, 1, 0], True, torch.float32)
    torch.library.opcheck(op._gated_weight, arguments)
    back = (randn(6, 8).to(DEVICE), *(t.detach() for t in arguments[:3]), *arguments[3:9], True)
    torch.library.opcheck(op._backward, back, test_utils=("test_schema", "test_faketensor"))

    def run(weight: Tensor, logits: Tensor) -> Tensor:
        return gated_weight(
            weight, logits, gain, gate=GATES["concrete"], unit=Unit(), seed=one(1), step=one(2), layer=0
        ).square().sum()  # fmt: skip

    run(weight, logits).backward()
    eager = logits.grad.clone()
    logits.grad = None
    torch.compile(run, fullgraph=True)(weight, logits).backward()
    torch.testing.assert_close(logits.grad, eager)


def test_autocast_chooses_the_dtype_and_strided_inputs_are_copied() -> None:
    weight, logits = randn(8, 6).to(DEVICE).T, randn(8, 6, seed=1).to(DEVICE).T
    arguments = {"gate": GATES["concrete"], "unit": Unit(), "seed": one(1), "step": one(2)}
    out = gated_weight(weight, logits, layer=0, **arguments)
    straight = gated_weight(weight.contiguous(), logits.contiguous(), layer=0, **arguments)
    assert torch.equal(out, straight)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert gated_weight(weight, logits, layer=0, **arguments).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"logits: expected shape \(3, 2\)"):
        gated_weight(weight, logits, layer=0, **(arguments | {"unit": Unit(2, 4)}))


def test_the_reference_draws_another_mask_at_every_step() -> None:
    weight, logits = torch.ones(64, 64), rand(64, 64)
    arguments = {"gate": GATES["bernoulli"], "unit": Unit(), "seed": torch.tensor([1]), "layer": 0}
    first, second = (
        gated_weight(weight, logits, step=torch.tensor([t]), **arguments) for t in (0, 1)
    )
    assert not torch.equal(first, second)
    share = torch.stack([first, second]).mean().item()
    assert share == pytest.approx(torch.sigmoid(logits).mean().item(), abs=0.03)
