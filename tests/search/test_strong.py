"""Strong tickets: the best of all masks, weights they are searched in, BatchNorm."""

import copy
from itertools import combinations

import pytest
import torch
from helpers import Blobs, accuracy, mlp, randn, seeded
from torch import nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.gates import Bernoulli
from sparsecore.search import StrongSearch
from sparsecore.training import evaluate


def test_a_strong_ticket_of_twelve_weights_is_the_best_of_all_masks() -> None:
    """Brute force over all C(12, 6) masks of a frozen network."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3, bias=False)))
    sc.sparsify_(model)
    with torch.no_grad():
        model[0].raw_weight.copy_(randn(3, 4, seed=5))
    x = randn(200, 4, seed=1)
    hidden = torch.zeros(12)
    hidden[[0, 3, 5, 6, 8, 11]] = 1
    y = F.linear(x, model[0].raw_weight.detach() * hidden.view(3, 4)).argmax(1)

    class Points:
        def __len__(self) -> int:
            return 4

        def epoch(self, index: int):
            yield from zip(x.split(50), y.split(50), strict=True)

    def loss(mask: torch.Tensor) -> float:
        return F.cross_entropy(F.linear(x, model[0].raw_weight.detach() * mask), y).item()

    masks = []
    for places in combinations(range(12), 6):
        mask = torch.zeros(12)
        mask[list(places)] = 1
        masks.append(mask.view(3, 4))
    ranked = sorted(masks, key=loss)
    before = model[0].raw_weight.detach().clone()
    ticket = StrongSearch(epochs=150, gate=Bernoulli(), lr=0.05)(model, Points(), sparsity=0.5)
    assert ticket.finished and torch.equal(model[0].raw_weight, before)
    assert torch.equal(ticket.weights["0.weight"], before)
    # The best of 924, or next to it.
    assert loss(ticket.masks["0"].float()) <= loss(ranked[2])


def test_a_strong_ticket_brings_batchnorm_statistics_of_its_own() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    )
    sc.sparsify_(model)
    before = copy.deepcopy(model.state_dict())
    seen = []
    watch = lambda net: seen.append(evaluate(net, Blobs())) or seen[-1]  # noqa: E731
    ticket = StrongSearch(epochs=20, lr=0.05)(model, Blobs(), sparsity=0.6, watch=watch)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    network = ticket.apply_(copy.deepcopy(model)).eval()
    blobs = Blobs()
    hidden = network[0](blobs.x)
    torch.testing.assert_close(network[1].running_mean, hidden.mean(0), rtol=1e-3, atol=1e-3)
    assert 100 * accuracy(network) == pytest.approx(seen[-1], abs=3) and seen[-1] > 60
    for name in ("0.weight", "0.bias", "1.weight", "3.weight"):
        assert torch.equal(ticket.weights[name], before[name])


@pytest.mark.parametrize("weights", ["signed-constant", "scaled"])
def test_the_weights_that_are_searched_in(weights: str) -> None:
    """The ticket brings them; they are what the search computed with, and the model's stay."""
    model = sc.sparsify_(mlp())
    before = copy.deepcopy(model.state_dict())
    seen = []

    def watch(net: nn.Module) -> float:
        seen.append([layer.raw_weight.detach().clone() for layer in sc.sparse_layers(net).values()])
        return 0.0

    ticket = StrongSearch(epochs=1, weights=weights)(model, Blobs(), sparsity=0.75, watch=watch)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for (name, layer), used in zip(sc.sparse_layers(model).items(), seen[-1], strict=True):
        weight = layer.raw_weight.detach()
        size = (2 / weight.shape[1] / (0.25 if weights == "scaled" else 1)) ** 0.5
        expected = weight.sign() * size
        torch.testing.assert_close(ticket.weights[f"{name}.weight"], expected)
        assert torch.equal(used, ticket.weights[f"{name}.weight"])
        assert torch.equal(ticket.weights[f"{name}.bias"], before[f"{name}.bias"])
    assert ticket.meta["weights"] == weights
    with pytest.raises(ValueError, match="signed-constant, scaled, as-is"):
        StrongSearch(weights="random")
