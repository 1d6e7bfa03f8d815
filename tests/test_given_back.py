"""After a search a model is what it was, whatever its forward counts, its loss draws or its modules are called; and its
ticket fits a model of the same kind.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from threading import Lock

import numpy as np
import pytest
import torch
from helpers import Blobs, equal, mlp, seeded
from test_threads import ADAM, SEARCHES
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc

each_search = pytest.mark.parametrize("name", SEARCHES)


class Counting(nn.Module):
    """A block under two names, and buffers that a forward changes in place and anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.again = self.first
        self.last = nn.Linear(12, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.last(self.again(self.first(x)))


def network() -> nn.Module:
    return sc.sparsify_(seeded(Counting))


@each_search
def test_buffers_that_a_forward_counts_are_put_back(name: str) -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    held = dict(model.named_buffers())
    ticket = SEARCHES[name](model, Blobs(), sparsity=0.5)
    assert equal(before, dict(model.state_dict()))
    assert all(b is held[k] for k, b in model.named_buffers())
    if not ticket.finished:
        assert ticket.weights["seen"] == 0 or name in (
            "ltr",
            "edge-popup",
        )  # of a network that was trained


@each_search
def test_a_module_under_two_names_has_a_ticket_that_fits(name: str, tmp_path) -> None:
    ticket = SEARCHES[name](network(), Blobs(), sparsity=0.5)
    ticket.save(tmp_path / "t")
    found, other = sc.Ticket.load(tmp_path / "t"), sc.sparsify_(seeded(Counting, 1))
    found.apply_(other)
    x, own = Blobs().x, ticket.apply_(network())
    assert torch.equal(own.eval()(x), other.eval()(x))
    state = other.state_dict()
    for key, value in state.items():
        if key.startswith("first."):
            assert torch.equal(value, state[key.replace("first", "again", 1)]), key


def drawing(output: Tensor, target: Tensor) -> Tensor:
    noise = torch.randn_like(output) * random.random() * float(np.random.rand())
    return F.cross_entropy(output + noise, target)


def generators() -> list:
    _, keys, place, *_ = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), list(keys), place]  # type: ignore[arg-type]


def test_training_under_a_loss_that_draws_leaves_generators_alone() -> None:
    runs = []
    for _ in range(2):
        model = sc.sparsify_(seeded(lambda: nn.Linear(12, 4)))
        state = generators()
        runs.append(sc.train(model, Blobs(), Blobs(), ADAM, stop_epoch=2, loss=drawing).epochs)
        assert generators() == state
    first, again = ([r | {"seconds": 0} for r in run] for run in runs)
    assert first == again


class Locked(nn.Sequential):
    """Which no deepcopy copies."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        self.lock = Lock()


@each_search
def test_a_model_that_cannot_be_copied_is_searched_or_refused_by_name(name: str) -> None:
    model = sc.sparsify_(seeded(Locked))
    try:
        assert SEARCHES[name](model, Blobs(), sparsity=0.5).sparsity > 0.4
    except ValueError as error:
        assert "its attribute lock that it cannot (cannot pickle" in str(error)


def test_training_an_average_of_a_model_that_cannot_be_copied_is_refused() -> None:
    recipe = replace(ADAM, ema=0.9)
    with pytest.raises(ValueError, match="attribute lock"):
        sc.train(sc.sparsify_(seeded(Locked)), Blobs(), None, recipe)


@each_search
def test_another_default_dtype_changes_no_ticket(name: str) -> None:
    def found() -> str:
        return SEARCHES[name](model, Blobs(), sparsity=0.5).hash

    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)))
    )
    expected = found()
    torch.set_default_dtype(torch.float64)
    try:
        assert found() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_default_dtype_changes_no_batch() -> None:
    data = sc.load("digits")
    first = next(iter(sc.Batches(data, "train", 32, augment=True)))
    torch.set_default_dtype(torch.float64)
    try:
        again = next(iter(sc.Batches(data, "train", 32, augment=True)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first[0], again[0]) and again[0].dtype == torch.float32


@each_search
def test_lazy_parameters_are_refused_by_name(name: str) -> None:
    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.LazyLinear(4))), "0")
    with pytest.raises(ValueError, match=r"lazy ones \(1.weight, 1.bias\); run the model once"):
        SEARCHES[name](model, Blobs(), sparsity=0.5)


def test_statistics_that_cannot_be_measured_stay() -> None:
    class Broken(Blobs):
        def epoch(self, index: int) -> Iterator:
            yield from islice(super().epoch(index), 2)
            raise OSError("the disk is gone")

    model = network()
    before = {k: v.clone() for k, v in model.first.state_dict().items()}  # type: ignore[union-attr]
    with pytest.raises(OSError, match="gone"):
        sc.recompute_statistics_(model, Broken())
    assert equal(before, dict(model.first.state_dict()))  # type: ignore[union-attr]


WATCHED = [name for name in SEARCHES if name not in ("random", "magnitude", "snip", "grasp")]


@pytest.mark.parametrize("name", WATCHED)
def test_a_watch_looks_at_the_model_and_changes_copies(name: str) -> None:
    def change(network: nn.Module) -> float:
        sc.evaluate(network, Blobs())
        for other in (copy.deepcopy(network), sc.sparsify_(seeded(mlp))):
            sc.densify_(other)
        for attempt in (sc.densify_, first.apply_, lambda m: sc.recompute_statistics_(m, Blobs())):
            for model in (network, own):
                with pytest.raises(ValueError, match="expected a model of the watch's own"):
                    attempt(model)
        looked.append(network)
        return 0.0

    looked: list[nn.Module] = []
    own = network()
    first = SEARCHES["magnitude"](own, Blobs(), sparsity=0.5)
    found = SEARCHES[name](own, Blobs(), sparsity=0.7, watch=change)
    assert looked and abs(found.sparsity - 0.7) < 0.01


def as_everybody(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        said = float(model(Blobs().x).square().mean())
    model.train()
    return said


def in_training(model: nn.Module) -> float:
    model.train()
    return float(model(Blobs().x).square().mean() + torch.rand(()) + random.random())


@pytest.mark.parametrize("watch", [as_everybody, in_training])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_watch_changes_no_ticket(name: str, watch) -> None:
    """It may leave the network in training, draw, and move running statistics."""

    def network() -> nn.Module:
        parts = [nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4)]
        return nn.Sequential(*parts)

    def found(**options) -> sc.Ticket:
        return SEARCHES[name](sc.sparsify_(seeded(network)), Blobs(), sparsity=0.5, **options)

    before = torch.get_rng_state(), random.getstate()
    assert found().hash == found(watch=watch).hash
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_watch_changes_no_training() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4))

    def trained(**options) -> dict[str, Tensor]:
        model = seeded(network)
        sc.train(model, Blobs(), None, ADAM, stop_epoch=2, total_epochs=2, **options)
        return dict(model.state_dict())

    assert equal(trained(), trained(watch=in_training))
