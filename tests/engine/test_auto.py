"""engine="auto": what is tried, what is taken and why, what is remembered, and that trying leaves no trace."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Blobs, mlp, randn, seeded
from replay import Recording
from runs import images, masked, resident, same, small_data
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore import capture, planner
from sparsecore.control import CONTROLS
from sparsecore.data import Batches
from sparsecore.engine import EngineError, Given, TrainingStep, Way, auto, launch
from sparsecore.recipe import Recipe, optimizer_for
from sparsecore.search import ConcreteSearch, JointSearch
from sparsecore.training import Step, train

EAGER, GRAPH, LAST = Way(), Way(graph=True), Way(channels_last=True)
COMPILED, BOTH = Way(compiled=True), Way(graph=True, compiled=True)


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is remembered, in a file of the test's own."""
    planner._cache_at.cache_clear()
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))
    return tmp_path / "plans.json"


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


# --- Trials -----------------------------------------------------------------------------------------


def always(monkeypatch: pytest.MonkeyPatch, compiles: float = 0.0) -> None:
    """Trials in short runs too, and a way of `compiles` seconds is tried."""
    monkeypatch.setattr(auto, "FEW", 1)
    monkeypatch.setattr(auto, "SHORT", 0.0)
    monkeypatch.setattr(auto, "COMPILES", compiles)


RECIPE = Recipe(optimizer="adam", lr=1e-2, batch=4, epochs=2, ema=0.9, clip_norm=1.0)


@pytest.mark.parametrize("way", ["eager", "graph", "compile", "eager, channels_last"])
def test_trying_leaves_no_trace(
    way: str, recordings: list[Recording], eager_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever wins, the run is the one that this way was asked for."""
    always(monkeypatch)
    taken = Way.of(way)

    def choose(self: auto._Auto, best: Way) -> Way:
        compiles = self._time(COMPILED)  # an evaluation does not
        return taken if compiles and self._time(taken) else best

    monkeypatch.setattr(auto._Auto, "_compiled", choose)
    model = masked(images)
    history = train(model, resident(), resident(), RECIPE)
    assert history.engine.startswith(way) and model.training
    alone = masked(images)
    if taken.channels_last:
        alone = alone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = train(alone, resident(), resident(), RECIPE, engine=taken.name)
    if taken.channels_last:  # its data has one channel: either format
        torch.testing.assert_close(model.state_dict(), alone.state_dict())
    else:
        assert same(model, alone) and history.accuracy == expected.accuracy


@pytest.mark.parametrize("kind", [ConcreteSearch, JointSearch], ids=lambda k: k.__name__)
def test_trying_a_search_leaves_no_trace(
    kind: type[ConcreteSearch], eager_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = kind(epochs=3, dtype=torch.float32)
    batches = Batches(small_data(), "train", 4, seed=1)
    for way in (EAGER, COMPILED, LAST):
        alone = replace(search, engine=way.name, channels_last=way.channels_last)
        expected = alone(sc.sparsify_(images()), batches, sparsity=0.7)
        with monkeypatch.context() as patch:
            always(patch)
            choose = lambda self, best, way=way: self._time(COMPILED) and self._time(way) and way  # noqa: E731
            patch.setattr(auto._Auto, "_compiled", choose)
            found = search(sc.sparsify_(images()), batches, sparsity=0.7)
        assert found.hash == expected.hash
        assert found.meta | {"engine": ""} == expected.meta | {"engine": ""}
        assert found.meta["engine"] == str(way)


class Counting(nn.Module):
    """Python counts beside the step, which a graph does not."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.count = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.net(x) * (1 + self.count)


def test_a_model_that_counts_in_python_is_no_graph(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, compiles=1e9)
    model, alone, recipe = Counting(), Counting(), Recipe(epochs=2, lr=1e-3)
    history = train(model, Blobs(), None, recipe)
    train(alone, Blobs(), None, recipe, engine="eager")
    assert same(model, alone) and model.count == alone.count  # trials are not counted
    assert history.engine.startswith("eager: ")
    assert "it counts in Python, which a graph does not: count" in history.engine


class Drawing(Counting):
    """As above, where no module's own number tells."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", ()), len(x)]
        return self.net(x) * len(self.seen)


def test_a_model_whose_graph_gives_other_numbers_is_none(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, compiles=1e9)
    history = train(Drawing(), Blobs(), None, Recipe(epochs=2, lr=1e-3))
    assert "its graph gives other numbers" in history.engine


def test_a_graph_asked_for_tells_what_python_counts(
    recordings: list[Recording], caplog: pytest.LogCaptureFixture
) -> None:
    train(Counting(), Blobs(), None, Recipe(epochs=1, lr=1e-3), engine="graph")
    assert "a step counts in Python, which its graph will not: count" in caplog.text


class Assigning(nn.Module):
    """Its forward puts a new tensor in a buffer's place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.net(x - self.mean)


def test_buffers_that_a_forward_replaces(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph holds them, and trials put them back."""
    always(monkeypatch, compiles=1e9)
    recipe = Recipe(epochs=2, lr=0.05)
    model, alone = Assigning(), Assigning()
    history = train(model, Blobs(), None, recipe)
    train(alone, Blobs(), None, recipe, engine="eager")
    assert same(model, alone) and "writes into its buffers in place" in history.engine
    with pytest.raises(EngineError, match="writes into its buffers in place"):
        train(Assigning(), Blobs(), None, recipe, engine="graph")


@pytest.mark.parametrize("objective", [sc.objectives.gradients, sc.objectives.gradient_norm])
@pytest.mark.parametrize("control", ["gradbalance", "lagrangian"])
def test_searches_in_autograd_are_tried_without_a_trace(
    objective: sc.objectives.Objective, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = ConcreteSearch(
        epochs=4, objective=objective, control=CONTROLS[control](), ramp=0.5, start_density=0.6
    )
    expected = replace(search, engine="eager")(sc.sparsify_(mlp()), Blobs(), sparsity=0.7)
    always(monkeypatch, compiles=1e9)
    found = search(sc.sparsify_(mlp()), Blobs(), sparsity=0.7)
    assert found.hash == expected.hash and found.meta == expected.meta


def test_state_and_gradients_of_ones_own_survive_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimiser that has stepped a part, a gradient that waits, a parameter that nobody steps."""
    always(monkeypatch, compiles=1e9)
    model = mlp()
    head, x = model.get_submodule("2"), next(Blobs().epoch(0))
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    F.cross_entropy(model(x[0]), x[1]).backward()
    optimizer.step()
    optimizer.add_param_group({"params": [model.get_parameter("0.weight")]})
    before = copy.deepcopy(optimizer.state_dict())
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    sc.TrainStep(model, F.cross_entropy, optimizer, x, clip_norm=0.1)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, grads)


def test_what_was_remembered_and_is_impossible_now_is_told(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, compiles=1e9)
    monkeypatch.setattr(auto, "_LAYOUT", 0.0)
    faster = lambda self, best, way, share=1.0: way if self._time(way) and share else best  # noqa: E731
    monkeypatch.setattr(auto._Auto, "_faster", faster)
    assert train(images(), resident(), None, RECIPE).engine.startswith("graph: ")

    def fails(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "record", fails)
    told = train(images(), resident(), None, RECIPE).engine
    assert told.startswith("eager: ") and "graph: engine graph: the step cannot be captured" in told


def test_a_memory_format_of_ones_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is tried or goes wrong."""
    always(monkeypatch, compiles=1e9)

    def broken(step: Step) -> None:
        raise KeyboardInterrupt

    for share in (0.0, 1e9):  # of the time: never, and always
        monkeypatch.setattr(auto, "_LAYOUT", share)
        for last in (False, True):
            model = Flattening().net
            if last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            strides = [p.stride() for p in model.parameters()]
            net = nn.Sequential(model, nn.Flatten(), mlp(96, 4))
            train(net, resident(), None, RECIPE)
            assert [p.stride() for p in model.parameters()] == strides
            with pytest.raises(KeyboardInterrupt):
                train(net, resident(), None, RECIPE, after_step=broken)
            assert [p.stride() for p in model.parameters()] == strides


def test_three_dimensions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, compiles=1e9)
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 1), nn.Flatten(1, 2), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 4)
        )
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = randn(4, 1, 1, 6, 6), torch.arange(4)
    told = sc.TrainStep(net, F.cross_entropy, optimizer, x).told
    assert "channels_last: " in told and "Error" not in told


def test_a_loss_with_parameters_is_tried_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, compiles=1e9)
    model, centres = mlp(), mlp(4, 4, 4)
    before = [p.detach().clone() for p in centres.parameters()]
    optimizer = torch.optim.SGD([*model.parameters(), *centres.parameters()], 0.1)
    loss = lambda scores, y: F.cross_entropy(centres(scores), y)  # noqa: E731
    step = sc.TrainStep(model, loss, optimizer, next(Blobs().epoch(0)))
    assert all(map(torch.equal, centres.parameters(), before))
    step(*next(Blobs().epoch(0)))
    assert not any(map(torch.equal, centres.parameters(), before))


class Flattening(nn.Module):
    """`view` takes no activations in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1)))
        self.last = mlp(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x).view(len(x), -1))


@pytest.mark.parametrize("search", [None, ConcreteSearch(epochs=3), JointSearch(epochs=3)])
def test_a_model_that_another_memory_format_breaks_keeps_its_own(
    search: ConcreteSearch | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, compiles=1e9)
    model = sc.sparsify_(Flattening())
    if search is None:
        told = train(model, resident(), None, replace(RECIPE, ema=None)).engine
    else:
        told = search(model, resident(), sparsity=0.5).meta["engine"]
    assert told.startswith("eager") and "eager, channels_last:" not in told.partition(";")[0]
    assert all(p.is_contiguous() for p in model.parameters())
    if search is None:
        assert "eager, channels_last: RuntimeError: view size is not compatible" in told


def test_a_penalty_that_may_count_is_no_graph(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    penalty = lambda model: torch.stack([p.norm() for p in model.parameters()]).sum()  # noqa: E731
    history = train(mlp(), Blobs(), None, Recipe(epochs=1, lr=1e-3), penalty=penalty)
    assert history.engine == "eager, since its penalty may count or draw in Python"
    assert not recordings


# --- Compiled steps ---------------------------------------------------------------------------------


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
