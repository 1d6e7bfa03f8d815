"""`watch` may give its number in any kind, and what is none is told when it is first asked."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, accuracy, mlp, normed
from torch import nn

import sparsecore as sc
from sparsecore.search import Search, SearchError
from sparsecore.training import Recipe, evaluate, train

ADAM = Recipe(optimizer="adam", lr=1e-2)
SEARCHES: dict[str, Search] = {
    "joint": sc.JointSearch(epochs=2),
    "cts": sc.ConcreteSearch(epochs=2),
    "continuous": sc.ContinuousSparsification(epochs=2),
    "strong": sc.StrongSearch(epochs=2),
    "edge-popup": sc.EdgePopup(epochs=2),
    "ltr": sc.Rewinding(ADAM, 1, rate=0.5),
    "gmp": sc.GradualMagnitude(ADAM, 2, updates=3),
    "gradual": sc.GradualMagnitude(ADAM, 2, updates=3, rewind=True),
    "rigl": sc.RigL(ADAM, 2, interval=2),
    "set": sc.SET(ADAM, 2),
    "iterative-snip": sc.Iterative(sc.scores.snip, 2),
}
NUMBERS: dict[str, Callable[[float], Any]] = {
    "tensor": torch.tensor,
    "tensor of one entry": lambda v: torch.tensor([[v]], dtype=torch.float64),
    "tensor with a gradient": lambda v: torch.tensor(v, requires_grad=True) * 1,
    "bfloat16": lambda v: torch.tensor(v).bfloat16(),
    "numpy": np.float32,
    "array": lambda v: np.array([v]),
    "integer": int,
    "numpy's integer": np.int64,
    "bool": bool,
    "numpy's bool": np.bool_,
}
OTHERS: dict[str, Any] = {
    "none": None,
    "text": "93.1",
    "several": torch.ones(2),
    "an array": np.ones(3),
    "no entry": torch.ones(0),
    "a pair": (1.0, 2.0),
    "complex": 1j,
    "beyond floats": 10**400,
}


@pytest.mark.filterwarnings("ignore::sparsecore.SparsityWarning")
@pytest.mark.parametrize("name", SEARCHES)
def test_a_tensor_is_as_good_as_a_number(name: str, tmp_path: Path) -> None:
    tickets = [
        SEARCHES[name](
            sc.sparsify_(mlp()),
            Blobs(),
            sparsity=0.5,
            watch=lambda model, kind=kind: kind(accuracy(model)),
            checkpoint=tmp_path / f"{i}",
        )
        for i, kind in enumerate([float, torch.tensor])
    ]
    tickets[1].save(tmp_path / "ticket")
    said = [[record.get("accuracy") for record in t.meta["progress"]] for t in tickets]
    assert said[0] == said[1] == pytest.approx(said[0]) and said[0][-1] is not None
    assert all(type(value) is float for value in said[1])


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_all_kinds(kind: str, tmp_path: Path) -> None:
    history = train(
        mlp(), Blobs(), None, Recipe(epochs=1), watch=lambda m: NUMBERS[kind](1.0),
        metrics=tmp_path / "metrics", checkpoint=tmp_path / "run", engine="eager",
    )  # fmt: skip
    assert history.epochs[0]["watched"] == 1.0 and type(history.epochs[0]["watched"]) is float
    ticket = SEARCHES["edge-popup"](
        sc.sparsify_(mlp()), Blobs(), sparsity=0.5, watch=lambda m: NUMBERS[kind](1.0)
    )
    assert [record["accuracy"] for record in ticket.meta["progress"]] == [1.0, 1.0]


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_number_is_told_in_a_line(kind: str) -> None:
    asked = []

    def watch(model: nn.Module) -> Any:
        asked.append(1)
        return OTHERS[kind]

    line = "watch: expected a function of the model that gives a number, got "
    with pytest.raises(ValueError, match=line) as found:
        train(mlp(), Blobs(), None, Recipe(epochs=2), watch=watch, engine="eager")
    assert "\n" not in str(found.value) and len(asked) == 1
    for name, search in SEARCHES.items():
        asked.clear()
        with pytest.raises(SearchError, match=line):
            search(sc.sparsify_(mlp()), Blobs(), sparsity=0.5, watch=watch)
        assert len(asked) == 1, name


@pytest.mark.filterwarnings("ignore::sparsecore.SparsityWarning")
@pytest.mark.parametrize("name", SEARCHES)
def test_a_last_batch_of_one_in_what_is_watched(name: str) -> None:
    """Some searches are watched on BatchNorm's statistics of the batch, which one sample has none of."""
    blobs, model = Blobs(), sc.sparsify_(normed())
    tests = [(blobs.x[:16], blobs.y[:16]), (blobs.x[16:17], blobs.y[16:17])]
    seen = []

    def watch(net: nn.Module) -> float:
        seen.append(evaluate(net, tests))
        return seen[-1]

    SEARCHES[name](model, blobs, sparsity=0.5, watch=watch)
    assert seen and all(0 <= value <= 100 for value in seen)
    assert evaluate(model, tests) == pytest.approx(100 * accuracy_of(model, blobs, 17))


def accuracy_of(model: nn.Module, blobs: Blobs, count: int) -> float:
    with torch.no_grad():
        found = copy.deepcopy(model).eval()(blobs.x[:count]).argmax(1)
    return float((found == blobs.y[:count]).float().mean())


def test_an_error_of_the_user_s_own_stays_what_it_is() -> None:
    def watch(model: nn.Module) -> float:
        raise KeyError("accuracy")

    with pytest.raises(KeyError, match="accuracy"):
        SEARCHES["edge-popup"](sc.sparsify_(mlp()), Blobs(), sparsity=0.5, watch=watch)
