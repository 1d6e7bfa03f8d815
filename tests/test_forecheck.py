"""What a search would refuse after hours of training it refuses at once, and looks at the model alone."""

import pytest
import torch
from helpers import randn, seeded
from torch import nn

import sparsecore as sc
from sparsecore import objectives, scores
from sparsecore.forecheck import check_search
from sparsecore.granularity import NM
from sparsecore.search import OneShot, Rewinding
from sparsecore.sparsities import uniform_densities
from sparsecore.training import Recipe


def net(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return sc.sparsify_(
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                activation(),
                nn.Dropout(),
                nn.Flatten(),
                nn.Linear(16, 3),
            )
        )
    )


@pytest.mark.parametrize(
    ("search", "sparsity", "message"),
    [
        (sc.ConcreteSearch(), 0.0, "0 < sparsity < 1 for a search"),
        (Rewinding(Recipe(), epochs=1), 0.0, "0 < sparsity < 1 for a search"),
        (OneShot(scores.snip), 1.0, "0 <= sparsity < 1"),
        (OneShot(scores.snip, NM(1, 2)), 0.3, "allows at most"),
        (OneShot(scores.snip, NM(1, 2), 0, uniform_densities), 0.3, "allows at most"),
        (sc.ConcreteSearch(granularity=NM(1, 2)), 0.3, "allows at most"),
        (sc.ConcreteSearch(epochs=10**7), 0.5, "expected at most 1,000,000, got 10,000,000"),
        (sc.JointSearch(pace=1e9), 0.5, "expected at most 1,000,000"),
        (Rewinding(Recipe(), epochs=1e9), 0.5, "expected at most 1,000,000"),
        (sc.ConcreteSearch(objective=objectives.features), 0.5, "has no activation module"),
    ],
)
def test_refused(search, sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_search(search, net(nn.Identity), sparsity, randn(2, 3, 4, 4))


@pytest.mark.parametrize("search", [
    OneShot(scores.grasp), sc.ConcreteSearch(objective=objectives.gradients),
    sc.ConcreteSearch(objective=objectives.gradient_norm),
])  # fmt: skip
def test_models_that_cannot_be_differentiated_twice(search) -> None:
    x = randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="not implemented"):
        check_search(search, net(nn.Hardsigmoid), 0.5, x)
    model = net(nn.GELU)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_search(search, model, 0.5, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "search", [OneShot(scores.snip), OneShot(scores.synflow), OneShot(scores.magnitude)]
)
def test_nothing_is_refused_that_works(search) -> None:
    check_search(search, net(nn.Hardsigmoid), 0.0, randn(2, 3, 4, 4))
