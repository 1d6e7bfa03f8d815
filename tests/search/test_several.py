"""Several searches of one model: side by side only where that is no slower, and in turn the tickets of each alone."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Blobs, mlp, trained_mlp
from torch import Tensor

import sparsecore as sc
from sparsecore.convert import sparse_layers
from sparsecore.recipes import build
from sparsecore.search import ConcreteSearch, SearchError, concrete
from sparsecore.search.several import worth_stacking

SPARSITIES, SEEDS = [0.5, 0.9, 0.9], [0, 0, 7]


@pytest.fixture
def no_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concrete, "worth_stacking", lambda *_: False)


def test_on_a_gpu_only_matrices_are_stacked() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    linear = sparse_layers(sc.sparsify_(mlp())).values()
    mixed = sparse_layers(sc.sparsify_(build("conv-4", (3, 32, 32), 10))).values()
    assert worth_stacking(cuda, linear) and not worth_stacking(cuda, mixed)
    assert worth_stacking(cpu, linear) and worth_stacking(cpu, mixed)


@pytest.mark.usefixtures("no_stacks")
def test_searches_in_turn_are_those_of_each_alone() -> None:
    model, search = trained_mlp(1), ConcreteSearch(epochs=2)
    with pytest.warns(UserWarning, match="3 searches run in turn"):
        tickets = search.many(model, Blobs(), sparsities=SPARSITIES, seeds=SEEDS)
    for ticket, sparsity, seed in zip(tickets, SPARSITIES, SEEDS, strict=True):
        alone = replace(search, seed=seed)(model, Blobs(), sparsity=sparsity)
        assert ticket.hash == alone.hash
        assert ticket.meta == alone.meta | {"many": "in turn"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (one,) = search.many(model, Blobs(), sparsities=[0.5])  # is no turn
    assert one.hash == tickets[0].hash and "many" not in one.meta


class Dying(Blobs):
    """Is interrupted as one more epoch begins than it has left."""

    left = 0

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().epoch(index)


@pytest.mark.usefixtures("no_stacks")
@pytest.mark.filterwarnings("ignore:many")
@pytest.mark.parametrize("removed", [0, 1, 2, 5])
def test_killed_as_it_tidies_up_it_goes_on(
    removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, search, path = trained_mlp(1), ConcreteSearch(epochs=1), tmp_path / "checkpoint"
    options = {"sparsities": SPARSITIES, "seeds": SEEDS, "checkpoint": path}
    unlink, left = Path.unlink, [removed]

    def dying(self: Path, missing_ok: bool = False) -> None:
        if not self.name.endswith("-lock"):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        unlink(self, missing_ok)

    def saved() -> list[sc.Ticket]:
        found = search.many(model, Blobs(), **options)
        for i, ticket in enumerate(found):
            assert path.exists()  # until the last one is safe
            ticket.save(tmp_path / f"ticket-{i}")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            saved()
    expected = search.many(model, Blobs(), sparsities=SPARSITIES, seeds=SEEDS)
    found = saved()
    assert [t.hash for t in found] == [t.hash for t in expected]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"ticket-{i}" for i in range(len(found))]


@pytest.mark.usefixtures("no_stacks")
@pytest.mark.filterwarnings("ignore:many")
@pytest.mark.parametrize("left", [3, 5, 6, 8, 9])
def test_killed_between_and_inside_searches_they_go_on(left: int, tmp_path: Path) -> None:
    model, search, path = trained_mlp(1), ConcreteSearch(epochs=2), tmp_path / "checkpoint"
    expected = search.many(model, Blobs(), sparsities=SPARSITIES, seeds=SEEDS)
    dying = Dying()
    dying.left = left
    with pytest.raises(KeyboardInterrupt):
        search.many(model, dying, sparsities=SPARSITIES, seeds=SEEDS, checkpoint=path)
    assert list(tmp_path.iterdir())
    if path.exists():  # a search is behind it
        with pytest.raises(SearchError, match="belongs to another search"):
            search.many(model, Blobs(), sparsities=SPARSITIES, checkpoint=path)
    again = Dying()
    again.left = 12 - left  # 10 in all, and the first batch twice to know the data by
    found = search.many(model, again, sparsities=SPARSITIES, seeds=SEEDS, checkpoint=path)
    assert [t.hash for t in found] == [t.hash for t in expected]
    assert [t.meta for t in found] == [t.meta for t in expected]
    for ticket in found:
        ticket.save(tmp_path / "ticket")
    assert [p.name for p in tmp_path.iterdir()] == ["ticket"]
