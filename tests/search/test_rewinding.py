"""Iterative pruning: exact rewinding, exact counts, every unit."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import GRANULARITIES, Blobs, mlp
from hypothesis import given
from hypothesis import strategies as st
from rewinds import RECIPE, SEARCH, WEIGHTS, Killed, Stops, batchnorm_net, kept, same, small, under
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.granularity import NM, Block, Granularity
from sparsecore.patterns import Dense
from sparsecore.recipes import RECIPES, stable
from sparsecore.regions import angular_distances
from sparsecore.rounds import load_rounds
from sparsecore.search import SearchError
from sparsecore.sparsities import kept_count, masks_from_scores
from sparsecore.tickets import Ticket, dense_state
from sparsecore.training import Recipe, evaluate, train


def test_one_round_keeps_the_largest_of_an_independent_training() -> None:
    model, trained = small(), mlp()
    before = copy.deepcopy(model.state_dict())
    ticket = SEARCH(model, Blobs(), sparsity=0.2)
    train(trained, Blobs(), None, RECIPE, stop_epoch=2, total_epochs=2)
    sizes = torch.cat([trained[i].weight.detach().abs().flatten() for i in (0, 2)])
    best = sorted(range(WEIGHTS), key=lambda i: (-sizes[i].item(), i))[: kept_count(WEIGHTS, 0.2)]
    mask = torch.cat([ticket.masks[name].flatten() for name in ("0", "2")])
    assert mask.nonzero().flatten().tolist() == sorted(best)
    assert same(ticket.weights, before) and not ticket.finished
    assert ticket.meta["method"] == "imp" and ticket.meta["sparsity"] == 0.2
    assert [r["density"] for r in ticket.meta["rounds"]] == [1]


@pytest.mark.parametrize("net", [small, batchnorm_net], ids=["mlp", "batchnorm"])
def test_every_round_starts_from_the_same_weights_bit_for_bit(
    net: Callable[[], nn.Module], folder: Path, starts: list[dict[str, Tensor]]
) -> None:
    model = net()
    if net is batchnorm_net:  # statistics that a rewind can get wrong
        train(model, Blobs(), None, RECIPE, stop_epoch=1)
    before = dense_state(model)
    ticket = replace(SEARCH, rounds=folder, start_epoch=1)(model, Blobs(), sparsity=0.6)
    rounds = load_rounds(folder)
    assert len(rounds) == len(starts) == 5 and same(ticket.weights, before)
    for found, start in zip(rounds, starts, strict=True):
        assert same(found.start, before) and same(start, under(found.masks, before))
        assert not same(found.trained, start)
        assert same(found.trained, under(found.masks, found.trained))


def test_rounds_are_nested_and_keep_exact_counts(folder: Path) -> None:
    ticket = replace(SEARCH, rounds=folder)(small(), Blobs(), sparsity=0.6)
    rounds = load_rounds(folder)
    assert [r.index for r in rounds] == [0, 1, 2, 3, 4]
    assert [r.density for r in rounds] == pytest.approx([1, 0.8, 0.64, 0.512, 0.4096])
    assert [kept(r.masks) for r in rounds] == [384, 307, 245, 196, 157]
    assert kept(ticket.masks) == 153
    steps = [r.masks for r in rounds] + [ticket.masks]
    for more, less in pairwise(steps):
        assert all(bool((more[n] | ~less[n]).all()) for n in more)
    # The survivors are the largest, by the network that was trained just before.
    for found, less in zip(rounds, steps[1:], strict=True):
        sizes = {n: w.abs() for n, w in found.weights().items()}
        low = min(sizes[n][less[n]].min() for n in less)
        assert all(bool((sizes[n][found.masks[n] & ~less[n]] <= low).all()) for n in less)


@given(rate=st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9]), k=st.integers(1, 30))
def test_the_number_of_networks(rate: float, k: int) -> None:
    search, exact = replace(SEARCH, rate=rate), (1 - rate) ** k
    if exact > 1e-9:  # 1 - exact still knows it
        assert search.count(1 - exact) == k
        assert search.count(1 - 0.99 * exact) == k + 1
        assert search.count(1 - min(1.01 * exact, 1 - 1e-9)) == k


def test_the_paper_s_sparsity_takes_22_networks() -> None:
    assert SEARCH.count(0.99262) == 22
    assert SEARCH.count(1e-9) == 1


def test_other_sparsities_reuse_the_rounds(folder: Path, starts: list[dict[str, Tensor]]) -> None:
    model, blobs, search = small(), Blobs(), replace(SEARCH, rounds=folder)
    middle = search(model, blobs, sparsity=0.5)
    assert len(starts) == 4
    high, low = search(model, blobs, sparsity=0.7), search(model, blobs, sparsity=0.3)
    assert len(starts) == 6  # two more for 0.7, none for 0.3
    files = {p: p.read_bytes() for p in folder.iterdir()}
    assert search(model, blobs, sparsity=0.5).hash == middle.hash
    assert len(starts) == 6 and files == {p: p.read_bytes() for p in folder.iterdir()}
    for ticket in (low, middle, high):
        assert SEARCH(model, blobs, sparsity=ticket.meta["sparsity"]).hash == ticket.hash
        seconds = [r["seconds"] for r in ticket.meta["rounds"]]
        assert ticket.meta["search_seconds"] == pytest.approx(sum(seconds)) and min(seconds) > 0
    assert high.meta["rounds"][:2] == low.meta["rounds"]  # as they were measured


def test_learning_rate_rewinding_goes_on_from_trained_weights(
    folder: Path, starts: list[dict[str, Tensor]]
) -> None:
    model = batchnorm_net()
    search = replace(SEARCH, rewind="learning-rate", rounds=folder)
    ticket = search(model, Blobs(), sparsity=0.4)
    rounds = load_rounds(folder)
    assert same(starts[0], dense_state(model))
    for before, after, start in zip(rounds, rounds[1:], starts[1:], strict=False):
        assert same(after.start, before.trained)
        assert same(start, under(after.masks, before.trained))
    assert same(ticket.weights, under(ticket.masks, rounds[-1].trained))
    assert not ticket.finished and ticket.meta["rewind"] == "learning-rate"
    assert search(model, Blobs(), sparsity=0.4).hash == ticket.hash  # from the files
    first = replace(SEARCH, rewind="learning-rate")(model, Blobs(), sparsity=0.2)
    assert first.hash == SEARCH(model, Blobs(), sparsity=0.2).hash  # nothing to rewind yet


def test_the_schedule_and_the_data_start_again_at_a_fraction_of_an_epoch() -> None:
    seen: list[int] = []

    class Watched(Blobs):
        def epoch(self, index: int) -> Iterator[Batch]:
            seen.append(index)
            return super().epoch(index)

    model, trained = small(), mlp()
    search = replace(SEARCH, epochs=2.25, start_epoch=1.5)
    ticket = search(model, Watched(), sparsity=0.36)
    assert seen == [0, 1, 2, 3, 1, 2, 3]  # the first for the fingerprint
    train(trained, Blobs(), None, RECIPE, start_epoch=1.5, stop_epoch=3.75, total_epochs=3.75)
    first = search(model, Blobs(), sparsity=0.2)
    sizes = {name: trained.get_submodule(name).weight.detach().abs() for name in ("0", "2")}
    expected = masks_from_scores(sizes, {n: s.shape for n, s in sizes.items()}, 0.2)
    assert all(torch.equal(first.masks[n], m) for n, m in expected.items())
    assert ticket.meta["start_epoch"] == 1.5
    assert replace(search, start_epoch=1)(model, Blobs(), sparsity=0.2).hash != first.hash


@pytest.mark.parametrize("granularity", [*GRANULARITIES, NM(1, 4), NM(3, 5), Block(5, 7)], ids=str)
def test_units_are_kept_whole_and_never_come_back(granularity: Granularity, folder: Path) -> None:
    search = replace(SEARCH, granularity=granularity, rounds=folder)
    ticket = search(small(), Blobs(), sparsity=0.8)
    rounds = load_rounds(folder)
    masks = [r.masks for r in rounds] + [ticket.masks]
    largest = max(int(granularity.sizes(m.shape).max()) for m in ticket.masks.values())
    asked = [kept_count(WEIGHTS, 1 - r.density) for r in rounds] + [kept_count(WEIGHTS, 0.8)]
    assert len(masks) == 9
    for found, most in zip(masks, asked, strict=True):
        assert most - largest < kept(found) <= most
        for mask in found.values():
            share = granularity.gather(mask.long()) / granularity.sizes(mask.shape)
            assert bool(((share == 0) | (share == 1)).all())
    for more, less in pairwise(masks):
        assert all(bool((more[n] | ~less[n]).all()) for n in more)
    if isinstance(granularity, NM):
        # Every group as full as the pattern allows, before weights go for their size alone.
        fraction = granularity.n / granularity.m
        for found in (m for m, k in zip(masks, asked, strict=True) if k <= fraction * WEIGHTS):
            for mask in found.values():
                groups = mask[:, : mask.shape[1] // granularity.m * granularity.m]
                groups = groups.unflatten(1, (-1, granularity.m))
                assert int(groups.sum(-1).max()) <= granularity.n
    assert Ticket.from_scores(ticket.scores, small(), 0.8, granularity).hash == ticket.hash


def test_the_last_prune_ranks_a_block_by_its_mean(folder: Path) -> None:
    granularity = Block(5, 7)  # leaves smaller blocks at the edges
    ticket = replace(SEARCH, granularity=granularity, rounds=folder)(small(), Blobs(), sparsity=0.2)
    (only,) = load_rounds(folder)
    weight = only.trained["0.weight"].abs()
    assert ticket.scores["0"][1, 1].item() == pytest.approx(weight[5:10, 7:12].mean().item())
    assert ticket.scores["0"][4, 0].item() == pytest.approx(weight[20:, :7].mean().item())


def test_what_went_first_ranks_last(folder: Path) -> None:
    ticket = replace(SEARCH, rounds=folder)(small(), Blobs(), sparsity=0.6)
    rounds, scores = load_rounds(folder), ticket.scores
    # By the round they went in, then by their size there.
    for found, after in zip(rounds, [*(r.masks for r in rounds[1:]), ticket.masks], strict=True):
        gone = {n: found.masks[n] & ~m for n, m in after.items()}
        low = torch.cat([scores[n][m] for n, m in gone.items()])
        assert low.max() < min(scores[n][m].min() for n, m in after.items())
        sizes = torch.cat([found.weights()[n].abs()[m] for n, m in gone.items()])
        assert bool((low[sizes.argsort()].diff() >= 0).all())


def test_a_watch_sees_each_trained_network_and_changes_nothing(folder: Path) -> None:
    model, seen = batchnorm_net(), []
    plain = SEARCH(model, Blobs(), sparsity=0.4)
    assert [r["accuracy"] for r in plain.meta["rounds"]] == [None] * 3

    def watch(network: nn.Module) -> float:
        seen.append(dense_state(network))
        accuracy = evaluate(network, Blobs())
        with torch.no_grad():
            for p in network.parameters():
                p.zero_()
        return accuracy

    search = replace(SEARCH, rounds=folder)
    ticket = search(model, Blobs(), sparsity=0.4, watch=watch)
    rounds = load_rounds(folder)
    assert ticket.hash == plain.hash and len(seen) == 3
    assert all(same(r.trained, state) for r, state in zip(rounds, seen, strict=True))
    assert [r.accuracy for r in rounds] == [r["accuracy"] for r in ticket.meta["rounds"]]
    assert rounds[0].accuracy > 50
    again = search(model, Blobs(), sparsity=0.4, watch=watch)
    assert again.meta == ticket.meta and len(seen) == 3
    assert json.loads(json.dumps(ticket.meta)) == ticket.meta


def test_a_ticket_survives_its_file_and_trains(tmp_path: Path) -> None:
    ticket = replace(SEARCH, epochs=6)(small(), Blobs(), sparsity=0.8)
    ticket.save(tmp_path / "t")
    loaded = Ticket.load(tmp_path / "t")
    assert loaded.hash == ticket.hash and loaded.meta == ticket.meta
    network = loaded.apply_(sc.sparsify_(mlp(seed=3)))
    train(network, Blobs(), None, RECIPE, stop_epoch=6, total_epochs=6)
    assert evaluate(network, Blobs()) > 95


@pytest.mark.parametrize("masked", [False, True])
def test_the_model_is_not_touched_also_when_the_search_fails(masked: bool) -> None:
    model = batchnorm_net()
    if masked:  # from an earlier ticket: its mask is put aside
        sc.sparse_layers(model)["6"].set_mask_(torch.arange(32).view(4, 8) % 2 == 0)
    model.eval()
    model[1].raw_weight.grad = torch.ones_like(model[1].raw_weight)
    before, grad = copy.deepcopy(model.state_dict()), model[1].raw_weight.grad
    kinds = [type(m) for m in model.modules()]

    def untouched() -> bool:
        return (
            same(before, model.state_dict())
            and kinds == [type(m) for m in model.modules()]
            and model[1].raw_weight.grad is grad
            and all(p.grad is None for p in model[6].parameters())
            and not any(m.training for m in model.modules())
            and isinstance(model[1].pattern, Dense)
        )

    SEARCH(model, Blobs(), sparsity=0.4)
    assert untouched()
    with pytest.raises(SearchError, match="round 0: epoch 1: the loss is"):
        replace(SEARCH, recipe=Recipe(lr=1e38))(model, Blobs(), sparsity=0.4)
    assert untouched()
    with pytest.raises(Killed):
        SEARCH(model, Stops(12), sparsity=0.4)
    assert untouched()


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": float("nan")},
        {"start_epoch": -1},
        {"rate": 0},
        {"rate": 1},
        {"rewind": "never"},
    ],
    ids=str,
)
def test_bad_fields_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        replace(SEARCH, **bad)


def test_bad_arguments_are_told_before_long_work() -> None:
    untouched = Stops(0)
    for sparsity in (-0.1, 0, 1, float("nan")):
        with pytest.raises(ValueError, match="sparsity"):
            SEARCH(small(), untouched, sparsity=sparsity)
    with pytest.raises(ValueError, match="sparsify_"):
        SEARCH(mlp(), untouched, sparsity=0.5)
    with pytest.raises(ValueError, match="2:4 allows at most"):
        replace(SEARCH, granularity=NM(2, 4))(small(), untouched, sparsity=0.3)
    with pytest.raises(ValueError, match="expected at least one of 4 batches"):
        replace(SEARCH, epochs=0.1)(small(), untouched, sparsity=0.5)


def test_the_stable_recipe_has_large_batches_at_the_same_rate() -> None:
    unstable = RECIPES["resnet-20"]
    recipe = stable(unstable)
    assert recipe == replace(unstable, batch=1024, warmup_epochs=8)
    assert stable(recipe) == recipe and stable(replace(unstable, batch=2048)).batch == 2048
    assert stable(replace(unstable, warmup_epochs=20)).warmup_epochs == 20
    assert stable(RECIPES["lenet-300-100"]) == RECIPES["lenet-300-100"]


def test_rounds_can_be_driven_apart_or_together(tmp_path: Path) -> None:
    distances = {}
    for strength in (-4.0, 0.0, 4.0):
        search = replace(SEARCH, epochs=4, repel=strength, rounds=tmp_path / f"{strength}")
        ticket = search(small(), Blobs(), sparsity=0.5)
        angles = angular_distances(load_rounds(tmp_path / f"{strength}"))
        distances[strength] = angles[~torch.eye(len(angles), dtype=torch.bool)].mean().item()
        assert ticket.meta["repel"] == strength
    assert distances[-4.0] < distances[0.0] - 0.01 < distances[4.0] - 0.02
