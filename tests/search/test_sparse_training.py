"""Sparse training as a whole: what holds at every step, and runs that are killed, fail or are refused."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import GRANULARITIES, Blobs, mlp, seeded
from masked_nets import ADAMW, SGD, batchnorm_net, masked, same, shapes_of, sparse_mlp
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.granularity import NM, Channel, Granularity
from sparsecore.search import SearchError, sparse_training
from sparsecore.search.dynamic import SET, GradualMagnitude, RigL, random_masks
from sparsecore.search.sparse_training import AbstractSparseTraining, masks_of
from sparsecore.tickets import dense_state
from sparsecore.training import Recipe, Step, evaluate, train

SEARCHES: list[AbstractSparseTraining] = [
    SET(ADAMW, 4),
    RigL(ADAMW, 4, interval=3),
    GradualMagnitude(ADAMW, 4, updates=5),
]
each_search = pytest.mark.parametrize("search", SEARCHES, ids=lambda s: s.name)
each_recipe = pytest.mark.parametrize("recipe", [SGD, ADAMW], ids=lambda r: r.optimizer)


class Diary:
    """Looks at the network before and after every `after_step` of a search."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: list[dict[str, Tensor]] = []  # after every step
        self.rates: list[float] = []
        monkeypatch.setattr(sparse_training, "train", self._train)

    def _train(self, network: nn.Module, *args, after_step, **options):
        self.masks.append(masks_of(network))

        def watched(step: Step) -> None:
            self.pruned_are_zero(step)
            self.rates.append(float(step.optimizer.param_groups[0]["lr"]))
            values = self._tensors(step)
            after_step(step)
            self.pruned_are_zero(step)
            self.masks.append(masks_of(network))
            self.only_what_moved_was_reset(values, self._tensors(step))

        return train(network, *args, after_step=watched, **options)

    def _tensors(self, step: Step) -> dict[str, list[Tensor]]:
        """Each layer's weight and what the optimiser holds for its entries."""
        found = {}
        for name, layer in sc.sparse_layers(step.model).items():
            slots = step.optimizer.state[layer.raw_weight].values()
            held = [v.clone() for v in slots if isinstance(v, Tensor) and v.ndim]
            assert held
            found[name] = [layer.raw_weight.detach().clone(), *held]
        return found

    def pruned_are_zero(self, step: Step) -> None:
        for name, mask in masks_of(step.model).items():
            for value in self._tensors(step)[name]:
                bits = value[~mask].view(torch.int32)
                assert torch.equal(bits, torch.zeros_like(bits)), name  # not even a negative zero

    def only_what_moved_was_reset(self, before: dict, after: dict) -> None:
        for name, mask in self.masks[-1].items():
            stay = mask & self.masks[-2][name]
            for old, new in zip(before[name], after[name], strict=True):
                assert torch.equal(new, old.where(stay, 0))

    @property
    def moved(self) -> list[int]:
        """The steps after which some mask is another."""
        pairs = enumerate(zip(self.masks, self.masks[1:], strict=False), 1)
        return [t for t, (a, b) in pairs if not same(a, b)]


def test_updates_are_counted_from_the_start_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    diary = Diary(monkeypatch)  # epochs of 4 steps: 2 + 4 + 2 of them
    search = RigL(replace(ADAMW, milestones=(0.5,)), 2, start_epoch=1.5, interval=3)
    ticket = search(sparse_mlp(), Blobs(), sparsity=0.8)
    assert len(diary.masks) == 1 + 8 and diary.moved == [3] and ticket.meta["updates"] == 1
    # The recipe's schedule spans all 3.5 epochs.
    assert diary.rates == pytest.approx([0.01] + [0.001] * 7)


def test_a_run_whose_updates_move_nothing_is_plain_training() -> None:
    model, other = batchnorm_net(), batchnorm_net()
    still = RigL(ADAMW, 3, seed=5, interval=2, drop=0.01)  # not one weight of 16
    ticket = still(model, Blobs(), sparsity=0.75)
    masked(other, random_masks(shapes_of(other), 0.75, seed=5))
    train(other, Blobs(), None, ADAMW, stop_epoch=3, total_epochs=3, seed=5)
    assert same(dict(ticket.weights), dense_state(other))
    assert same(dict(ticket.masks), masks_of(other))


@each_search
@each_recipe
def test_what_holds_at_every_step(
    search: AbstractSparseTraining, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, diary, model = replace(search, recipe=recipe), Diary(monkeypatch), batchnorm_net()
    before = copy.deepcopy(model.state_dict())
    ticket = search(model, Blobs(), sparsity=0.75)
    schedule = search.schedule(16, 4)
    # The last ones may be too small to move anything.
    assert set(diary.moved) <= set(schedule) and len(diary.moved) >= 2
    assert ticket.meta["updates"] == len(schedule)
    assert same({n: m.cpu() for n, m in diary.masks[-1].items()}, dict(ticket.masks))
    counts = [[int(mask.sum()) for mask in masks.values()] for masks in diary.masks]
    if isinstance(search, GradualMagnitude):
        kept = [sum(c) for c in counts]
        assert kept[0] == 128
        for t, share in schedule.items():
            assert kept[t] == math.floor((1 - 0.75 * share) * 128 + 1e-6)
        for a, b in zip(diary.masks, diary.masks[1:], strict=False):
            assert all(bool((b[n] <= a[n]).all()) for n in a)
    else:
        assert all(c == counts[0] for c in counts) and sum(counts[0]) == 32
    # The trained network, statistics included; the model is what it was.
    assert same(before, model.state_dict()) and model.training
    assert ticket.finished and ticket.weights["2.num_batches_tracked"] == 16
    assert not torch.equal(ticket.weights["2.running_mean"], before["2.running_mean"])
    for name, mask in ticket.masks.items():
        assert not ticket.weights[f"{name}.weight"][~mask].any()
        assert ticket.weights[f"{name}.weight"][mask].any()


@each_search
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_every_granularity(
    search: AbstractSparseTraining, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = Diary(monkeypatch)
    model = sc.sparsify_(mlp(hidden=25))  # 25 and 12 leave rests of 2 x 3, 4 x 1 and 2:4
    ticket = replace(search, granularity=granularity)(model, Blobs(), sparsity=0.6)
    assert ticket.granularity == granularity and len(diary.moved) >= 2
    largest = max(int(granularity.sizes(m.shape).max()) for m in ticket.masks.values())
    first = {name: int(mask.sum()) for name, mask in diary.masks[0].items()}
    for masks in diary.masks:
        for name, mask in masks.items():
            if not isinstance(search, GradualMagnitude):
                assert first[name] - largest < int(mask.sum()) <= first[name]
            share = granularity.gather(mask.long()) / granularity.sizes(mask.shape)
            assert bool(((share == 0) | (share == 1)).all())
    if isinstance(search, GradualMagnitude):
        assert 160 - largest < sum(int(m.sum()) for m in ticket.masks.values()) <= 160
    if isinstance(granularity, NM):
        for mask in ticket.masks.values():
            groups = F.pad(mask.long(), (0, -mask.shape[1] % 4)).unflatten(1, (-1, 4))
            assert int(groups.sum(-1).max()) <= 2


def test_gradual_pruning_reaches_a_pattern_through_what_it_will_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    diary = Diary(monkeypatch)
    search = GradualMagnitude(ADAMW, 4, updates=5, granularity=NM(2, 4))
    ticket = search(sparse_mlp(), Blobs(), sparsity=0.5)  # all that 2:4 allows
    assert ticket.sparsity == 0.5
    for masks in diary.masks:  # never fewer than two of a group
        assert all(int(m.unflatten(1, (-1, 4)).sum(-1).min()) >= 2 for m in masks.values())
    with pytest.raises(ValueError, match="2:4 allows at most"):
        search(sparse_mlp(), Blobs(), sparsity=0.4)


def test_a_layer_that_is_whole_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sc.sparsify_(mlp(hidden=3))
    diary = Diary(monkeypatch)  # what it drops is all that can grow; nothing is reset
    RigL(ADAMW, 4, interval=3)(model, Blobs(), sparsity=0.1)
    assert all(bool(masks["2"].all()) for masks in diary.masks) and diary.moved


def test_the_last_watched_network_is_the_ticket() -> None:
    model, blobs = sparse_mlp(), Blobs()
    for search in SEARCHES:
        ticket = search(model, blobs, sparsity=0.8, watch=lambda net: evaluate(net, blobs))
        assert [r["epoch"] for r in ticket.meta["progress"]] == [1, 2, 3, 4]
        found = ticket.apply_(copy.deepcopy(model))
        assert evaluate(found, blobs) == ticket.meta["progress"][-1]["accuracy"] > 60
        assert ticket.hash == search(model, blobs, sparsity=0.8).hash  # watched or not
        assert ticket.hash != replace(search, recipe=SGD)(model, blobs, sparsity=0.8).hash


def test_a_rewound_ticket_starts_where_the_model_stands(tmp_path: Path) -> None:
    model, search = sparse_mlp(), GradualMagnitude(ADAMW, 4, updates=5)
    finished = search(model, Blobs(), sparsity=0.8)
    ticket = replace(search, rewind=True)(model, Blobs(), sparsity=0.8)
    assert not ticket.finished and finished.finished and ticket.hash == finished.hash
    assert same(dict(ticket.weights), dict(mlp().state_dict()))
    assert not same(dict(ticket.weights), dict(finished.weights))
    path = tmp_path / "ticket"
    finished.save(path)  # all of its provenance is JSON
    assert sc.Ticket.load(path).meta == finished.meta


def test_rigl_beats_masks_that_stay() -> None:
    recipe = Recipe(optimizer="adam", lr=0.01, batch=64, epochs=5)
    data = sc.load("digits")
    batches, test = sc.Batches(data, "train", 64), sc.Batches(data, "test", 500, shuffle=False)
    for seed in range(2):
        net = seeded(lambda: nn.Sequential(nn.Flatten(), mlp(64, 64, 10)), seed)
        model = sc.sparsify_(net)
        ticket = RigL(recipe, 5, interval=8, seed=seed)(model, batches, sparsity=0.97)
        still = masked(copy.deepcopy(model), random_masks(shapes_of(model), 0.97, seed=seed))
        train(still, batches, None, recipe, seed=seed)
        assert evaluate(ticket.apply_(model), test) > evaluate(still, test) + 20


class Killed(Blobs):
    """A run that ends at a batch."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.at = epoch, batch

    def epoch(self, index: int) -> Iterator[Batch]:
        for i, batch in enumerate(super().epoch(index)):
            if (index, i) == self.at:
                raise KeyboardInterrupt
            yield batch


@each_search
@each_recipe
def test_a_killed_run_goes_on_to_the_same_ticket(
    search: AbstractSparseTraining, recipe: Recipe, tmp_path: Path
) -> None:
    search, checkpoint = replace(search, recipe=recipe), tmp_path / "c"
    model, watch = batchnorm_net(), lambda net: evaluate(net, Blobs())
    before = copy.deepcopy(model.state_dict())
    expected = search(model, Blobs(), sparsity=0.75, watch=watch)
    for kill in ((0, 3), (1, 0), (2, 2), (3, 3)):
        options = {"sparsity": 0.75, "watch": watch, "checkpoint": checkpoint}
        with pytest.raises(KeyboardInterrupt):
            search(model, Killed(*kill), **options)
        assert checkpoint.exists() == (kill[0] > 0) and same(before, model.state_dict())
        ticket = search(model, Blobs(), **options)
        assert ticket.hash == expected.hash and ticket.meta == expected.meta
        assert same(dict(ticket.weights), dict(expected.weights))
        ticket.save(tmp_path / "ticket")
        assert not checkpoint.exists()


@each_search
def test_a_run_that_fails_gives_the_model_back(search: AbstractSparseTraining) -> None:
    model = batchnorm_net()
    before = copy.deepcopy(model.state_dict())
    kinds, values = [type(m) for m in model.modules()], list(model.parameters())
    with pytest.raises(SearchError, match=r"lower lr|check the data"):
        replace(search, recipe=Recipe(lr=1e30, epochs=3))(model, Blobs(), sparsity=0.5)
    assert same(before, model.state_dict()) and kinds == [type(m) for m in model.modules()]
    assert all(a is b for a, b in zip(values, model.parameters(), strict=True))


def test_bad_arguments_are_refused_before_any_training() -> None:
    class Untouched(Blobs):
        def epoch(self, index: int) -> Iterator[Batch]:
            raise AssertionError("training has begun")

    def refused(search: AbstractSparseTraining, model: nn.Module, sparsity: float, match: str):
        with pytest.raises(ValueError, match=match):
            search(model, Untouched(), sparsity=sparsity)

    for search in SEARCHES:
        refused(search, mlp(), 0.5, "sparsify_")
        refused(search, sparse_mlp(), 0.0, "0 < sparsity < 1")
        refused(search, sparse_mlp(), 1.0, "expected 0 <= sparsity < 1")
        planned = masked(sparse_mlp(), random_masks(shapes_of(sparse_mlp()), 0.5))
        refused(search, sc.plan_(planned, "state"), 0.5, "plan_")
        frozen = sparse_mlp()
        frozen[0].raw_weight.requires_grad_(False)
        refused(search, frozen, 0.5, "frozen ones in 0")
    refused(RigL(SGD, 4), sparse_mlp(), 0.5, "at least one update of its masks, got 16 steps")
    refused(SET(SGD, 1), sparse_mlp(), 0.5, "update more often")
    refused(SET(SGD, 4, granularity=Channel()), sparse_mlp(), 0.95, "got none .* in 0")
    refused(SET(SGD, 4, granularity=NM(2, 4)), sparse_mlp(), 0.4, "2:4 allows at most")
