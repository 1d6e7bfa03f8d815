"""Controllers by hand, and all kinds of search steps against each other."""

import copy
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers import Blobs, mlp, randn, trained_mlp
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.control import (
    AbstractController,
    FixedPenalty,
    GradBalance,
    Lagrangian,
    Reading,
    State,
)
from sparsecore.convert import batch_statistics
from sparsecore.gates import AbstractGate, Bernoulli, Concrete, HardConcrete
from sparsecore.granularity import NM, Block, Channel, Granularity, Weight
from sparsecore.objectives import OBJECTIVES, Net, Objective, reverse_kl, task
from sparsecore.patterns import Gated
from sparsecore.recipes import build
from sparsecore.search import ConcreteSearch
from sparsecore.search.plain_step import PlainStep
from sparsecore.search.steps import FusedStep, LayerwiseStep, SearchStep


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


def test_a_band_lets_the_average_pull_in_proportion_to_the_excess() -> None:
    rule, zero = GradBalance(band=10), torch.zeros(())
    state, average = rule.init(torch.device("cpu")), 0.0
    cases = [(6, 2, 5, 0.5), (6, 2, -5, 0.0), (8, 2, 10, 1.0), (9, 2, 400, 1.0), (9, 2, 0, 0.0)]
    for t, (task_norm, sparsity_norm, excess, part) in enumerate(cases):
        reading = Reading(*(zero + v for v in (task_norm, sparsity_norm, excess)))
        weight, state = rule.update(state, reading)
        ratio = task_norm / sparsity_norm  # below the target, too
        average = 0.99 * average + 0.01 * ratio if t else ratio
        assert weight.item() == pytest.approx(part * average)
    with pytest.raises(ValueError, match=r"GradBalance band: expected percent, 0 .*, got -1"):
        GradBalance(band=-1)


def test_lagrangian_and_fixed_penalty_by_hand() -> None:
    excess = Reading(torch.ones(()), torch.ones(()), torch.tensor(20.0))
    rule = Lagrangian(lr=0.01)
    weight, state = rule.update(rule.init(torch.device("cpu")), excess)
    assert weight.item() == 0  # used before it ascends
    weight, state = rule.update(state, excess._replace(excess=torch.tensor(-5.0)))
    assert weight.item() == pytest.approx(0.2)
    weight, state = rule.update(state, excess)
    assert weight.item() == pytest.approx(0.15)
    rates, rule = (0.4, 0.04), Lagrangian()
    for rate in rates:
        weight, state = rule.update(state, excess._replace(lr=torch.tensor(rate)))
    assert weight.item() == pytest.approx(0.15 + 0.01 * 20 + 0.004 * 20)
    assert state["weight"].item() == pytest.approx(weight.item() + 0.0004 * 20)
    with pytest.raises(ValueError, match="expected the logits' rate in reading"):
        rule.update(state, excess)
    with pytest.raises(ValueError, match="lagrangian: expected a positive rate, or None, got 0"):
        Lagrangian(lr=0)
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


def lambda_of(step: SearchStep) -> float:
    """What the next step descends under."""
    if isinstance(step, FusedStep):
        return step.bank.control[0, 0].item()
    return step.state["weight"].item()


@pytest.mark.parametrize("kind", [PlainStep, FusedStep, LayerwiseStep])
def test_lagrangian_ascends_at_a_hundredth_of_the_searchs_rate_and_falls_with_it(
    kind: type[SearchStep],
) -> None:
    search = ConcreteSearch(gate=Concrete(), lr=0.4, gain_lr=0.0, start_density=0.5)
    first = []
    for control in (Lagrangian(), FixedPenalty(0.0)):
        model = trained_mlp()
        patterns = gates_for(model, 0.5)
        step = kind(replace(search, control=control), model, patterns, [(0.1, 0)])
        batch = next(Blobs().epoch(0))
        step(batch)
        first.append([s.clone() for s in step.logits()[0].values()])
        if control == FixedPenalty(0.0):
            break
        expected, rate = 0.01 * 0.4 * (100 * 0.5 / 0.1 - 100), 0.4  # targets are exact: no slack
        for _ in range(3):
            assert lambda_of(step) == pytest.approx(expected, rel=1e-4)
            step.drop_lr(0.1)
            rate *= 0.1
            kept = sum(s.sigmoid().sum().item() for s in step.logits()[0].values())
            expected += 0.01 * rate * (100 * kept / (0.1 * 384) - 100)
            step(batch)
    # lambda was 0 in the first step, whatever the excess.
    for ours, free in zip(*first, strict=True):
        torch.testing.assert_close(ours, free, rtol=0, atol=0)


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
