"""Continuous sparsification: its schedules and first step by hand, known supports, and what every search owes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import GRANULARITIES, Blobs, convolutional, mlp, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.control import FixedPenalty, GradBalance
from sparsecore.gates import Annealed
from sparsecore.granularity import NM, Block, Channel, Granularity, Weight
from sparsecore.search.continuous import ContinuousSparsification, _ContinuousEpochs
from sparsecore.training import Recipe, evaluate, train

SGD = Recipe(lr=0.1, momentum=0.0, schedule="cosine")


def accuracy(model: nn.Module) -> float:
    return evaluate(model, Blobs())


def begun(search: ContinuousSparsification, density: float = 0.2) -> _ContinuousEpochs:
    """A search on the MLP, before its first step."""
    return _ContinuousEpochs(search, sc.sparsify_(mlp()), density, Blobs(), None, None)


def logits_of(work: _ContinuousEpochs) -> list[Tensor]:
    return [s.detach().clone() for s in work.step.logits]


def test_the_temperature_rises_exponentially_from_1_to_its_end() -> None:
    search = ContinuousSparsification(final_temperature=81.0)
    found = [search.temperature(i, 5) for i in range(5)]
    assert found == pytest.approx([1, 3, 9, 27, 81])
    assert search.temperature(0, 1) == 1


def test_the_density_aimed_at_falls_exponentially_to_the_tickets() -> None:
    search = ContinuousSparsification(control=GradBalance(slack=1.0), ramp=0.5)
    found = [search.target(0.02, i, 8) for i in range(8)]
    factor = (0.02 / 0.5) ** 0.25
    assert found == pytest.approx([0.5 * factor**i for i in range(4)] + [0.02] * 4)
    assert search.target(0.02, 0, 8) == 0.5
    at_once = replace(search, ramp=0.0, control=GradBalance(slack=1.1))
    assert at_once.target(0.02, 0, 8) == pytest.approx(0.022)
    closed = replace(search, initial=-2.0)
    assert closed.target(0.02, 0, 8) == pytest.approx(1 / (1 + math.exp(2)))


@pytest.mark.parametrize("initial", [-0.3, 0.0, 2.0])
def test_the_first_network_is_the_dense_one(initial: float) -> None:
    seen = []

    class Seen(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(12, 24), Seen(), nn.Linear(24, 4))))
    data = Blobs(count=64)
    ContinuousSparsification(epochs=1, initial=initial)(model, data, sparsity=0.5)
    x, _ = next(data.epoch(0))
    torch.testing.assert_close(seen[0], model[0](x).detach())


@pytest.mark.parametrize("granularity", [Weight(), Block(5, 5), Channel(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_the_penaltys_gradient_is_the_derivative(
    granularity: Granularity, temperature: float
) -> None:
    work, gate = begun(ContinuousSparsification(granularity=granularity)), Annealed(temperature)
    with torch.no_grad():
        for i, s in enumerate(work.step.logits):
            s += 0.5 * randn(*s.shape, seed=i)
    kept, pulls = work.kept.pulls(gate, work.step.logits)
    shapes = [(24, 12), (4, 24)]
    expected = torch.stack(
        [
            granularity.spread(torch.sigmoid(temperature * s), shape).sum()
            for s, shape in zip(work.step.logits, shapes, strict=True)
        ]
    ).sum()
    torch.testing.assert_close(kept, expected.detach())
    torch.testing.assert_close(pulls, list(torch.autograd.grad(expected, work.step.logits)))


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_a_step_by_hand(clip_norm: float | None) -> None:
    """SGD on the weights' gradient alone, Adam on the logits' with lambda times that of the excess."""
    recipe = replace(SGD, weight_decay=0.1, label_smoothing=0.2, clip_norm=clip_norm)
    search = ContinuousSparsification(
        epochs=2,
        final_temperature=9.0,
        initial=-0.4,
        control=FixedPenalty(0.03),
        recipe=recipe,
        lr=0.02,
    )
    work, (x, y) = begun(search), next(Blobs().epoch(0))
    with torch.no_grad():
        for i, s in enumerate(work.step.logits):
            s += 0.5 * randn(*s.shape, seed=i)
    logits = [s.requires_grad_() for s in logits_of(work)]
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    parameters = dict(work.net.named_parameters())
    weights = [parameters[n].detach().clone().requires_grad_() for n in names]
    work.timeline.to(3)
    work.step((x, y))
    loss = work.step.total / len(y)
    # By hand: step 3 of 8, T = 9^(3/7).
    t, open_share = 9 ** (3 / 7), 1 / (1 + math.exp(0.4))
    soft = [torch.sigmoid(t * s) / open_share for s in logits]
    hidden = F.relu(F.linear(x, weights[0] * soft[0], weights[1]))
    scores = F.linear(hidden, weights[2] * soft[1], weights[3])
    expected = F.cross_entropy(scores, y, label_smoothing=0.2)
    excess = 100 * (open_share * sum(z.sum() for z in soft) / (0.2 * 384) - 1)
    torch.testing.assert_close(loss, expected.detach())
    pulled = torch.autograd.grad(expected + 0.03 * excess, logits, retain_graph=True)
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi * 3.5 / 8))
    grads = list(torch.autograd.grad(expected, weights))
    if clip_norm is not None:
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > clip_norm
        grads = [g * clip_norm / norm for g in grads]
    for name, w, grad in zip(names, weights, grads, strict=True):
        moved = (w - rate * (grad + 0.1 * w)).detach()
        torch.testing.assert_close(parameters[name].detach(), moved)
    for s, before, grad in zip(work.step.logits, logits, pulled, strict=True):
        torch.testing.assert_close(s.grad, grad)
        moved = before - 0.02 * grad / (grad.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(s.detach(), moved.detach(), rtol=1e-4, atol=1e-5)


def test_it_finds_the_inputs_that_matter() -> None:
    """Labels depend on 3 of 9 inputs; a linear net of 2 outputs keeps their 6 weights of 18."""

    class Few(Blobs):
        def __init__(self) -> None:
            self.x, self.batch = randn(256, 9, seed=4), 64
            self.y = (self.x[:, [1, 4, 8]] @ torch.tensor([2.0, -1.5, 1.0]) > 0).long()

    for seed in range(3):
        model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(9, 2)), seed))
        search = ContinuousSparsification(epochs=60, recipe=replace(SGD, lr=0.3), lr=0.02)
        ticket = search(model, Few(), sparsity=2 / 3)
        assert int(ticket.masks["0"].sum()) == 6
        assert ticket.masks["0"].any(0).nonzero().flatten().tolist() == [1, 4, 8]


def test_the_ticket_trains_better_than_its_shuffle_and_starts_where_the_model_is() -> None:
    model, data = sc.sparsify_(mlp()), Blobs()
    ticket = ContinuousSparsification(epochs=12)(model, data, sparsity=0.95)
    assert all(torch.equal(ticket.weights[k], v) for k, v in model.state_dict().items())
    assert not ticket.finished and sum(int(m.sum()) for m in ticket.masks.values()) == 19

    def trained(t: sc.Ticket) -> float:
        recipe = Recipe(optimizer="adam", lr=1e-2, epochs=6)
        return train(t.apply_(copy.deepcopy(model)), data, data, recipe).accuracy

    assert trained(ticket) > 90
    assert trained(ticket) > max(trained(ticket.shuffled(seed)) for seed in range(3)) + 10


@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_the_natural_sparsity_is_near_the_one_asked_for(sparsity: float) -> None:
    search = ContinuousSparsification(epochs=20)
    ticket = search(sc.sparsify_(mlp()), Blobs(), sparsity=sparsity)
    natural = ticket.meta["natural_sparsity"]
    assert ticket.scores is not None
    kept = sum(int((s > 0).sum()) for s in ticket.scores.values())
    assert natural == pytest.approx(1 - kept / 384)
    assert 0.5 < (1 - natural) / (1 - sparsity) < 1.6


def test_without_a_penalty_little_is_removed() -> None:
    search = ContinuousSparsification(epochs=3, control=FixedPenalty(0.0), initial=0.3)
    ticket = search(sc.sparsify_(mlp()), Blobs(), sparsity=0.9)
    assert ticket.meta["natural_sparsity"] < 0.3
    assert ticket.sparsity == pytest.approx(0.9, abs=1 / 384)


@pytest.mark.parametrize("granularity", [*GRANULARITIES, Block(5, 5)], ids=str)
def test_every_granularity(granularity: Granularity) -> None:
    model, data = sc.sparsify_(mlp()), Blobs()
    ticket = ContinuousSparsification(epochs=3, granularity=granularity)(model, data, sparsity=0.75)
    kept = sum(int(m.sum()) for m in ticket.masks.values())
    largest = max(int(granularity.sizes(m.shape).max()) for m in ticket.masks.values())
    assert 96 - largest < kept <= 96
    for mask in ticket.masks.values():  # the mask is constant over each unit
        share = granularity.gather(mask.long()) / granularity.sizes(mask.shape)
        assert bool(((share == 0) | (share == 1)).all())
        if isinstance(granularity, NM):
            assert int(mask.unflatten(1, (-1, 4)).sum(-1).max()) <= 2
    assert ticket.scores is not None
    opened = sum(
        float(((s > 0) * granularity.sizes(ticket.masks[name].shape)).sum())
        for name, s in ticket.scores.items()
    )
    assert ticket.meta["natural_sparsity"] == pytest.approx(1 - opened / 384)


def test_under_n_to_m_the_forbidden_learn_too() -> None:
    """All logits start equal: the first of each group would be the only ones that ever moved."""
    work = begun(ContinuousSparsification(granularity=NM(1, 4), control=FixedPenalty(0.0)))
    work.step(next(Blobs().epoch(0)))
    assert (work.step.logits[-1] != 0).float().mean() > 0.9


def test_the_soft_network_is_watched_and_that_changes_nothing() -> None:
    model, data, seen = sc.sparsify_(convolutional()), Blobs(), []

    def watch(net: nn.Sequential) -> float:
        seen.append((net[1].raw_weight.detach().clone(), accuracy(net)))
        return seen[-1][1]

    search = ContinuousSparsification(epochs=3)
    ticket = search(model, data, sparsity=0.6, watch=watch)
    records = ticket.meta["progress"]
    assert [(r["epoch"], r["accuracy"]) for r in records] == [
        (i + 1, found) for i, (_, found) in enumerate(seen)
    ]
    assert records[-1]["accuracy"] > 90
    assert not torch.equal(seen[0][0], seen[2][0])  # weights train
    blind = search(model, data, sparsity=0.6)
    assert blind.hash == ticket.hash
    assert all("accuracy" not in r for r in blind.meta["progress"])


def test_bf16_comes_to_nearly_the_same() -> None:
    model, data = sc.sparsify_(mlp()), Blobs()
    losses = []
    for amp in (None, "bf16"):
        search = ContinuousSparsification(epochs=3, recipe=replace(SGD, amp=amp))
        records = search(model, data, sparsity=0.6).meta["progress"]
        losses.append([r["objective"] for r in records])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"final_temperature": 0.5},
        {"final_temperature": math.nan},
        {"initial": math.inf},
        {"ramp": 1.5},
        {"ramp": -0.1},
        {"lr": 0.0},
        {"recipe": Recipe(amp="fp16")},
    ],
    ids=str,
)
def test_bad_fields_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        ContinuousSparsification(**bad)
