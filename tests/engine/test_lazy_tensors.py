"""What a model keeps from an evaluation, as positions made when they are first needed, is fit for training."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import randn, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.batchnorm import recompute_statistics_
from sparsecore.training import Recipe, evaluate, train

Y = torch.arange(8) % 3
SHORT = [(randn(8, 5, 4), Y)]
LONG = [(randn(8, 9, 4), Y)]
ONCE = Recipe(epochs=1, lr=0.01)


class Rotary(nn.Module):
    """Keeps a table of positions, made anew when an input is longer than any before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.linspace(0.5, 1, x.shape[1])[:, None]
        return self.head(self.norm((self.embed(x) * self.table[: x.shape[1]]).mean(1)).relu())


def model() -> nn.Module:
    return sc.sparsify_(seeded(Rotary))


FIRST: dict[str, Callable[[nn.Module], object]] = {
    "evaluate": lambda net: evaluate(net, LONG),
    "evaluate a metric": lambda net: evaluate(net, LONG, metric="cross-entropy"),
    "tests of a training": lambda net: train(net, SHORT, LONG, ONCE),
    "BatchNorm's statistics": lambda net: recompute_statistics_(net, LONG),
    "a search's watch": lambda net: sc.Iterative(sc.scores.snip, 2)(
        net, SHORT, sparsity=0.2, watch=lambda m: evaluate(m, LONG)
    ),
    "a plan": lambda net: sc.plan_(net, "auto", LONG[0][0]),
}
THEN: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda net: train(net, LONG, LONG, Recipe(epochs=2, lr=0.01)),
    "joint": lambda net: sc.JointSearch(epochs=1)(net, LONG, sparsity=0.2),
    "snip": lambda net: sc.OneShot(sc.scores.snip)(net, LONG, sparsity=0.2),
}


@pytest.mark.filterwarnings("ignore::sparsecore.SparsityWarning")
@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("first", FIRST)
def test_a_tensor_made_in_evaluation_is_trained_with(first: str, then: str) -> None:
    net = model()
    FIRST[first](net)
    assert net.table is None or not net.table.is_inference()
    if first == "a plan":
        sc.plan_(net, "mask")
    THEN[then](net)
    assert evaluate(copy.deepcopy(net), LONG) == evaluate(net, LONG)
