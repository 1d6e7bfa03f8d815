"""Compiled steps are the steps to rounding, and are compiled once."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Blobs, mlp
from runs import RECIPE, images, masked, resident, small_data

import sparsecore as sc
from sparsecore.data import Batches
from sparsecore.engine import EngineError
from sparsecore.search import ConcreteSearch, JointSearch
from sparsecore.training import train


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("plan", ["mask", "state", "compact"])
def test_a_compiled_run_is_the_run_to_rounding(plan: str, eager_compiler: None) -> None:
    torch._dynamo.utils.counters.clear()
    expected, found = masked(images, plan), masked(images, plan)
    recipe = replace(RECIPE, optimizer="sgd", lr=0.05)
    train(expected, resident(), None, recipe, engine="eager")
    train(found, resident(), None, recipe, engine="compile")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    assert compilations() == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_one_compiled_step_serves_all_rounds(eager_compiler: None) -> None:
    torch._dynamo.utils.counters.clear()
    recipe = replace(RECIPE, ema=None)
    search = sc.Rewinding(recipe, epochs=1, engine="compile")
    found = search(sc.sparsify_(images()), resident(), sparsity=0.6)
    assert len(found.meta["rounds"]) == 5 and compilations() == 1


def test_a_compiled_search_step_is_the_step_to_rounding(eager_compiler: None) -> None:
    batches = Batches(small_data(), "train", 4, seed=1)
    for search in (ConcreteSearch(epochs=4), JointSearch(epochs=4)):
        torch._dynamo.utils.counters.clear()
        eager, compiled = (
            replace(search, engine=name)(sc.sparsify_(images()), batches, sparsity=0.7)
            for name in ("eager", "compile")
        )
        losses: list[Any] = [t.meta["objective_by_epoch"] for t in (eager, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert compilations() <= 2  # gates drawn, and all open


def test_steps_that_are_not_compiled_say_so() -> None:
    search = ConcreteSearch(epochs=2, objective=sc.objectives.gradients, engine="compile")
    with pytest.raises(EngineError, match="PlainStep is not compiled; use eager or graph"):
        search(sc.sparsify_(mlp()), Blobs(), sparsity=0.5)
