"""Objectives that compare class scores are refused where there are none, in a line that names another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Blobs, mlp, rand, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore import objectives


class Pair(nn.Module):
    """Gives class scores and features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.a(x))
        return self.b(h), h


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    loss: Any
    target: Callable[[Tensor], Tensor] = lambda y: y


CASES = {
    "tuple": Case(lambda: seeded(Pair), lambda output, y: F.cross_entropy(output[0], y)),
    "of the model": Case(
        lambda: seeded(Pair), lambda model, b: F.cross_entropy(model(b[0])[0], b[1])
    ),
    "several labels": Case(
        mlp, nn.BCEWithLogitsLoss(), lambda y: (y[:, None] > torch.arange(4)).float()
    ),
    "their numbers": Case(
        mlp,
        lambda output, y: F.binary_cross_entropy_with_logits(output, y.float()),
        lambda y: (y[:, None] > torch.arange(4)).long(),
    ),
    "regression": Case(
        lambda: mlp(classes=1), nn.MSELoss(), lambda y: y[:, None].float()
    ),
    "by name": Case(lambda: mlp(classes=1), "bce", lambda y: (y > 1).float()),
}  # fmt: skip


@pytest.mark.parametrize("objective", [objectives.reverse_kl, objectives.features])
@pytest.mark.parametrize("kind", CASES)
def test_teachers_of_no_class_scores_are_refused(kind: str, objective: Any) -> None:
    case = CASES[kind]
    model = sc.sparsify_(case.build())
    data = [(x, case.target(y)) for x, y in Blobs().epoch(0)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"objectives\.task") as error:
        sc.ConcreteSearch(epochs=1, objective=objective)(model, data, sparsity=0.5, loss=case.loss)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    task = sc.ConcreteSearch(epochs=1, objective=objectives.task)
    assert task(model, data, sparsity=0.5, loss=case.loss)


def test_tokens_without_targets_say_where_their_classes_are() -> None:
    build = lambda: nn.Sequential(nn.Embedding(9, 8), nn.ReLU(), nn.Linear(8, 9))  # noqa: E731
    model, data = sc.sparsify_(seeded(build), "!0"), [(9 * rand(8, 5)).long()] * 2

    def following(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    search = sc.ConcreteSearch(epochs=1)
    with pytest.raises(ValueError, match="class_axis"):
        search(model, data, sparsity=0.5, loss=following)
    assert search(model, data, sparsity=0.5, loss=sc.Loss(following, class_axis=-1))


class Stopped(nn.Module):
    """Its output hangs on no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.free = nn.Linear(12, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).detach() + self.free


@pytest.mark.parametrize(
    "search", [sc.StrongSearch(epochs=1), sc.ConcreteSearch(epochs=1)], ids=["strong", "cts"]
)
def test_an_objective_that_no_gate_moves_is_told(search: Any) -> None:
    model = sc.sparsify_(seeded(Stopped))
    with pytest.raises(ValueError, match="expected one that depends on gates"):
        search(model, Blobs(), sparsity=0.5)
