"""Dynamic sparse training: schedules, single updates and first masks by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import Blobs, mlp, seeded
from masked_nets import ADAMW, SGD, batchnorm_net, masked, same, shapes_of, sparse_mlp
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.granularity import NM, Block
from sparsecore.search.dynamic import (
    SET,
    AbstractRegrowth,
    GradualMagnitude,
    RigL,
    dense_gradients,
    exchanged,
    random_masks,
)
from sparsecore.search.sparse_training import Due
from sparsecore.training import Recipe, Step

# Schedules


def test_rigl_exchanges_by_its_cosine_and_never_after_its_stop() -> None:
    schedule = RigL(SGD, 10).schedule(1000, 100)
    assert list(schedule) == [100, 200, 300, 400, 500, 600, 700]  # T_end = 750
    for t in schedule:
        assert schedule[t] == pytest.approx(0.15 * (1 + math.cos(math.pi * t / 750)))
    assert schedule[300] == pytest.approx(0.15 * (1 + 0.30901699))
    # A step at T_end itself is no longer before it.
    assert list(RigL(SGD, 10, interval=250).schedule(1000, 100)) == [250, 500]
    assert max(RigL(SGD, 10, interval=10, stop=1.0).schedule(100, 10)) == 90
    half = RigL(SGD, 10, drop=0.6, interval=50, stop=0.5).schedule(200, 10)
    assert half == {50: pytest.approx(0.3)}


def test_set_exchanges_once_an_epoch_with_something_to_train_after_it() -> None:
    assert SET(SGD, 4).schedule(40, 10) == {11: 0.3, 21: 0.3, 31: 0.3}
    assert SET(SGD, 2, zeta=0.1).schedule(21, 10) == {11: 0.1}


def test_gradual_pruning_is_cubic() -> None:
    search = GradualMagnitude(SGD, 10, begin=0.2, end=0.6, updates=4)
    # 100 steps: from 20 to 60; 1 - (3/4)^3, 1 - (2/4)^3, 1 - (1/4)^3, 1
    assert search.schedule(100, 10) == {
        30: pytest.approx(37 / 64),
        40: pytest.approx(56 / 64),
        50: pytest.approx(63 / 64),
        60: 1.0,
    }
    assert GradualMagnitude(SGD, 1, begin=0.5, end=0.51).schedule(3, 3) == {2: 1.0}
    assert list(GradualMagnitude(SGD, 1, end=1.0).schedule(3, 3)) == [1, 2, 3]
    assert GradualMagnitude(SGD, 1, end=0.01).schedule(3, 3) == {1: 1.0}


# One update


def test_exchange_by_hand() -> None:
    weight = torch.tensor([[4.0, -0.1, 0.0, 3.0], [0.0, 0.2, -5.0, 0.0]])
    mask = weight != 0
    grads = torch.tensor([[9.0, 2.0, 3.0, 9.0], [1.0, 0.5, 9.0, 4.0]])
    # Two of five go, 0.1 and 0.2; the best of all that did not stay are 4 and 3.
    expected = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert torch.equal(exchanged(mask, weight, grads, 0.4, 5), expected)
    # One goes; its own gradient ranks highest, so it is back at once.
    grads[0, 1] = 5
    assert torch.equal(exchanged(mask, weight, grads, 0.2, 5), mask)
    # floor(0.39 * 5) = 1, and 0.29 * 100 is 29 in spite of binary rounding
    assert int((exchanged(mask, weight, grads.where(~mask, 0), 0.39, 5) & mask).sum()) == 4
    row, full = torch.arange(1.0, 201).view(1, 200), torch.arange(200).view(1, 200) < 100
    assert int((exchanged(full, row, row, 0.29, 100) & full).sum()) == 71


def test_exchange_under_nm_fills_free_places_only() -> None:
    weight = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.1, 2.0, 0.0, 0.0]])
    grads = torch.tensor([[0.0, 0.0, 9.0, 8.0, 0.0, 0.0, 1.0, 2.0]])
    after = exchanged(weight != 0, weight, grads, 0.25, 4, NM(2, 4))
    assert after.tolist() == [[True, True, False, False, False, True, False, True]]


def test_exchange_of_blocks_by_their_mean() -> None:
    granularity = Block(1, 2)
    weight = torch.tensor([[3.0, -3.0, 0.0, 0.0, 4.0], [0.0, 0.0, 2.5, 2.5, 0.0]])
    growth = torch.tensor(
        [[0.0, 7.0, 0.0], [6.0, 0.0, 8.0]]
    )  # by unit: the last is one weight wide
    after = exchanged(weight != 0, weight, growth, 0.34, 5, granularity)
    expected = torch.tensor([[3.0, 3.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0, 1.0]]) != 0
    # [1, 2] goes for the single weight; a block after it would make six.
    assert torch.equal(after, expected)


def tightened(search: GradualMagnitude, weight: Tensor, mask: Tensor, sparsity: float) -> Tensor:
    """A layer's mask after gradual pruning to `sparsity`."""
    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(*weight.T.shape))))
    with torch.no_grad():
        model[0].raw_weight.copy_(weight)
    masked(model, {"0": mask})
    step = Step(0, model, torch.optim.SGD(model.parameters()), lambda: (weight, weight))
    return search.update(Due(step, 1, 0.5, 2 * sparsity, {}))["0"]


def test_gradual_pruning_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.0]])
    after = tightened(GradualMagnitude(SGD, 4), weight, weight != 0, 0.5)
    assert torch.equal(after, weight.abs() > 2.5)
    # Of [1, 2] blocks with rests [1, 1], one of each is gone; the rest's place is free, yet it stays gone.
    blocks = GradualMagnitude(SGD, 4, granularity=Block(1, 2))
    weight = torch.tensor([[5.0, 5.0, 0.0], [0.0, 0.0, 4.0]])
    assert torch.equal(tightened(blocks, weight, weight != 0, 1 / 3), weight != 0)


def test_gradual_pruning_under_nm_keeps_weights_that_are_zero_apart_from_pruned_ones() -> None:
    search = GradualMagnitude(SGD, 4, granularity=NM(2, 4))
    weight = torch.tensor([[0.0, 0.0, 5.0, 0.0, 1.0, 2.0, 3.0, 4.0]])
    three = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    assert torch.equal(tightened(search, weight, three, 1 / 8), three)
    two = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]]).bool()
    expected = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(tightened(search, weight, two, 0.5), expected)


@pytest.mark.parametrize(
    "recipe", [ADAMW, replace(ADAMW, accumulate=3, label_smoothing=0.2)], ids=["whole", "parts"]
)
def test_dense_gradients_are_those_of_the_dense_network(recipe: Recipe) -> None:
    model = sparse_mlp()
    masked(model, random_masks(shapes_of(model), 0.8))
    batch = next(Blobs().epoch(0))
    dense = sc.densify_(copy.deepcopy(model))  # pruned weights are there, at 0
    loss = F.cross_entropy(dense(batch[0]), batch[1], label_smoothing=recipe.label_smoothing)
    expected = torch.autograd.grad(loss, [dense[0].weight, dense[2].weight])
    found = dense_gradients(model, batch, recipe)
    assert list(found) == ["0", "2"]
    for grad, reference in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(grad, reference)
        assert bool((grad != 0).any())


def test_dense_gradients_disturb_nothing() -> None:
    model = batchnorm_net()
    masked(model, random_masks(shapes_of(model), 0.5))
    x, y = next(Blobs().epoch(0))
    with torch.random.fork_rng():
        F.cross_entropy(model(x), y).backward()
    model[4].eval()
    patterns = [layer.pattern for layer in sc.sparse_layers(model).values()]

    def facts() -> dict[str, Tensor]:
        grads = {f"grad {k}": p.grad for k, p in model.named_parameters()}
        return copy.deepcopy(model.state_dict() | grads)

    before, modes = facts(), [m.training for m in model.modules()]
    grads = dense_gradients(model, (x, y), SGD)  # conftest looks at the generator
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        dense_gradients(model, (x, y + 9), SGD)
    assert same(before, facts()) and modes == [m.training for m in model.modules()]
    assert patterns == [layer.pattern for layer in sc.sparse_layers(model).values()]
    # Dropout is off and BatchNorm takes the batch's own statistics.
    dense = sc.densify_(copy.deepcopy(model)).train()
    dense[4] = nn.Identity()
    reference = torch.autograd.grad(F.cross_entropy(dense(x), y), [dense[1].weight])[0]
    torch.testing.assert_close(grads["1"], reference)


@pytest.mark.parametrize("search", [SET(SGD, 4), RigL(SGD, 4)], ids=lambda s: s.name)
def test_an_update_drops_the_weakest_and_grows_the_best(search: AbstractRegrowth) -> None:
    model = sparse_mlp()
    masks = random_masks(shapes_of(model), 0.75)
    masked(model, masks)
    batch = next(Blobs().epoch(0))
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    due = Due(
        Step(9, model, torch.optim.SGD(model.parameters()), lambda: batch), 10, 0.3, 0.75, counts
    )
    scores, found = search.growth(due), search.update(due)
    if isinstance(search, RigL):
        grads = dense_gradients(model, batch, SGD)
        assert same(scores, {name: grad.abs() for name, grad in grads.items()})
    for name, mask in masks.items():
        weight, after = sc.sparse_layers(model)[name].raw_weight.detach(), found[name]
        number = int(0.3 * counts[name])
        strong = weight.abs() >= weight[mask].abs().sort().values[number]
        assert bool(after[strong].all()) and int(after.sum()) == counts[name]
        assert bool((after & ~mask).any())
        grown = scores[name][after & ~strong]
        assert len(grown) == number and grown.min() > scores[name][~after].max()


def test_set_grows_by_its_seed_and_by_nothing_else() -> None:
    def growth(seed: int, taken: int, model: nn.Module) -> dict[str, Tensor]:
        batch = next(Blobs().epoch(0))
        step = Step(taken - 1, model, torch.optim.SGD(model.parameters()), lambda: batch)
        return SET(SGD, 4, seed=seed).growth(Due(step, taken, 0.3, 0.8, {}))

    model, other = sparse_mlp(), sc.sparsify_(mlp(seed=1))
    first = growth(0, 5, model)
    assert same(first, growth(0, 5, other))
    assert not same(first, growth(1, 5, model)) and not same(first, growth(0, 9, model))
    assert first["0"].flatten()[0] != first["2"].flatten()[0]


# First masks


@pytest.mark.parametrize("distribution", ["erk", "uniform", "global"])
@pytest.mark.parametrize("sparsity", [0.5, 0.77, 0.9])
def test_first_masks_hold_exactly_what_was_asked_for(distribution: str, sparsity: float) -> None:
    shapes = shapes_of(sparse_mlp())
    masks = random_masks(shapes, sparsity, distribution)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(kept.values()) == math.floor((1 - sparsity) * 384 + 1e-6)
    if distribution == "uniform":
        assert kept["0"] == pytest.approx((1 - sparsity) * 288, abs=1)
    if distribution == "erk":  # 36 / 288 and 28 / 96 per weight
        assert kept["2"] / kept["0"] == pytest.approx(28 / 36, abs=0.1)
    assert not same(masks, random_masks(shapes, sparsity, distribution, seed=1))


def test_first_masks_share_out_what_a_pattern_allows() -> None:
    shapes = shapes_of(sc.sparsify_(mlp(hidden=4)))  # 48 and 16 weights
    for sparsity, kept in ((0.5, [24, 8]), (0.51, [23, 8]), (0.7, [13, 6])):
        masks = random_masks(shapes, sparsity, "erk", NM(2, 4))
        assert [int(mask.sum()) for mask in masks.values()] == kept
        groups = torch.cat(
            [mask.long().unflatten(1, (-1, 4)).flatten(0, 1) for mask in masks.values()]
        )
        assert int(groups.sum(-1).max()) <= 2


@pytest.mark.parametrize(
    ("kind", "bad", "expected"),
    [
        (SET, {"zeta": 0.0}, "set zeta: expected 0 < zeta < 1"),
        (SET, {"epochs": 0}, "set epochs: expected a positive number"),
        (SET, {"epochs": math.nan}, "set epochs: expected a positive number"),
        (SET, {"start_epoch": -1}, "set start_epoch: expected 0 or more"),
        (SET, {"distribution": "even"}, "expected one of .*, got 'even'"),
        (SET, {"recipe": replace(SGD, ema=0.9)}, "ema=None"),
        (RigL, {"drop": 1.0}, "rigl drop: expected 0 < drop < 1"),
        (RigL, {"interval": 0}, "rigl interval: expected at least 1"),
        (RigL, {"stop": 1.1}, "rigl stop: expected 0 < stop <= 1"),
        (GradualMagnitude, {"begin": 0.8}, "gradual begin: expected 0 <= begin < end"),
        (GradualMagnitude, {"end": 1.1}, "gradual end: expected at most 1"),
        (GradualMagnitude, {"updates": 0}, "gradual updates: expected at least 1"),
    ],
    ids=str,
)
def test_bad_values_are_refused(kind: type, bad: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        kind(**{"recipe": SGD, "epochs": 4, **bad})
