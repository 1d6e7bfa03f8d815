"""Searches on small problems: known answers, laws, and a search that is killed and goes on."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from helpers import Blobs, mlp, rand, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.control import (
    CONTROLS,
    AbstractController,
    FixedPenalty,
    GradBalance,
    Lagrangian,
    Reading,
    State,
)
from sparsecore.convert import batch_statistics
from sparsecore.gates import AbstractGate, Bernoulli, Concrete, Gaussian, HardConcrete
from sparsecore.granularity import NM, Block, Channel, Granularity, Weight
from sparsecore.objectives import OBJECTIVES, Net, Objective, reverse_kl, task
from sparsecore.patterns import Gated
from sparsecore.recipes import build
from sparsecore.scores import random
from sparsecore.search import ConcreteSearch, OneShot, SearchError
from sparsecore.search.steps import FusedStep, LayerwiseStep, PlainStep, SearchStep


def trained_mlp(epochs: int = 5) -> nn.Module:
    """A sparse-capable MLP that has seen a little of the blobs."""
    model, blobs = sc.sparsify_(mlp()), Blobs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        for x, y in blobs.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module) -> float:
    blobs = Blobs()
    return (model(blobs.x).argmax(1) == blobs.y).float().mean().item()


def gated_net(model: nn.Module, gate: AbstractGate | None = None) -> Net:
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        shape = layer.raw_weight.shape
        layer.pattern = Gated(shape, gate or Concrete(), density=0.5, layer=i)
    return Net(model)


def test_cts_beats_random_and_its_own_shuffle_and_leaves_the_model_alone() -> None:
    model = trained_mlp()
    before = copy.deepcopy(model.state_dict())
    required = [p.requires_grad for p in model.parameters()]
    ticket = ConcreteSearch(epochs=40)(model, Blobs(), sparsity=0.9)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert model.training and list(model.state_dict()) == list(before)
    # d = 12 * 24 + 24 * 4 = 384, exactly floor(38.4) kept
    assert sum(int(m.sum()) for m in ticket.masks.values()) == 38

    def sparse_accuracy(t: sc.Ticket) -> float:
        return accuracy(t.apply_(copy.deepcopy(model)))

    noise = OneShot(random)(model, Blobs(), sparsity=0.9)
    shuffled = [sparse_accuracy(ticket.shuffled(seed)) for seed in range(3)]
    assert sparse_accuracy(ticket) > 0.9
    assert sparse_accuracy(ticket) > max(*shuffled, sparse_accuracy(noise)) + 0.1


def test_cts_depends_on_its_seed_and_on_nothing_else() -> None:
    model = trained_mlp()
    search = ConcreteSearch(epochs=3)
    first = search(model, Blobs(), sparsity=0.8)
    assert first.hash == search(model, Blobs(), sparsity=0.8).hash
    assert first.hash != replace(search, seed=1)(model, Blobs(), sparsity=0.8).hash


@pytest.mark.parametrize("granularity", [Weight(), Block(4, 4), Channel(), NM(1, 4)], ids=str)
@pytest.mark.parametrize("gate", [Concrete(), HardConcrete(), Gaussian()], ids=repr)
def test_cts_at_every_granularity(granularity: Granularity, gate: AbstractGate) -> None:
    model = trained_mlp(1)
    search = ConcreteSearch(epochs=2, gate=gate, granularity=granularity)
    ticket = search(model, Blobs(), sparsity=0.75)
    kept = sum(int(m.sum()) for m in ticket.masks.values())
    largest = max(int(granularity.sizes(m.shape).max()) for m in ticket.masks.values())
    assert 96 - largest < kept <= 96
    for mask in ticket.masks.values():  # the mask is constant over each unit
        share = granularity.gather(mask.long()) / granularity.sizes(mask.shape)
        assert bool(((share == 0) | (share == 1)).all())
        if isinstance(granularity, NM):
            assert int(mask.unflatten(1, (-1, 4)).sum(-1).max()) <= 1


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
@pytest.mark.parametrize("control", CONTROLS.values(), ids=list(CONTROLS))
def test_every_objective_with_every_control(objective: Objective, control: type) -> None:
    model = trained_mlp(1)
    search = ConcreteSearch(epochs=2, objective=objective, control=control())
    ticket = search(model, Blobs(), sparsity=0.8)
    assert ticket.sparsity == pytest.approx(0.8, abs=0.01)
    assert len(set(ticket.meta["objective_by_epoch"])) == 2  # it moves


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_objective_gradients_against_finite_differences(objective: Objective) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double())
    net = gated_net(sc.sparsify_(model))
    model.double()
    x, y = randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    logits = [g.pattern.logits for g in net.layers.values()]
    noise = [0.2 + 0.6 * rand(*p.shape, seed=i, dtype=torch.float64) for i, p in enumerate(logits)]

    class Fixed(nn.Module):
        """A gate pattern with its noise held, so that the objective is a plain function."""

        def __init__(self, gated: Gated, u: Tensor) -> None:
            super().__init__()
            self.gated, self.u = gated, u

        def forward(self, weight: Tensor) -> Tensor:
            g = self.gated
            if g.open:
                return weight
            return sc.gated_weight(weight, g.logits, self.u, g.gate, g.granularity)

    class FixedNet(Net):
        @contextmanager
        def opened(self) -> Iterator[None]:
            for layer in self.layers.values():
                layer.pattern.gated.open = True
            yield
            for layer in self.layers.values():
                layer.pattern.gated.open = False

    for layer, u in zip(net.layers.values(), noise, strict=True):
        layer.pattern = Fixed(layer.pattern, u)
    fixed = FixedNet(model)
    grads = torch.autograd.grad(objective(fixed, (x, y)), logits)
    step = 1e-5
    for p, g in zip(logits, grads, strict=True):
        values = []
        for change in (step, -2 * step):
            p.data[1, 2] += change
            values.append(objective(fixed, (x, y)).item())
        p.data[1, 2] += step
        expected = (values[0] - values[1]) / (2 * step)
        assert g[1, 2].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_reverse_kl_by_hand() -> None:
    net = gated_net(trained_mlp(1))
    x, y = next(Blobs().epoch(0))
    p, q = net.sparse(x).softmax(-1), net.dense(x).softmax(-1)
    expected = 100 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(reverse_kl(net, (x, y)), expected, rtol=1e-4, atol=1e-4)
    backward = 100 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(
        OBJECTIVES["forward-kl"](net, (x, y)), backward, rtol=1e-4, atol=1e-4
    )


def test_gradbalance_by_hand() -> None:
    rule, zero = GradBalance(), torch.zeros(())
    state = rule.init(torch.device("cpu"))

    def reading(task_norm: float, sparsity_norm: float, excess: float) -> Reading:
        return Reading(*(zero + v for v in (task_norm, sparsity_norm, excess)))

    weight, state = rule.update(state, reading(6, 2, 5))
    assert weight.item() == 3  # the first step takes the ratio itself
    weight, state = rule.update(state, reading(6, 2, -5))
    assert weight.item() == pytest.approx(0.99 * 3)
    weight, state = rule.update(state, reading(8, 2, 1))
    assert weight.item() == pytest.approx(0.99 * 0.99 * 3 + 0.01 * 4)
    weight, _ = rule.update(state, reading(1, 0, 1))
    assert math.isfinite(weight.item())
    assert rule.target(0.01) == pytest.approx(0.011)


def test_lagrangian_and_fixed_penalty_by_hand() -> None:
    excess = Reading(torch.ones(()), torch.ones(()), torch.tensor(20.0))
    rule = Lagrangian(lr=0.01)
    weight, state = rule.update(rule.init(torch.device("cpu")), excess)
    assert weight.item() == pytest.approx(0.2)
    weight, _ = rule.update(state, excess._replace(excess=torch.tensor(-5.0)))
    assert weight.item() == pytest.approx(0.15)
    fixed = FixedPenalty(2.5)
    assert fixed.update(fixed.init(torch.device("cpu")), excess)[0].item() == 2.5


@pytest.mark.parametrize("granularity", [Weight(), Block(5, 5), Channel()], ids=str)
def test_the_analytic_sparsity_gradient_is_the_derivative(granularity: Granularity) -> None:
    model = sc.sparsify_(mlp())
    search, patterns = ConcreteSearch(granularity=granularity), {}
    for i, (name, layer) in enumerate(sc.sparse_layers(model).items()):
        shape = layer.raw_weight.shape
        layer.pattern = patterns[name] = Gated(
            shape, search.gate, granularity, density=0.3, layer=i
        )
    step = PlainStep(search, model, patterns, [(0.3, 0)])
    with torch.no_grad():
        for i, p in enumerate(step.params):
            p += randn(*p.shape, seed=i)
    kept, pulls = step.kept.pulls(search.gate, step.params)
    expected_kept = torch.stack(
        [
            granularity.spread(torch.sigmoid(g.logits), layer.raw_weight.shape).sum()
            for g, layer in zip(patterns.values(), step.net.layers.values(), strict=True)
        ]
    ).sum()
    torch.testing.assert_close(kept, expected_kept.detach())
    expected = torch.autograd.grad(expected_kept, step.params)
    torch.testing.assert_close(pulls, list(expected))


@dataclass(frozen=True)
class Recording(AbstractController):
    """Somebody's own controller: GradBalance that keeps what it reads."""

    readings: list[Reading] = field(default_factory=list)

    def target(self, density: float) -> float:
        return GradBalance().target(density)

    def init(self, device: torch.device) -> State:
        return GradBalance().init(device)

    def update(self, state: State, reading: Reading) -> tuple[Tensor, State]:
        self.readings.append(Reading(*(t.clone() for t in reading)))
        return GradBalance().update(state, reading)


def gates_for(
    model: nn.Module, density: float, gate: AbstractGate | None = None, gain: bool = False
):
    """Patterns by layer name, as a search puts them in."""
    patterns = {}
    for i, (name, layer) in enumerate(sc.sparse_layers(model).items()):
        shape = layer.raw_weight.shape
        layer.pattern = patterns[name] = Gated(
            shape, gate or Concrete(), density=density, layer=i, gain=gain
        )
    return patterns


@pytest.mark.parametrize("kind", [PlainStep, FusedStep])
def test_a_controller_reads_both_norms_and_the_excess(kind: type[SearchStep]) -> None:
    model, control = trained_mlp(), Recording()
    patterns = gates_for(model, 0.1)
    search, batch = ConcreteSearch(control=control, gate=Concrete()), next(Blobs().epoch(0))
    for gated in patterns.values():
        gated.step += 1  # the draw of the first step
    logits = [g.logits for g in patterns.values()]
    found = torch.autograd.grad(search.objective(Net(model), batch), logits)
    for gated in patterns.values():
        gated.step -= 1
    kind(search, model, patterns, [(0.1, 0)])(batch)
    weights, target = 384, 1.1 * 0.1 * 384
    reading = control.readings[0]
    assert reading.excess.item() == pytest.approx(100 * (0.1 * weights / target - 1), rel=1e-4)
    norm = 100 / target * 0.1 * 0.9 * math.sqrt(weights)
    assert reading.sparsity_norm.item() == pytest.approx(norm, rel=1e-4)
    norm = torch.cat([g.flatten() for g in found]).norm().item()
    assert reading.task_norm.item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    "control", [GradBalance(), Lagrangian(), FixedPenalty(2.0), Recording()], ids=lambda c: type(c).__name__
)  # fmt: skip
@pytest.mark.parametrize("granularity", [Weight(), Block(5, 5), NM(2, 4)], ids=str)
@pytest.mark.parametrize(
    "gate", [Concrete(), HardConcrete(), Bernoulli()], ids=lambda g: type(g).__name__
)
def test_the_fused_step_is_the_plain_one(
    gate: AbstractGate, granularity: Granularity, control: AbstractController
) -> None:
    """The same logits, gains and objective after a few epochs of each."""
    search = ConcreteSearch(control=control, gate=gate, granularity=granularity)
    results = []
    for kind in (PlainStep, FusedStep, LayerwiseStep):
        model = trained_mlp(1)
        patterns = {}
        for i, (name, layer) in enumerate(sc.sparse_layers(model).items()):
            layer.pattern = patterns[name] = Gated(
                layer.raw_weight.shape, gate, granularity, density=0.4, layer=i, gain=True
            )
        step = kind(search, model, patterns, [(0.4, 0)])
        with torch.no_grad():  # away from the target, where the penalty's sign would be rounding's
            for i, gated in enumerate(patterns.values()):
                gated.logits += 0.5 + 0.3 * randn(*gated.logits.shape, seed=i)
        for epoch in range(3):
            step.begin_epoch(None)
            for batch in Blobs().epoch(epoch):
                step(batch)
        if isinstance(step, PlainStep):
            gains = torch.stack([g.log_gain.detach() for g in patterns.values()])
        else:
            gains = step.bank.log_gain[0]
        results.append([*step.logits()[0].values(), gains, step.total])
    for plain, fused, skipping in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(skipping, plain, rtol=2e-3, atol=2e-4)


def test_layers_that_draw_by_themselves_find_the_same_ticket() -> None:
    model, blobs = trained_mlp(1), Blobs()
    search = ConcreteSearch(epochs=2, gate=HardConcrete(), granularity=Block(4, 3))
    together, apart = (
        replace(search, layerwise=flag)(model, blobs, sparsity=0.6) for flag in (False, True)
    )
    assert together.hash == apart.hash
    assert apart.meta["objective_by_epoch"] == pytest.approx(
        together.meta["objective_by_epoch"], rel=1e-3
    )


def test_many_searches_at_once_are_as_many_one_by_one() -> None:
    model, blobs = trained_mlp(1), Blobs()
    search = ConcreteSearch(epochs=3)
    sparsities, seeds = [0.5, 0.9, 0.9], [0, 0, 7]
    tickets = search.many(model, blobs, sparsities=sparsities, seeds=seeds)
    for ticket, sparsity, seed in zip(tickets, sparsities, seeds, strict=True):
        alone = replace(search, seed=seed)(model, blobs, sparsity=sparsity)
        assert ticket.meta["sparsity"] == sparsity and ticket.meta["seed"] == seed
        assert ticket.meta["objective_by_epoch"] == pytest.approx(
            alone.meta["objective_by_epoch"], rel=1e-3
        )
        same = [(ticket.masks[n] == alone.masks[n]).double().mean() for n in alone.masks]
        assert min(same) > 0.98
    assert tickets[1].hash != tickets[2].hash
    with pytest.raises(ValueError, match="as many seeds as sparsities"):
        search.many(model, blobs, sparsities=[0.5], seeds=[1, 2])
    with pytest.raises(ValueError, match="search one by one"):
        replace(search, objective=OBJECTIVES["features"]).many(model, blobs, sparsities=[0.5, 0.6])


def test_many_searches_go_through_convolutions_and_batchnorm() -> None:
    data = sc.load("digits")
    model = sc.sparsify_(build("resnet-20", data.shape, data.classes))
    batches = sc.Batches(data, "train", 500)
    search = ConcreteSearch(epochs=1, objective=task)
    for ticket in search.many(model, batches, sparsities=[0.5, 0.8]):
        alone = search(model, batches, sparsity=ticket.meta["sparsity"])
        same = torch.cat([(ticket.masks[n] == alone.masks[n]).flatten() for n in alone.masks])
        assert same.double().mean() > 0.97


def test_gradbalance_holds_the_density_near_its_target() -> None:
    model = trained_mlp()
    patterns = gates_for(model, 0.1)
    step = FusedStep(ConcreteSearch(gate=Concrete()), model, patterns, [(0.1, 0)])
    with batch_statistics(model):
        for epoch in range(40):
            for batch in Blobs().epoch(epoch):
                step(batch)
    kept = step.bank.sums()[0, 1].item()
    assert 0.05 * 384 < kept < 0.2 * 384


def test_a_killed_search_goes_on_to_the_same_ticket(tmp_path: Path) -> None:
    model, blobs = trained_mlp(), Blobs()
    search, checkpoint = ConcreteSearch(epochs=6), tmp_path / "search.safetensors"
    expected = search(model, blobs, sparsity=0.9)

    class Killed(Blobs):
        def epoch(self, index: int):
            if index == 4:
                raise KeyboardInterrupt
            return super().epoch(index)

    with pytest.raises(KeyboardInterrupt):
        search(model, Killed(), sparsity=0.9, checkpoint=checkpoint)
    assert checkpoint.exists()
    with pytest.raises(SearchError, match="belongs to another search"):
        search(model, blobs, sparsity=0.8, checkpoint=checkpoint)
    with pytest.raises(SearchError, match="belongs to another search"):
        search(trained_mlp(1), blobs, sparsity=0.9, checkpoint=checkpoint)  # other start weights
    with pytest.raises(SearchError, match="belongs to another search"):
        search(model, Blobs(batch=32), sparsity=0.9, checkpoint=checkpoint)  # other batches
    ticket = search(model, blobs, sparsity=0.9, checkpoint=checkpoint)
    assert ticket.hash == expected.hash
    assert ticket.meta == expected.meta
    assert not checkpoint.exists()


def test_the_rates_drop_once_and_at_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    descend = FusedStep.descend

    def watched(self: FusedStep, batch: Batch) -> Tensor:
        rates.append(self.bank.lr.tolist())
        return descend(self, batch)

    monkeypatch.setattr(FusedStep, "descend", watched)
    ConcreteSearch(epochs=4, lr_drop_at=0.6)(trained_mlp(), Blobs(), sparsity=0.9)  # 16 steps
    assert [r for pair in rates[:9] for r in pair] == pytest.approx([0.1, 0.01] * 9)
    assert [r for pair in rates[9:] for r in pair] == pytest.approx([0.01, 0.001] * 7)


def test_a_pattern_too_small_for_the_ticket_is_told_before_the_search() -> None:
    class Untouched(Blobs):
        def epoch(self, index: int) -> Iterator[Batch]:
            raise AssertionError("the search has begun")

    with pytest.raises(ValueError, match="2:4 allows at most"):
        ConcreteSearch(granularity=NM(2, 4))(trained_mlp(), Untouched(), sparsity=0.3)


def test_a_search_that_fails_gives_the_model_back() -> None:
    model = trained_mlp(1)
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    broken = Objective("broken", lambda net, batch: net.sparse(batch[0]).sum() * float("nan"))
    with pytest.raises(SearchError, match="broken is not finite"):
        ConcreteSearch(epochs=1, objective=broken)(model, Blobs(), sparsity=0.5)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_gains_move_and_the_teacher_has_none() -> None:
    model = trained_mlp(1)
    dense, seen = sc.densify_(copy.deepcopy(model)), []

    def watch(net: Net, batch: Batch) -> Tensor:
        assert torch.equal(net.dense(batch[0]), dense(batch[0]))
        seen.append([layer.pattern.log_gain for layer in net.layers.values()])
        seen[-1] = [None if g is None else g.item() for g in seen[-1]]
        return reverse_kl(net, batch)

    watched = Objective("watched", watch)
    ConcreteSearch(epochs=1, objective=watched)(model, Blobs(), sparsity=0.9)
    assert seen[0] == [0, 0]
    assert all(gain > 0 for gain in seen[-1])  # a tenth of the weights: the rest must speak up
    seen.clear()
    ConcreteSearch(epochs=1, objective=watched, gain_lr=0)(model, Blobs(), sparsity=0.9)
    assert seen[-1] == [None, None]


def test_the_teacher_sees_a_sample_once_and_says_the_same_ever_after() -> None:
    model, batches = trained_mlp(1), Blobs()
    dense = sc.densify_(copy.deepcopy(model))
    forwards = []

    def watch(net: Net, batch: Batch) -> Tensor:
        forwards.append(len(batch[1]))
        torch.testing.assert_close(net.teacher(batch[0]), dense(batch[0]))
        return reverse_kl(net, batch)

    search = ConcreteSearch(epochs=3, objective=Objective("watched", watch))
    model.register_forward_pre_hook(lambda module, args: forwards.append(-1))
    search(model, batches, sparsity=0.5)
    # In the first epoch: watched, dense, sparse, and dense again for the objective; then sparse alone.
    assert len(forwards) == 4 * (1 + 3) + 8 * (1 + 1)

    class Anonymous:
        """Samples without numbers: nothing can be remembered."""

        def __len__(self) -> int:
            return len(batches)

        def epoch(self, index: int) -> Iterator[Batch]:
            return batches.epoch(index)

    forwards.clear()
    search(model, Anonymous(), sparsity=0.5)
    assert len(forwards) == 12 * (1 + 3)


def test_search_works_through_batchnorm_and_convolutions() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)),
            nn.Conv2d(3, 8, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    )
    sc.sparsify_(model)
    before = copy.deepcopy(model.state_dict())

    def watch(net: Net, batch: Batch) -> Tensor:
        assert net.memory is None  # a sample's scores depend on its batch
        return task(net, batch)

    search = ConcreteSearch(epochs=2, objective=Objective("watched", watch))
    ticket = search(model, Blobs(), sparsity=0.5)
    assert set(ticket.masks) == {"1", "5"}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_the_unit_interval_is_refused(sparsity: float) -> None:
    for search in (ConcreteSearch(epochs=1), OneShot(random)):
        with pytest.raises(ValueError, match="expected 0 <= sparsity < 1"):
            search(sc.sparsify_(mlp()), Blobs(), sparsity=sparsity)


def test_bad_arguments_name_the_mend() -> None:
    with pytest.raises(ValueError, match="sparsify_"):
        OneShot(random)(mlp(), Blobs(), sparsity=0.5)
    with pytest.raises(ValueError, match="0 < sparsity"):
        ConcreteSearch()(sc.sparsify_(mlp()), Blobs(), sparsity=0)
    with pytest.raises(ValueError, match="at least 1"):
        ConcreteSearch(epochs=0)
    with pytest.raises(ValueError, match="allows at most"):
        OneShot(random, NM(1, 4))(sc.sparsify_(mlp()), Blobs(), sparsity=0.5)
    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(12, 4))))
    with pytest.raises(ValueError, match="no activation module"):
        ConcreteSearch(epochs=1, objective=OBJECTIVES["features"])(model, Blobs(), sparsity=0.5)
