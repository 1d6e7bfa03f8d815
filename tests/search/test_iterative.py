"""Pruning in rounds: against plain loops, killed and resumed, and without layers that collapse."""

import copy
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torchvision
from helpers import GRANULARITIES, Blobs, mlp, randn, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.granularity import NM, Block, Channel, Granularity
from sparsecore.models import resnet_20, vit_small
from sparsecore.patterns import Masked
from sparsecore.scores import SCORES, Score, grasp, magnitude, random, snip, synflow
from sparsecore.search import OneShot
from sparsecore.search.iterative import Iterative
from sparsecore.sparsities import kept_count, top_k


class Images(Blobs):
    """One batch of two images."""

    def __init__(self, *shape: int) -> None:
        super().__init__(classes=2, count=2)
        self.x = randn(2, *shape)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: layer.pattern.mask.clone() for n, layer in sc.sparse_layers(model).items()}


def watched(search: Iterative, model: nn.Module, sparsity: float) -> tuple[sc.Ticket, list]:
    """The ticket, and the masks after every round."""
    rounds: list[dict[str, Tensor]] = []

    def watch(net: nn.Module) -> float:
        rounds.append(masks_of(net))
        return float(len(rounds))

    ticket = search(model, Blobs(), sparsity=sparsity, watch=watch)
    told = ticket.meta["progress"]
    assert [r["accuracy"] for r in told] == list(range(1, search.rounds + 1))
    assert told[-1]["sparsity"] == ticket.meta["sparsity"]
    return ticket, rounds


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))
def test_one_round_is_one_shot(score: Score, granularity: Granularity) -> None:
    model, blobs = sc.sparsify_(mlp()), Blobs()
    once = Iterative(score, 1, granularity)(model, blobs, sparsity=0.6)
    assert once.hash == OneShot(score, granularity)(model, blobs, sparsity=0.6).hash


@pytest.mark.parametrize("score", [snip, grasp, synflow])
def test_rounds_against_a_plain_loop(score: Score) -> None:
    model, blobs = sc.sparsify_(mlp()), Blobs()
    ticket = Iterative(score, 4)(model, blobs, sparsity=0.9)
    net = copy.deepcopy(model)
    mask = torch.ones(384, dtype=torch.bool)
    for number in range(1, 5):
        values = score(net, blobs.epoch(number - 1), 0)
        flat = torch.cat([v.flatten() for v in values.values()]).masked_fill(~mask, -torch.inf)
        mask = top_k(flat, kept_count(384, 1 - 0.1 ** (number / 4)))
        parts = mask.split([v.numel() for v in values.values()])
        for (name, value), part in zip(values.items(), parts, strict=True):
            net.get_submodule(name).set_mask_(part.view_as(value))
    found = torch.cat([m.flatten() for m in ticket.masks.values()])
    assert torch.equal(found, mask)
    assert ticket.hash != OneShot(score)(model, blobs, sparsity=0.9).hash


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 0.999])
def test_the_schedule_is_exponential_and_nothing_comes_back(sparsity: float) -> None:
    search = Iterative(snip, rounds=7)
    ticket, rounds = watched(search, sc.sparsify_(mlp()), sparsity)
    kept = [sum(int(m.sum()) for m in masks.values()) for masks in rounds]
    shares = [(1 - sparsity) ** (e / 7) for e in range(1, 7)]
    assert kept == [*(kept_count(384, 1 - s) for s in shares), kept_count(384, sparsity)]
    for before, after in pairwise(rounds):
        assert all(bool((before[n] | ~after[n]).all()) for n in before)
    assert all(torch.equal(ticket.masks[n], m) for n, m in rounds[-1].items())


def test_what_fell_earlier_ranks_lower_and_inverting_keeps_it() -> None:
    ticket, rounds = watched(Iterative(synflow, rounds=5), sc.sparsify_(mlp()), 0.9)
    assert ticket.scores is not None
    flat = torch.cat([s.flatten() for s in ticket.scores.values()])
    survived = sum(torch.cat([m.flatten() for m in masks.values()]).int() for masks in rounds)
    for e in range(5):
        assert flat[survived == e].max() < flat[survived == e + 1].min()
    assert torch.equal(top_k(flat, 38), survived == 5)
    for name, mask in ticket.inverted().masks.items():
        kept = int(ticket.masks[name].sum())
        assert int(mask.sum()) == kept
        lowest = ticket.scores[name].flatten().sort().values[kept - 1]
        assert bool((ticket.scores[name][mask] <= lowest).all())
        assert not (mask & ticket.masks[name]).any()


def test_units_of_a_round_rank_by_its_scores() -> None:
    model, blobs = sc.sparsify_(mlp()), Blobs()
    ticket = Iterative(magnitude, rounds=1)(model, blobs, sparsity=0.5)
    assert ticket.scores is not None
    for part in (True, False):
        order = [
            torch.cat([v[ticket.masks[n] == part] for n, v in values.items()]).argsort()
            for values in (magnitude(model, blobs, 0), ticket.scores)
        ]
        assert torch.equal(*order)


def test_a_constant_score_keeps_the_lower_index() -> None:
    def level(model: nn.Module, batches: object, seed: int) -> dict[str, Tensor]:
        return {n: torch.ones(m.weight_shape) for n, m in sc.sparse_layers(model).items()}

    ticket = Iterative(level, rounds=3)(sc.sparsify_(mlp()), Blobs(), sparsity=0.9)
    flat = torch.cat([m.flatten() for m in ticket.masks.values()])
    assert bool(flat[:38].all()) and not flat[38:].any()
    assert ticket.meta["method"] == "iterative-level"


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("score", [snip, synflow])
def test_every_granularity(score: Score, granularity: Granularity) -> None:
    ticket, rounds = watched(Iterative(score, 6, granularity), sc.sparsify_(mlp()), 0.75)
    kept = sum(int(m.sum()) for m in ticket.masks.values())
    largest = max(int(granularity.sizes(m.shape).max()) for m in ticket.masks.values())
    assert 96 - largest < kept <= 96
    for name, mask in ticket.masks.items():
        share = granularity.gather(mask.long()) / granularity.sizes(mask.shape)
        assert bool(((share == 0) | (share == 1)).all())
        if isinstance(granularity, NM):
            assert int(mask.unflatten(1, (-1, 4)).sum(-1).max()) <= 2
        assert torch.equal(mask, rounds[-1][name])
        assert all(bool((a[name] | ~b[name]).all()) for a, b in pairwise(rounds))


def test_small_edge_units_do_not_come_back_either() -> None:
    """Edges of 1 x 1 always fit beside the last block that does: they must stay out once they fell."""
    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 5))))
    for rounds in (1, 2, 3, 8, 30):
        search = Iterative(random, rounds, Block(4, 4), seed=rounds)
        ticket, masks = watched(search, model, 0.8)
        for before, after in pairwise(masks):
            assert all(bool((before[n] | ~after[n]).all()) for n in before)
        assert all(torch.equal(ticket.masks[n], m) for n, m in masks[-1].items())
        assert 25 - 16 < sum(int(m.sum()) for m in ticket.masks.values()) <= 25


def test_n_of_m_begins_at_what_it_allows() -> None:
    _, rounds = watched(Iterative(snip, 3, NM(1, 4)), sc.sparsify_(mlp()), 0.8)
    assert [sum(int(m.sum()) for m in masks.values()) for masks in rounds] == [96, 96, 76]


def test_the_model_is_given_back_also_by_a_search_that_fails() -> None:
    model = sc.sparsify_(mlp())
    layer = sc.sparse_layers(model)["2"]
    layer.set_mask_(torch.rand(4, 24, generator=torch.Generator().manual_seed(0)) > 0.2)
    model[1].eval()
    before, patterns = copy.deepcopy(model.state_dict()), [m.pattern for m in (model[0], model[2])]

    def broken(net: nn.Module, batches: object, seed: int) -> dict[str, Tensor]:
        values = magnitude(net, Blobs(), seed)
        if not masks_of(net)["0"].all():  # the second round
            values["2"][masks_of(net)["2"].nonzero()[0].tolist()] = torch.nan
        return values

    def untouched() -> bool:
        same = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        found = [m.pattern for m in (model[0], model[2])]
        modes = [m.training for m in model]
        return same and found == patterns and modes == [True, False, True]

    assert Iterative(snip, 3)(model, Blobs(), sparsity=0.5).sparsity == 0.5
    assert untouched()
    with pytest.raises(ValueError, match="scores hold NaN"):
        Iterative(broken, 3)(model, Blobs(), sparsity=0.5)
    assert untouched()
    with pytest.raises(ZeroDivisionError):
        Iterative(snip, 3)(model, Blobs(), sparsity=0.5, watch=lambda net: 1 / 0)
    assert untouched() and isinstance(layer.pattern, Masked)


def test_rounds_read_their_own_epoch_and_no_more_than_asked() -> None:
    read: list[tuple[int, int]] = []

    class Counted(Blobs):
        def epoch(self, index: int) -> Iterator[Batch]:
            for i, batch in enumerate(super().epoch(index)):
                read.append((index, i))
                yield batch

    model = sc.sparsify_(mlp())
    Iterative(snip, 2)(model, Counted(), sparsity=0.5)
    assert read == [(e, i) for e in (0, 1) for i in range(4)]
    read.clear()
    Iterative(snip, 3, batches_per_round=2)(model, Counted(), sparsity=0.5)
    assert read == [(e, i) for e in range(3) for i in range(2)]


def collapsed(model: nn.Module, rounds: int, sparsity: float, *shape: int) -> list[str]:
    ticket = Iterative(rounds=rounds)(model, Images(*shape), sparsity=sparsity)
    return [name for name, mask in ticket.masks.items() if not mask.any()]


@pytest.mark.parametrize(
    ("shortcut", "sparsity"), [("A", 0.995), ("B", 0.995), ("3x3", 0.995), ("3x3", 0.999)]
)
def test_no_layer_of_a_resnet_collapses(shortcut: str, sparsity: float) -> None:
    """Not even a projection, or a stage whose shortcuts would carry the signal alone."""
    model = sc.sparsify_(seeded(lambda: resnet_20((3, 8, 8), 10, shortcut=shortcut)))
    assert collapsed(model, 15, sparsity, 3, 8, 8) == []


def test_branches_that_start_at_nothing_do_not_collapse() -> None:
    model = sc.sparsify_(seeded(lambda: resnet_20((3, 8, 8), 10)))
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
    assert collapsed(model, 15, 0.995, 3, 8, 8) == []


def test_no_layer_of_a_transformer_collapses() -> None:
    model = sc.sparsify_(seeded(lambda: vit_small((3, 8, 8), 10, dim=48, hidden=96, depth=4)))
    assert collapsed(model, 15, 0.98, 3, 8, 8) == []


@pytest.mark.slow
def test_no_layer_of_torchvisions_resnet_collapses() -> None:
    model = sc.sparsify_(seeded(torchvision.models.resnet18))
    assert collapsed(model, 12, 0.995, 3, 32, 32) == []


def test_synflow_ends_with_one_path() -> None:
    """As many weights as layers: what is left leads from an input to an output."""
    for seed in range(2):
        net = seeded(lambda: nn.Sequential(mlp(6, 8, 7), nn.ReLU(), nn.Linear(7, 3)), seed)
        model = sc.sparsify_(net)
        ticket = Iterative()(model, Blobs(features=6), sparsity=1 - 3 / (48 + 56 + 21))
        a, b, c = (m.nonzero().tolist() for m in ticket.masks.values())
        assert len(a) == len(b) == len(c) == 1
        assert a[0][0] == b[0][1] and b[0][0] == c[0][1]


@pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))
def test_nasty_shapes(score: Score) -> None:
    """Layers of a single weight and of a single row, and all or next to nothing kept."""
    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Linear(12, 1), nn.Linear(1, 1), nn.Linear(1, 4)))
    )
    for sparsity, kept in ((0.0, 17), (0.9, 1), (0.99, 0)):
        ticket = Iterative(score, 4)(model, Blobs(), sparsity=sparsity)
        assert sum(int(m.sum()) for m in ticket.masks.values()) == kept
    single = sc.sparsify_(seeded(lambda: nn.Linear(12, 4)))
    assert Iterative(score, 2, Channel())(single, Blobs(), sparsity=0.5).sparsity == 0.5


def test_bad_arguments_are_told_before_any_data_is_read() -> None:
    class Untouched(Blobs):
        def epoch(self, index: int) -> Iterator[Batch]:
            raise AssertionError("the search has begun")

    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        Iterative(rounds=0)
    with pytest.raises(ValueError, match="batches_per_round: expected None"):
        Iterative(batches_per_round=0)
    model = sc.sparsify_(mlp())
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="0 <= sparsity < 1"):
            Iterative()(model, Untouched(), sparsity=sparsity)
    with pytest.raises(ValueError, match="1:4 allows at most 96 of 384"):
        Iterative(granularity=NM(1, 4))(model, Untouched(), sparsity=0.5)
    with pytest.raises(ValueError, match="sparsify_"):
        Iterative()(mlp(), Untouched(), sparsity=0.5)
