"""The three launches of a search step, over several layers and searches at once, against plain PyTorch."""

import itertools
import math

import pytest
import torch
from helpers import DEVICE, randn
from torch import Tensor

from sparsecore.kernels import GateBank, GateSpec, Rule, Unit, philox
from sparsecore.kernels import reference as ref
from sparsecore.kernels.gates import bank as gate_bank
from sparsecore.kernels.gates import bank_ref, joined
from sparsecore.kernels.gates.segments import COLUMNS, FLAT_BLOCK

pytestmark = pytest.mark.gpu  # on the GPU where there is one, interpreted otherwise

GPU = DEVICE == "cuda"
GATES = {
    "concrete": GateSpec(ref.CONCRETE),
    "hard-concrete": GateSpec(ref.HARD_CONCRETE, 2 / 3, -0.1, 1.1),
    "gaussian": GateSpec(ref.GAUSSIAN, 0.5),
    "bernoulli": GateSpec(ref.BERNOULLI),
}
UNITS = {"weight": Unit(), "block": Unit(2, 3), "channel": Unit(1, 0), "2:4": Unit(1, 4, 2)}
SHAPES = [(37, 41), (5, 7, 3, 3), (1, 1)] * 2
WHOLE = [(40, 64), (16, 8, 3, 3), (8, 16)] * 2  # rows, blocks and taps that are multiples of 8
REAL = [
    (1000, 512),
    (128, 128, 3, 3),
    (64, 3, 7, 7),
] * 2  # on a GPU; the CPU draws the same noise slowly
RULES = {
    "gradbalance": Rule(0.99, 0.01, 0.0),
    "band": Rule(0.99, 0.01, 0.0, band=1e3),  # the density of these banks is within it
    "lagrangian": Rule(1.0, 0.0, 1e-3),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU draws the kernels' noise, and without a GPU the kernels are interpreted."""
    uniform_ = philox.uniform_

    def exact(out: Tensor, seed: Tensor, step: Tensor, layer: int, **_) -> Tensor:
        return uniform_(out, seed, step, layer, exact=True)

    monkeypatch.setattr(philox, "uniform_", exact)
    monkeypatch.setattr(bank_ref, "uniform_", exact)


def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(joined, "JOINED", 0)  # layers lie apart, as on a GPU
        monkeypatch.setattr(gate_bank, "sample_gates_ref_", gate_bank.launch_sample_gates)
        monkeypatch.setattr(gate_bank, "gates_backward_ref_", gate_bank.launch_gates_backward)
        monkeypatch.setattr(gate_bank, "balanced_step_ref_", gate_bank.launch_bank_step)


def bank_on(
    device: str, gate: GateSpec, unit: Unit, rule: Rule, shapes: list = SHAPES, **options
) -> GateBank:
    """Two searches over the same three layers: other densities, other seeds."""
    shapes = REAL if GPU and shapes is SHAPES else shapes
    weights = [randn(*shape, seed=i % 3) for i, shape in enumerate(shapes)]
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    weights[4] = weights[4].contiguous(memory_format=torch.channels_last)
    count = sum(w.numel() for w in weights[:3])
    return GateBank(
        [w.to(device) for w in weights],
        gate=gate,
        unit=unit,
        start=[0.4, -1.0],
        seeds=[3, 3, 3, 2**40, 2**40, 2**40],
        layers=[0, 1, 2, 0, 1, 2],
        groups=[0, 0, 0, 1, 1, 1],
        targets=[0.3 * count, 0.1 * count],
        rule=rule,
        **options,
    )


def three_steps(bank: GateBank) -> dict[str, list[Tensor]]:
    """What a step leaves behind, three times; gradients are made up, and the first layer's is shared memory."""
    seen: dict[str, list[Tensor]] = {}
    for t in range(3):
        out = bank.sample_()
        grads = [randn(*o.shape, seed=10 * t + i).to(o) for i, o in enumerate(out)]
        seen.setdefault("out", []).extend(o.double().cpu() for o in out)
        z = [o / w for o, w in zip(out, bank.weights, strict=True)]  # times the gain
        expected = [g * share for g, share in zip(grads, z, strict=True)]
        bank.backward_(grads)
        if bank.trained:
            for mine, right in zip(bank.out, expected, strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
            seen.setdefault("dw", []).extend(o.double().cpu() for o in bank.out)
        seen.setdefault("sums", []).append(bank.sums().double().cpu())
        bank.step_()
        for name, value in bank.tensors().items():
            seen.setdefault(name.split("/")[0], []).append(value.detach().double().cpu())
    return seen


def agree(mine: Tensor, right: Tensor) -> None:
    """float32 in both; sums in another order, functions to 2 ulp.

    At a clip or a step rounding decides, which a few gates in a million meet: one in 100,000 may differ,
    so none of these small layers' and some of the real ones'.
    """
    close = torch.isclose(mine, right, rtol=2e-4, atol=2e-5)
    assert (~close).sum() <= 1e-5 * close.numel(), (mine - right).abs().max()


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("mode", ["recomputed", "stored", "trained"])
@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
@pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))
def test_three_steps_of_two_searches(
    gate: GateSpec,
    unit: Unit,
    mode: str,
    rule: Rule,
    launched: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Where a gate has several weights there is nothing to store: the same as recomputed.
    options = {"store_factor": mode == "stored" and unit.single, "trained": mode == "trained"}
    plain = three_steps(bank_on("cpu", gate, unit, rule, **options))
    if mode == "trained":  # the CPU's own way keeps z
        kept = three_steps(bank_on("cpu", gate, unit, rule, trained=True, store_factor=True))
        for name, values in plain.items():
            for mine, right in zip(kept[name], values, strict=True):
                agree(mine, right)
    interpreted(monkeypatch)
    bank = bank_on(DEVICE, gate, unit, rule, **options)
    for tensors in (bank.out, bank.ds, bank.q, [bank.partials]):
        for t in tensors:
            t.fill_(float("nan"))  # all of it must be written before it is read
    found = three_steps(bank)
    again = three_steps(bank_on(DEVICE, gate, unit, rule, **options))
    for name, values in found.items():
        for mine, right, twice in zip(values, plain[name], again[name], strict=True):
            agree(mine, right)
            assert torch.equal(mine, twice), name  # deterministic
    assert found["step"][-1].tolist() == [3, 3]


@pytest.mark.parametrize("mode", ["recomputed", "stored", "trained"])
def test_layers_side_by_side_step_as_layers_apart(
    mode: str, launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU small layers share memory, in steps alone: sums differ by their order."""
    options = {"store_factor": mode != "recomputed", "trained": mode == "trained"}
    together = bank_on("cpu", GATES["concrete"], Unit(), RULES["band"], **options)
    assert [held.first for held in together.held] == [0, 3]
    monkeypatch.setattr(joined, "JOINED", 0)
    apart = bank_on("cpu", GATES["concrete"], Unit(), RULES["band"], **options)
    assert [held.first for held in apart.held] == [*range(6)]
    for mine, right in zip(together.weights, apart.weights, strict=True):
        assert mine.stride() == right.stride() and torch.equal(mine, right)
    found, right = three_steps(together), three_steps(apart)
    for name, values in found.items():
        torch.testing.assert_close(values, right[name], rtol=1e-5, atol=1e-6)


def test_what_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "JOINED", 10)
    sizes, groups = [4, 6, 1, 30, 2, 2, 2, 9], [0, 0, 0, 0, 0, 0, 1, 1]
    held = joined.runs(sizes, groups)
    assert [h.sizes for h in held] == [[4, 6], [1], [30], [2, 2], [2], [9]]
    assert [h.first for h in held] == [0, 2, 3, 4, 6, 7]
    tensors = [randn(size, seed=i) for i, size in enumerate(sizes)]
    views, memories = joined.join(tensors, held)
    assert all(torch.equal(a, b) for a, b in zip(views, tensors, strict=True))
    assert views[3] is tensors[3]  # alone: not copied
    memories[0].zero_()
    assert not views[0].any() and not views[1].any() and views[2].all()
    assert list(joined.held_in(memories, sizes)) == held


@pytest.mark.parametrize("unit", [Unit(8, 16), Unit(8, 8), Unit(1, 0), Unit(1, 4, 2)], ids=str)
def test_layers_whose_memory_moves_in_vectors(
    unit: Unit, launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, rule = GATES["hard-concrete"], RULES["gradbalance"]
    plain = three_steps(bank_on("cpu", gate, unit, rule, WHOLE))
    interpreted(monkeypatch)
    bank = bank_on(DEVICE, gate, unit, rule, WHOLE)
    assert bank.plan.hints.vector == (4 if unit.keep else 8)
    for name, values in three_steps(bank).items():
        for mine, right in zip(values, plain[name], strict=True):
            agree(mine, right)


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if GPU else [])], ids=str)
def test_half_precision_gates_a_search_in_float32(
    dtype: torch.dtype, launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w_eff and its gradient have 11 (8) bits, and everything that is kept has 24."""
    plain = three_steps(bank_on("cpu", GATES["concrete"], Unit(), RULES["gradbalance"]))
    interpreted(monkeypatch)
    bank = bank_on(DEVICE, GATES["concrete"], Unit(), RULES["gradbalance"], dtype=dtype)
    assert all(s.dtype == torch.float32 for s in (*bank.logits, *bank.m, *bank.v))
    found = three_steps(bank)
    bits = 2 * torch.finfo(dtype).eps
    for mine, right in zip(found["sums"], plain["sums"], strict=True):
        torch.testing.assert_close(mine, right, rtol=bits, atol=0)
    for mine, right in zip(found["out"][:6], plain["out"][:6], strict=True):
        torch.testing.assert_close(mine, right, rtol=bits / 2, atol=1e-7)


@pytest.mark.parametrize("rule", [RULES["gradbalance"], RULES["band"]], ids=["paper", "band"])
@pytest.mark.parametrize("target", [100.0, 700.0], ids=["above", "below"])
def test_adam_is_pytorchs_and_lambda_is_the_papers(
    target: float, rule: Rule, launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the target, and below it, where lambda is 0; with a band, a part of it."""
    interpreted(monkeypatch)
    weight = randn(9, 130).to(DEVICE)
    bank = GateBank(
        [weight], gate=GATES["concrete"], unit=Unit(), start=[0.0], seeds=[1], layers=[0],
        groups=[0], targets=[target], rule=rule, gain_lr=0.0,
    )  # fmt: skip
    logits = bank.logits[0].double().cpu().clone().requires_grad_()
    adam, average = torch.optim.Adam([logits], lr=0.1), 0.0
    for t in range(4):
        noise = philox.storage_noise(bank.logits[0], bank.seeds, bank.step[:1] + 1, 0, exact=True)
        z = ref.concrete_ref(logits.detach(), noise.double().cpu(), 1.0)
        upstream = randn(9, 130, seed=t)
        bank.sample_()
        bank.backward_([upstream.clone().to(DEVICE)])  # is overwritten
        bank.step_()
        g = (upstream * weight.cpu()).double() * z * (1 - z)
        p = torch.sigmoid(logits.detach())
        excess = float(100 * (p.sum() / target - 1))  # percent above the target
        assert (excess > 0) == (target == 100)
        pull = 100 / target * p * (1 - p)
        ratio = float(g.norm() / pull.norm()) if excess > 0 or rule.band else 0.0
        average = ratio if t == 0 else 0.99 * average + 0.01 * ratio
        part = min(max(excess / rule.band, 0.0), 1.0) if rule.band else 1.0
        logits.grad = g + part * average * pull
        adam.step()
        assert bank.control[0, 0].item() == pytest.approx(average, rel=1e-4)
        torch.testing.assert_close(
            bank.logits[0].double().cpu(), logits.detach(), rtol=1e-4, atol=1e-5
        )


def test_the_plan_covers_every_weight_once() -> None:
    bank = bank_on("cpu", GATES["concrete"], Unit(), RULES["gradbalance"])
    table, chunks = bank.plan.table, bank.plan.chunks.tolist()
    assert table.shape == (6, COLUMNS)
    for segment, weight in enumerate(bank.weights):
        mine = [(start, stop) for s, start, stop in chunks if s == segment]
        assert mine[0][0] == 0 and mine[-1][1] == math.ceil(weight.numel() / FLAT_BLOCK)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(mine))
    assert bank.plan.groups.tolist() == [[0, len(chunks) // 2], [len(chunks) // 2, len(chunks)]]


def test_many_launches_agree_with_many_chunks(
    launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that loops over several blocks adds up what several programs would."""
    from sparsecore.kernels.gates import segments

    interpreted(monkeypatch)
    wide = three_steps(bank_on(DEVICE, GATES["concrete"], Unit(), RULES["gradbalance"]))
    monkeypatch.setattr(segments, "_PROGRAMS", 2)
    narrow_bank = bank_on(DEVICE, GATES["concrete"], Unit(), RULES["gradbalance"])
    assert len(narrow_bank.plan.chunks) <= 6
    narrow = three_steps(narrow_bank)
    for a, b in zip(wide["logits"], narrow["logits"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_operators_pass_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "JOINED", 0)
    bank = bank_on("cpu", GATES["concrete"], Unit(), RULES["gradbalance"], store_factor=True)
    *tables, hints = bank.plan
    gate, unit = [float(v) for v in bank.gate], list(bank.unit)
    tests = ("test_schema", "test_faketensor")
    sample = (
        bank.out, bank.q, bank.log_gain, bank.step, bank.control, bank.weights, bank.logits,
        bank.seeds, tables, bank.layers, gate, unit, list(hints), True,
        False,
    )  # fmt: skip
    torch.library.opcheck(gate_bank._sample, sample, test_utils=tests)
    grads = [torch.ones_like(o) for o in bank.out]
    offsets = torch.zeros(6, dtype=torch.int64)
    backward = (
        grads, bank.ds, bank._pulls, bank.partials, offsets, bank.weights, bank.logits, bank.out, bank.q,
        bank.log_gain, bank.seeds, bank.step, tables, bank.layers, gate, unit, list(hints), True,
        False,
    )  # fmt: skip
    torch.library.opcheck(gate_bank._backward, backward, test_utils=tests)
    step = (
        bank.logits, bank.m, bank.v, bank.log_gain, bank.step, bank.control, grads, bank._pulls, offsets,
        bank.partials, bank.targets, bank.lr, tables, gate, unit, list(bank.rule), list(hints),
        True,
    )  # fmt: skip
    torch.library.opcheck(gate_bank._step, step, test_utils=tests)


def test_gradients_from_the_layers_end_where_their_logits_lie(
    launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's gradient may be contiguous where its logits are channels_last."""
    found = []
    for kernels in (False, True):
        if kernels:
            interpreted(monkeypatch)
        device = DEVICE if kernels else "cpu"
        bank = bank_on(device, GATES["concrete"], Unit(), RULES["gradbalance"], out=[])
        assert not bank.out
        bank.begin_()
        ds = [randn(*s.shape, seed=i).to(device) for i, s in enumerate(bank.logits)]
        bank.take_(ds, list(torch.full((6,), 0.1, device=device)))
        before = [s.clone() for s in bank.logits]
        bank.step_()
        for s, was, d, group in zip(bank.logits, before, ds, bank.groups, strict=True):
            p = torch.sigmoid(was)
            total = d + bank.control[0, group] * 100 / bank.targets[group] * p * (1 - p)
            right = was - 0.1 * total / (total.abs() + 1e-8)  # Adam's first step
            torch.testing.assert_close(s, right, rtol=1e-3, atol=1e-4)
        found.append([t.cpu() for t in (*bank.logits, bank.log_gain, bank.control, bank.sums())])
    for plain, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_bad_weights_are_refused() -> None:
    for weight in (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 8)[:, ::2]):
        with pytest.raises(ValueError, match="expected dense float32 weights"):
            GateBank(
                [weight], gate=GATES["concrete"], unit=Unit(), start=[0.0], seeds=[0], layers=[0],
                groups=[0], targets=[1.0], rule=RULES["gradbalance"],
            )  # fmt: skip
