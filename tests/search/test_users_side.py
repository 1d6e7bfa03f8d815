"""What users bring along: numbers that they watch, weights in half precision, soft targets, models that cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, mlp, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.search import SearchError
from sparsecore.training import Recipe, evaluate, train

ADAM = Recipe(optimizer="adam", lr=1e-2)
WATCHING: dict[str, Any] = {
    "joint": sc.JointSearch(epochs=1),
    "continuous": sc.ContinuousSparsification(epochs=1),
    "edge-popup": sc.EdgePopup(epochs=1),
    "rewinding": sc.Rewinding(ADAM, 1, rate=0.5),
    "gradual": sc.GradualMagnitude(ADAM, 1, updates=2),
    "iterative": sc.Iterative(sc.scores.snip, rounds=1),
}


@pytest.mark.parametrize("number", [torch.tensor(2.0), np.float32(2), torch.tensor([2.0]), 2])
@pytest.mark.parametrize("name", WATCHING)
def test_what_is_watched_is_a_number_of_any_library(name: str, number: Any, tmp_path: Path) -> None:
    model = sc.sparsify_(mlp())
    ticket = WATCHING[name](model, Blobs(), sparsity=0.5, watch=lambda model: number)
    ticket.save(tmp_path / "t.safetensors")
    assert ticket.meta["progress"][-1]["accuracy"] == 2.0


@pytest.mark.parametrize("name", WATCHING)
def test_what_is_watched_is_told_if_it_is_none(name: str) -> None:
    with pytest.raises(SearchError, match=r"watch: expected a function.*got a NoneType"):
        WATCHING[name](sc.sparsify_(mlp()), Blobs(), sparsity=0.5, watch=lambda model: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["joint", "continuous", "edge-popup"])
def test_gates_want_weights_of_full_precision(name: str, dtype: torch.dtype) -> None:
    model = sc.sparsify_(mlp()).to(dtype)
    data = [(x.to(dtype), y) for x, y in Blobs().epoch(0)]
    with pytest.raises(ValueError, match=r"layer 0: expected weights of float32"):
        WATCHING[name](model, data, sparsity=0.5)


@pytest.mark.parametrize("name", ["joint", "continuous", "edge-popup"])
def test_double_precision_is_searched_or_refused_by_name(name: str) -> None:
    model = sc.sparsify_(mlp()).double()
    data = [(x.double(), y) for x, y in Blobs().epoch(0)]
    if name == "joint":
        with pytest.raises(
            ValueError, match=r"layer 0: expected weights of float32 under gates, got float64"
        ):
            WATCHING[name](model, data, sparsity=0.5)
    else:
        assert WATCHING[name](model, data, sparsity=0.5).sparsity > 0.4


def test_grasp_of_soft_targets_is_that_of_their_loss() -> None:
    """Of one batch, on which the temperature makes both gradients alike but for their scale."""
    model = sc.sparsify_(mlp())
    x, y = next(Blobs().epoch(0))
    soft = F.one_hot(y, 4).float()
    found = sc.scores.grasp(model, [(x, soft)], 0, loss="cross-entropy")
    hard = sc.scores.grasp(model, [(x, y)], 0, per_class=10**6)
    for name, score in found.items():
        torch.testing.assert_close(score, hard[name])


class Caching(nn.Module):
    """Makes positions when first asked for as many."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.positions = nn.Linear(4, 8), nn.Linear(8, 3), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.positions) < x.shape[1]:
            self.positions = torch.linspace(0.5, 1, x.shape[1])[:, None]
        return self.b((self.a(x) * self.positions[: x.shape[1]]).mean(1))


def test_what_a_model_keeps_of_an_evaluation_trains() -> None:
    model, y = sc.sparsify_(seeded(Caching)), torch.arange(8) % 3
    short, long = [(randn(8, 5, 4), y)], [(randn(8, 9, 4), y)]
    evaluate(model, long)
    train(model, short, long, Recipe(lr=0.01, epochs=2, batch=8))
    assert sc.JointSearch(epochs=1)(model, short, sparsity=0.5)
