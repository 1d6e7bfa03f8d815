"""The three steps of a bank, over several layers and searches at once, by kernels and in PyTorch, against float64."""

import itertools
import math

import pytest
import torch
from bank_oracle import Oracle
from helpers import DEVICE, randn
from torch import Tensor

from sparsecore.control import GradBalance, Reading, State
from sparsecore.gates import Concrete
from sparsecore.granularity import Weight
from sparsecore.kernels import GateBank, GateSpec, Rule, Unit, philox
from sparsecore.kernels import reference as ref
from sparsecore.kernels.gates import bank as gate_bank
from sparsecore.kernels.gates import joined, segments
from sparsecore.kernels.gates.segments import COLUMNS, FLAT_BLOCK
from sparsecore.search.kept import Kept

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
    "lagrangian": Rule(1.0, 0.0, 1e-3, share=0.01),
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernels run all the same, on a CPU's tensors."""
    if not GPU:
        monkeypatch.setattr(gate_bank, "plain_on", lambda device: False)
        monkeypatch.setattr(gate_bank, "_sample", gate_bank.launch_sample_gates)
        monkeypatch.setattr(gate_bank, "_backward", gate_bank.launch_gates_backward)
        monkeypatch.setattr(gate_bank, "_step", gate_bank.launch_bank_step)


def bank_on(device: str, gate: GateSpec, unit: Unit, shapes: list = SHAPES, **options) -> GateBank:
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
        rule=RULES["gradbalance"],
        **options,
    )


def three_steps(bank: GateBank, *, exact: bool) -> list[Tensor]:
    """Each of three steps, by three rules and at falling rates, is the one in float64; all that the last one leaves.

    Gradients are made up, and lie as they come.
    """
    for t, rule in enumerate(RULES.values()):
        oracle = Oracle(bank, exact=exact)
        for tensors in (bank.out, bank.ds, bank.q, [bank.partials]):
            for tensor in tensors:
                tensor.fill_(float("nan"))  # all of it must be written before it is read
        out = bank.sample_()
        oracle.sampled()
        grads = [randn(*o.shape, seed=10 * t + i).to(o) for i, o in enumerate(out)]
        given = [g.clone() for g in grads]
        bank.backward_(grads)
        oracle.differentiated(given)
        bank.lr *= 0.9
        bank.step_(rule)
        oracle.stepped(rule)
    return [value.clone() for value in bank.tensors().values()]


# Where a gate has several weights there is nothing to store.
MODES = [
    pytest.param(unit, mode, id=f"{name}-{mode}")
    for name, unit in UNITS.items()
    for mode in ("recomputed", "stored", "trained")
    if unit.single or mode != "stored"
]


@pytest.mark.parametrize(("unit", "mode"), MODES)
@pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))
def test_three_steps_of_two_searches(
    gate: GateSpec, unit: Unit, mode: str, interpreted: None
) -> None:
    options = {"store_factor": mode == "stored", "trained": mode == "trained"}
    found = three_steps(bank_on(DEVICE, gate, unit, **options), exact=True)
    if gate.kind == ref.CONCRETE:  # the same bits every time
        again = three_steps(bank_on(DEVICE, gate, unit, **options), exact=True)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("mode", ["recomputed", "stored", "trained", "trained, z kept"])
@pytest.mark.parametrize("unit", UNITS.values(), ids=list(UNITS))
@pytest.mark.parametrize("gate", GATES.values(), ids=list(GATES))
def test_three_steps_in_plain_pytorch(gate: GateSpec, unit: Unit, mode: str) -> None:
    """Small layers lie side by side, where each weight has a gate of its own."""
    options = {"store_factor": mode in ("stored", "trained, z kept"), "trained": "trained" in mode}
    bank = bank_on("cpu", gate, unit, shapes=[*SHAPES], **options)
    firsts = [0, 3] if unit.single and not unit.keep else [*range(6)]
    assert [held.first for held in bank.held] == firsts
    three_steps(bank, exact=False)


def test_layers_side_by_side_lie_as_layers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    banks = []
    for size in (joined.JOINED, 0):
        monkeypatch.setattr(joined, "JOINED", size)
        banks.append(bank_on("cpu", GATES["concrete"], Unit(), shapes=[*SHAPES]))
    together, apart = banks
    assert len(together.held) == 2 and len(apart.held) == 6
    for mine, right in zip(together.weights, apart.weights, strict=True):
        assert mine.stride() == right.stride() and torch.equal(mine, right)
    three_steps(apart, exact=False)


@pytest.mark.parametrize("level", [-3.0, 0.0, 2.5])
def test_sums_are_right_to_a_millionth(level: float) -> None:
    """A search begins with equal logits, over which float32 added one by one loses a thousandth."""
    bank = GateBank(
        [randn(668, 1000), randn(864)[:, None]], gate=GATES["concrete"], unit=Unit(), start=[level],
        seeds=[0, 0], layers=[0, 1], groups=[0, 0], targets=[100.0], rule=RULES["gradbalance"],
    )  # fmt: skip
    bank.sample_()
    bank.backward_([randn(*o.shape, seed=9) for o in bank.out])
    found = bank.sums()[0].double()
    p = torch.sigmoid(torch.tensor(level).double())
    squares = sum(g.double().square().sum() for g in bank.grads)
    right = torch.stack([squares, 668_864 * p, 668_864 * (p * (1 - p)) ** 2])
    torch.testing.assert_close(found, right, rtol=1e-6, atol=0)
    logits = {"a": bank.logits[0], "b": bank.logits[1]}
    shapes = {name: s.shape for name, s in logits.items()}
    kept = Kept(shapes, Weight(), torch.device("cpu"))
    seen: list[Reading] = []

    class Reads(GradBalance):
        def update(self, state: State, reading: Reading) -> tuple[Tensor, State]:
            seen.append(reading)
            return super().update(state, reading)

    control = Reads()
    grads = [g.clone() for g in bank.grads]
    state = control.init(torch.device("cpu"))
    kept.pulled(control, state, Concrete(), [*logits.values()], grads, 100.0)
    norms = torch.stack([seen[0].task_norm, seen[0].sparsity_norm]).double()
    torch.testing.assert_close(norms, right[::2].sqrt(), rtol=1e-6, atol=0)


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
def test_layers_whose_memory_moves_in_vectors(unit: Unit, interpreted: None) -> None:
    bank = bank_on(DEVICE, GATES["hard-concrete"], unit, WHOLE)
    assert bank.plan.hints.vector == (4 if unit.keep else 8)
    three_steps(bank, exact=True)


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if GPU else [])], ids=str)
def test_half_precision_gates_a_search_in_float32(dtype: torch.dtype, interpreted: None) -> None:
    """w_eff and its gradient have 11 (8) bits, and everything that is kept has 24."""
    bank = bank_on(DEVICE, GATES["concrete"], Unit(), dtype=dtype)
    assert all(s.dtype == torch.float32 for s in (*bank.logits, *bank.m, *bank.v))
    three_steps(bank, exact=True)


@pytest.mark.parametrize("rule", [RULES["gradbalance"], RULES["band"]], ids=["paper", "band"])
@pytest.mark.parametrize("target", [100.0, 700.0], ids=["above", "below"])
def test_adam_is_pytorchs_and_lambda_is_the_papers(
    target: float, rule: Rule, interpreted: None
) -> None:
    """Above the target, and below it, where lambda is 0; with a band, a part of it."""
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
    bank = bank_on("cpu", GATES["concrete"], Unit())
    table, chunks = bank.plan.table, bank.plan.chunks.tolist()
    assert table.shape == (6, COLUMNS)
    for segment, weight in enumerate(bank.weights):
        mine = [(start, stop) for s, start, stop in chunks if s == segment]
        assert mine[0][0] == 0 and mine[-1][1] == math.ceil(weight.numel() / FLAT_BLOCK)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(mine))
    assert bank.plan.groups.tolist() == [[0, len(chunks) // 2], [len(chunks) // 2, len(chunks)]]


def test_few_programs_work_through_many_blocks(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that loops over several blocks adds up what several programs would."""
    monkeypatch.setattr(segments, "_PROGRAMS", 2)
    bank = bank_on(DEVICE, GATES["concrete"], Unit())
    assert len(bank.plan.chunks) <= 6
    three_steps(bank, exact=True)


def test_operators_pass_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "JOINED", 0)
    bank = bank_on("cpu", GATES["concrete"], Unit(), store_factor=True)
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


@pytest.mark.parametrize("unit", [Unit(), Unit(2, 3)], ids=["weight", "block"])
def test_gradients_from_the_layers_end_where_their_logits_lie(
    unit: Unit, interpreted: None
) -> None:
    """A layer's gradient may be contiguous where its logits are channels_last."""
    bank = bank_on(DEVICE, GATES["concrete"], unit, out=[])
    assert not bank.out
    for t in range(2):
        oracle = Oracle(bank, exact=True)
        bank.begin_()
        ds = [randn(*s.shape, seed=10 * t + i).to(DEVICE) for i, s in enumerate(bank.logits)]
        bank.take_([d.clone() for d in ds], list(torch.full((6,), 0.1, device=DEVICE)))
        oracle.taken(ds)
        bank.step_()
        oracle.stepped(bank.rule)


def test_bad_weights_are_refused() -> None:
    for weight in (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 8)[:, ::2]):
        with pytest.raises(ValueError, match="expected dense float32 weights"):
            GateBank(
                [weight], gate=GATES["concrete"], unit=Unit(), start=[0.0], seeds=[0], layers=[0],
                groups=[0], targets=[1.0], rule=RULES["gradbalance"],
            )  # fmt: skip
