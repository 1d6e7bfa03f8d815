"""engine="auto": what is tried, what is taken and why, and what is remembered."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers import randn
from replay import Recording
from runs import images
from torch.nn import functional as F

from sparsecore import planner
from sparsecore.engine import EngineError, Given, TrainingStep, Way, auto, launch
from sparsecore.recipe import Recipe, optimizer_for

EAGER, GRAPH, LAST = Way(), Way(graph=True), Way(channels_last=True)
COMPILED, BOTH = Way(compiled=True), Way(graph=True, compiled=True)


class Clock:
    """In place of trials: what each way takes, in ms; text refuses it."""

    def __init__(self, times: Mapping[Way, float | str], compiling: float) -> None:
        self.times, self.compiling = times, compiling
        self.asked: list[Way] = []

    def __call__(self, step: TrainingStep, way: Way) -> auto.Tried:
        self.asked.append(way)
        found = self.times[way]
        if isinstance(found, str):
            raise EngineError(found)
        return auto.Tried(found / 1e3, self.compiling if way.compiled else 0.0)


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    times: Mapping[Way, float | str],
    steps: int,
    *,
    compiling: float = 20.0,
    layouts: bool = False,
) -> tuple[Way, Clock, str]:
    clock = Clock(times, compiling)
    monkeypatch.setattr(auto._Auto, "_tried", lambda self, *args: clock(*args))
    eager = times[EAGER]
    quick = auto.Tried(eager / 1e3 if isinstance(eager, float) else 1.0, 0.0)
    monkeypatch.setattr(auto._Auto, "_run", lambda self, *args, most: (quick, 0.0))
    model = images()
    step = TrainingStep(model, F.cross_entropy, optimizer_for(list(model.parameters()), Recipe()))
    feed = Given(torch.device("cpu"))
    feed.now = (randn(4, 1, 6, 6), torch.arange(4)), None
    engine = launch(step.become, feed, engine="auto", steps=steps, layouts=layouts)
    return engine.way, clock, engine.told


TIMES = {EAGER: 15.0, GRAPH: 4.0, BOTH: 2.0, COMPILED: 9.0}


@pytest.mark.parametrize(
    ("steps", "way", "asked"),
    [
        (auto.FEW - 1, EAGER, []),  # over before anything has been tried
        (300, EAGER, []),  # 4.5 s
        (400, GRAPH, [EAGER, GRAPH]),  # 6 s; compiling cannot pay
        (90_000, BOTH, [EAGER, GRAPH, BOTH]),
    ],
)
def test_longer_runs_try_more(
    steps: int, way: Way, asked: list[Way],
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found, clock, told = chosen(monkeypatch, TIMES, steps)
    assert (found, clock.asked) == (way, asked)
    assert told.startswith(str(way)) == bool(told) == (GRAPH in asked)
    assert ("4 ms" in told) == (GRAPH in asked)


def test_compiling_counts(monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    """272 ms a step, 195 compiled: of 1,500 steps, 408 s are left to 312 s with 20 s of compiling, but not with 80."""
    times = {EAGER: 272.0, COMPILED: 195.0}
    assert chosen(monkeypatch, times, 1500)[0] == COMPILED
    memory.unlink()
    planner._cache_at.cache_clear()
    way, clock, told = chosen(monkeypatch, times, 1500, compiling=80.0)
    assert way == EAGER and clock.asked == [EAGER, COMPILED] and "compile: 195 ms" in told
    # What is known of it decides in shorter runs too, and longer ones.
    assert chosen(monkeypatch, times, 1000)[0] == EAGER
    assert chosen(monkeypatch, times, 5000)[0] == COMPILED


def test_a_gain_below_a_tenth_is_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {EAGER: 367.0, COMPILED: 334.0}, 100_000)[0] == EAGER


def test_another_memory_format_is_taken_where_it_wins(
    monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    refused = {COMPILED: "no compiler", Way(False, True, True): "no compiler"}
    slow = {EAGER: 100.0, LAST: 98.0} | refused
    assert chosen(monkeypatch, slow, 50_000, layouts=True)[0] == EAGER
    memory.unlink()
    planner._cache_at.cache_clear()
    way, clock, told = chosen(monkeypatch, slow | {LAST: 80.0}, 50_000, layouts=True)
    assert way == LAST and clock.asked[-1] == Way(False, True, True)
    assert told == (
        "eager, channels_last: 80 ms a step; eager: 100 ms; compile, channels_last: no compiler"
    )


def test_what_was_measured_is_remembered(monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    times = {EAGER: 272.0, COMPILED: 195.0}
    chosen(monkeypatch, times, 5000)
    assert memory.exists()
    planner._cache_at.cache_clear()
    way, clock, _ = chosen(monkeypatch, dict.fromkeys(times, "asked again"), 5000)
    assert way == COMPILED and clock.asked == []


def test_a_step_that_no_graph_can_hold_is_launched(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    way, _, told = chosen(monkeypatch, TIMES | {GRAPH: "it reads a value"}, 400)
    assert way == EAGER and "graph: it reads a value" in told
