"""Concrete Ticket Search on small problems: what it finds, a kill, bad arguments."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import Blobs, accuracy, mlp, seeded, trained_mlp
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.gates import AbstractGate, Concrete, Gaussian, HardConcrete
from sparsecore.granularity import NM, Block, Channel, Granularity, Weight
from sparsecore.objectives import OBJECTIVES, Net, Objective, task
from sparsecore.scores import random
from sparsecore.search import ConcreteSearch, OneShot, SearchError
from sparsecore.search.steps import FusedStep


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


def test_a_search_that_fails_gives_the_model_back() -> None:
    model = trained_mlp(1)
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    broken = Objective("broken", lambda net, batch: net.sparse(batch[0]).sum() * float("nan"))
    with pytest.raises(SearchError, match="broken is not finite"):
        ConcreteSearch(epochs=1, objective=broken)(model, Blobs(), sparsity=0.5)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


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
