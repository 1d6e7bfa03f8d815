"""Edge-popup: its first steps by hand, its ticket against all there are, and a ticket that works untrained."""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import GRANULARITIES, Blobs, convolutional, generator, mlp, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.granularity import NM, Block, Channel, Granularity
from sparsecore.search.edge_popup import EdgePopup, _PopupEpochs
from sparsecore.training import evaluate


class OneBatch(Blobs):
    """All points at once, in one order: a search of as many steps as epochs."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.batch = len(self.y)

    def order(self, index: int) -> Tensor:
        return torch.arange(len(self.y))


def accuracy(model: nn.Module) -> float:
    return evaluate(model, Blobs())


def first_scores(shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """U(-1, 1) / sqrt(fan_in), layer after layer from one generator."""
    return (2 * torch.rand(shape, generator=draws) - 1) / math.sqrt(shape[1])


def kept(score: Tensor, k: int) -> Tensor:
    mask = torch.zeros(score.numel())
    mask[score.abs().flatten().argsort(descending=True)[:k]] = 1
    return mask.view_as(score)


def test_two_steps_by_hand() -> None:
    """Signed constants, top-k of |score|, the gradient straight through, weight decay, momentum, cosine."""
    model, data = sc.sparsify_(mlp(hidden=6)), OneBatch()
    search = EdgePopup(epochs=2, lr=0.5, momentum=0.9, weight_decay=0.01, seed=3)
    ticket = search(model, data, sparsity=0.75)
    (x, y), draws = next(data.epoch(0)), generator(3)
    layers = [model[0], model[2]]
    scores = [first_scores(tuple(layer.raw_weight.shape), draws) for layer in layers]
    constants = [
        layer.raw_weight.detach().sign() * math.sqrt(2 / layer.in_features) for layer in layers
    ]
    momenta, losses = [torch.zeros_like(s) for s in scores], []
    for step in range(2):
        seen = [
            (w * kept(s, s.numel() // 4)).requires_grad_()
            for w, s in zip(constants, scores, strict=True)
        ]
        hidden = F.relu(F.linear(x, seen[0], layers[0].bias.detach()))
        loss = F.cross_entropy(F.linear(hidden, seen[1], layers[1].bias.detach()), y)
        losses.append(loss.item())
        lr = 0.5 * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / 2))
        for i, grad in enumerate(torch.autograd.grad(loss, seen)):
            full = grad * constants[i] * scores[i].sign() + 0.01 * scores[i]
            momenta[i] = 0.9 * momenta[i] + full
            scores[i] = scores[i] - lr * momenta[i]
    assert ticket.scores is not None
    for name, score, weight in zip(("0", "2"), scores, constants, strict=True):
        torch.testing.assert_close(ticket.scores[name], score.abs())
        assert torch.equal(ticket.masks[name], kept(score, score.numel() // 4).bool())
        assert torch.equal(ticket.weights[f"{name}.weight"], weight)  # also where the mask is 0
        assert torch.equal(
            ticket.weights[f"{name}.bias"], model.get_parameter(f"{name}.bias").detach()
        )
    assert [r["objective"] for r in ticket.meta["progress"]] == pytest.approx(losses)


class Planted(OneBatch):
    """Points labelled by the net itself under some mask."""

    def __init__(self, net: nn.Module, first: Tensor, second: Tensor) -> None:
        self.x, self.batch = randn(96, 3, seed=5), 96
        with torch.no_grad():
            self.y = under(net, first, second, self.x).argmax(1)


def under(net: nn.Module, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    state = net.state_dict()
    masked = {
        "0.weight": state["0.weight"] * first.view(2, 3),
        "2.weight": state["2.weight"] * second.view(3, 2),
    }
    return torch.func.functional_call(net, state | masked, (x,))


def test_it_comes_near_the_best_of_all_masks_of_a_net_of_12_weights() -> None:
    halves = []  # all ways to keep 3 weights of 6
    for chosen in itertools.combinations(range(6), 3):
        halves.append(torch.zeros(6))
        halves[-1][list(chosen)] = 1
    ranks = []
    for seed in range(4):
        net = seeded(
            lambda: nn.Sequential(
                nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 3, bias=False)
            ),
            seed,
        )
        for p in net.parameters():
            p.data.mul_(4)  # so that masks matter
        model = sc.sparsify_(net)
        first, second = torch.randint(20, (2,), generator=generator(seed)).tolist()
        data = Planted(model, halves[first], halves[second])
        ticket = EdgePopup(epochs=200, weights="as-is", seed=seed)(model, data, sparsity=0.5)
        losses = [
            [F.cross_entropy(under(model, a, b, data.x), data.y).item() for b in halves]
            for a in halves
        ]
        found = F.cross_entropy(under(model, ticket.masks["0"], ticket.masks["2"], data.x), data.y)
        ranks.append(sum(loss < found.item() - 1e-6 for row in losses for loss in row))
    assert max(ranks) <= 20, ranks  # of 400, and half of them the very best
    assert ranks.count(0) >= 2, ranks


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_every_layer_keeps_its_share_of_units(granularity: Granularity) -> None:
    model, data = sc.sparsify_(mlp()), Blobs()
    ticket = EdgePopup(epochs=2, granularity=granularity)(model, data, sparsity=0.5)
    for name, mask in ticket.masks.items():
        sizes = granularity.sizes(mask.shape)
        share = granularity.gather(mask.long()) / sizes
        assert bool(((share == 0) | (share == 1)).all())
        assert mask.numel() // 2 - int(sizes.max()) < int(mask.sum()) <= mask.numel() // 2, name
        if isinstance(granularity, NM):
            assert int(mask.unflatten(1, (-1, 4)).sum(-1).max()) <= 2
    assert ticket.granularity == granularity
    assert len({r["objective"] for r in ticket.meta["progress"]}) == 2  # scores move


def popup(search: EdgePopup, model: nn.Module, sparsity: float) -> _PopupEpochs:
    sparsities = dict.fromkeys(sc.sparse_layers(model), sparsity)
    return _PopupEpochs(search, model, copy.deepcopy(model), Blobs(), sparsities, None, None)


def test_ties_go_to_the_lower_index() -> None:
    work = popup(EdgePopup(), sc.sparsify_(mlp()), 0.75)
    for pattern in work.gated.values():
        pattern.logits.data.fill_(-0.5)
        pattern.logits.data[1, 1] = 0.7
    for mask in work.harden_().values():
        k = mask.numel() // 4
        assert int(mask.sum()) == k and bool(mask.flatten()[: k - 1].all()) and bool(mask[1, 1])


def test_the_ticket_works_as_it_is_and_better_than_its_shuffle() -> None:
    model, data = sc.sparsify_(mlp(hidden=48)), Blobs()
    ticket = EdgePopup(epochs=20, weights="scaled")(model, data, sparsity=0.7)

    def untrained(t: sc.Ticket) -> float:
        return accuracy(t.apply_(copy.deepcopy(model)))

    assert ticket.finished
    assert untrained(ticket) > 95
    assert untrained(ticket) > max(untrained(ticket.shuffled(seed)) for seed in range(3)) + 10


@pytest.mark.parametrize("weights", ["signed-constant", "scaled", "as-is"])
@pytest.mark.parametrize("build", [mlp, convolutional])
def test_the_finished_ticket_evaluates_to_the_watched_accuracy(
    build, weights: str, tmp_path: Path
) -> None:
    model, data = sc.sparsify_(build()), Blobs()
    search = EdgePopup(epochs=3, weights=weights)
    ticket = search(model, data, sparsity=0.6, watch=accuracy)
    assert [r["epoch"] for r in ticket.meta["progress"]] == [1, 2, 3]
    ticket.save(tmp_path / "t.safetensors")
    again = sc.Ticket.load(tmp_path / "t.safetensors").apply_(sc.sparsify_(build(seed=1)))
    assert accuracy(again) == ticket.meta["progress"][-1]["accuracy"]
    blind = search(model, data, sparsity=0.6)  # what is watched changes nothing
    assert blind.hash == ticket.hash
    assert [r["objective"] for r in blind.meta["progress"]] == [
        r["objective"] for r in ticket.meta["progress"]
    ]


def test_batchnorm_has_the_statistics_under_the_final_masks() -> None:
    model, data = sc.sparsify_(convolutional()), Blobs()
    ticket = EdgePopup(epochs=1)(model, data, sparsity=0.5)
    weight = ticket.weights["1.weight"] * ticket.masks["1"]
    means, variances = [], []
    for x, _ in data.epoch(0):
        out = F.conv2d(x.view(-1, 3, 2, 2), weight, ticket.weights["1.bias"]).flatten(1)
        means.append(out.mean(0))
        variances.append(out.var(0))
    torch.testing.assert_close(ticket.weights["2.running_mean"], torch.stack(means).mean(0))
    torch.testing.assert_close(ticket.weights["2.running_var"], torch.stack(variances).mean(0))
    assert torch.equal(ticket.weights["2.weight"], model.get_parameter("2.weight").detach())


def test_weights_by_hand() -> None:
    model = sc.sparsify_(convolutional())
    raw = {n: layer.raw_weight.detach() for n, layer in sc.sparse_layers(model).items()}
    raw["1"][0, 0] = 0

    def found(weights: str) -> Mapping[str, Tensor]:
        return EdgePopup(epochs=1, weights=weights)(model, Blobs(), sparsity=0.75).weights

    for name, fan_in in (("1", 12), ("5", 16)):
        constant = raw[name].sign() * math.sqrt(2 / fan_in)
        torch.testing.assert_close(found("signed-constant")[f"{name}.weight"], constant)
        torch.testing.assert_close(found("scaled")[f"{name}.weight"], 2 * constant)
        assert torch.equal(found("as-is")[f"{name}.weight"], raw[name])


def test_a_distribution_gives_each_layer_its_density() -> None:
    asked = []

    def shape(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
        asked.append((dict(shapes), density))
        return {"0": 0.1, "2": 1.0}

    model = sc.sparsify_(mlp())
    ticket = EdgePopup(epochs=1, distribution=shape)(model, Blobs(), sparsity=0.8)
    assert asked == [({"0": (24, 12), "2": (4, 24)}, pytest.approx(0.2))]
    assert ticket.layer_sparsities() == {"0": 1 - 28 / 288, "2": 0}
    other = EdgePopup(epochs=1, distribution=lambda shapes, density: {"0": 0.1})
    with pytest.raises(ValueError, match="expected a density for each of 0, 2"):
        other(model, Blobs(), sparsity=0.8)


def test_the_seed_decides_and_nothing_else() -> None:
    model, search = sc.sparsify_(mlp()), EdgePopup(epochs=2)
    first = search(model, Blobs(), sparsity=0.8)
    assert first.hash == search(model, Blobs(), sparsity=0.8).hash
    assert first.hash != replace(search, seed=1)(model, Blobs(), sparsity=0.8).hash
    assert first.meta["method"] == "edge-popup" and first.meta["seed"] == 0


class Untouched(Blobs):
    def epoch(self, index: int) -> Iterator[Batch]:
        raise AssertionError("the search has begun")


@pytest.mark.parametrize(
    ("granularity", "sparsity", "message"),
    [
        (Channel(), 0.8, "layer 2: sparsity 0.8 keeps 19 of its 96 weights, expected at least one"),
        (Block(1, 1), 0.99, "layer 2: sparsity 0.99 keeps 0 of its 96"),
        (NM(1, 4), 0.5, "1:4 allows at most 72 of 288"),
    ],
)
def test_what_a_layer_cannot_be_is_told_before_the_search(
    granularity: Granularity, sparsity: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EdgePopup(granularity=granularity)(sc.sparsify_(mlp()), Untouched(), sparsity=sparsity)


def test_bad_arguments_name_the_mend() -> None:
    with pytest.raises(ValueError, match="sparsify_"):
        EdgePopup()(mlp(), Untouched(), sparsity=0.5)
    with pytest.raises(ValueError, match="one of signed-constant, scaled, as-is, got 'random'"):
        EdgePopup(weights="random")
    with pytest.raises(ValueError, match="epochs: expected at least 1"):
        EdgePopup(epochs=0)
    with pytest.raises(ValueError, match="lr: expected a positive number"):
        EdgePopup(lr=0)
    with pytest.raises(ValueError, match="momentum"):
        EdgePopup(momentum=1)
    with pytest.raises(ValueError, match="weight_decay"):
        EdgePopup(weight_decay=-1)
