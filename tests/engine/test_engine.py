"""The engine: a run whose steps are graphs is the run that Python launches, bit for bit, whatever happens between."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Blobs, mlp, randn
from replay import Recording
from runs import images, loaded, masked, points, resident, same, small_data
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.batches import EpochBatches
from sparsecore.data import Batches
from sparsecore.engine import EngineError, Evaluation, Timeline, Way
from sparsecore.recipe import Recipe
from sparsecore.regions import Repellent
from sparsecore.search import ContinuousSparsification, EdgePopup, GradualMagnitude, RigL
from sparsecore.search.sparse_training import masks_of
from sparsecore.tickets import dense_state
from sparsecore.training import Step, train

SGD = Recipe(lr=0.05, weight_decay=1e-3, batch=4, epochs=3, milestones=(0.4,), warmup_epochs=0.5)
ADAM = replace(SGD, optimizer="adam", lr=1e-2)


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module] = images
    batches: Callable[[], EpochBatches] = resident
    recipe: Recipe = SGD
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "sgd": Case(),
    "nesterov": Case(recipe=replace(SGD, nesterov=True)),
    "adam, clipped": Case(recipe=replace(ADAM, clip_norm=0.5, label_smoothing=0.1)),
    "adamw, cosine": Case(recipe=replace(ADAM, optimizer="adamw", schedule="cosine")),
    "no momentum": Case(recipe=replace(SGD, momentum=0.0, warmup_epochs=0)),
    "average": Case(recipe=replace(SGD, ema=0.9)),
    "micro-batches": Case(recipe=replace(SGD, accumulate=2)),
    "bf16": Case(recipe=replace(SGD, amp="bf16")),
    "mask": Case(lambda: masked(images)),
    "plan state": Case(lambda: masked(images, "state")),
    "plan compact": Case(lambda: masked(images, "compact"), recipe=ADAM),
    "parts of epochs": Case(options={"start_epoch": 0.4, "stop_epoch": 2.6, "snapshots": (1.5,)}),
    "a loader": Case(mlp, loaded),
    "a loader, dropout": Case(points, loaded, ADAM),
    "penalty": Case(
        lambda: masked(mlp), loaded,
        options={"penalty": Repellent([dense_state(masked(lambda: mlp(seed=5)))], 0.5)},
    ),
}  # fmt: skip


def run(case: Case, engine: str, **options: Any) -> tuple[nn.Module, sc.training.History]:
    model = case.model()
    given = case.options | options
    history = train(
        model, case.batches(), case.batches(), case.recipe, engine=engine, seed=3, **given
    )
    return model, history


def told(history: sc.training.History) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in history.epochs]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_run_of_graphs_is_the_run(case: Case, recordings: list[Recording]) -> None:
    eager, expected = run(case, "eager")
    assert not recordings
    graph, found = run(case, "graph")
    assert same(graph, eager) and told(found) == told(expected)
    for epoch, state in expected.snapshots.items():
        assert all(torch.equal(v, found.snapshots[epoch][k]) for k, v in state.items())
    # A step and an evaluation; nothing of either touches the host.
    assert len(recordings) == 2 and [r.touches for r in recordings] == [[], []]
    assert found.engine == "graph"


def test_a_graph_keeps_all_that_it_reads(recordings: list[Recording]) -> None:
    model = images()
    step = sc.TrainStep(
        model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True),
        (randn(4, 1, 6, 6), torch.arange(4)), engine="graph",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            step(randn(4, 1, 6, 6), torch.arange(4))
    graph = step._engine.captured
    del step, model
    assert recordings[0].lost() == 0
    del graph


@pytest.mark.parametrize("kind", ["sgd", "average", "plan compact", "a loader, dropout"])
def test_a_run_that_was_killed_goes_on_as_it_was_launched(
    kind: str, tmp_path: Path, recordings: list[Recording]
) -> None:
    case = CASES[kind]
    whole, expected = run(case, "eager")
    path = tmp_path / "checkpoint"

    class Killed(Exception):
        pass

    def kill(step: Step) -> None:
        if step.index == 7:
            raise Killed

    with pytest.raises(Killed):
        run(case, "graph", checkpoint=path, after_step=kill)
    resumed, history = run(case, "auto", checkpoint=path)
    assert same(resumed, whole) and told(history) == told(expected)
    # Two parts of the run, and the first one's evaluation: what is left is too short for that.
    assert history.engine == "graph" and len(recordings) == 3


def test_another_mask_is_captured_anew(recordings: list[Recording]) -> None:
    """RigL and gradual pruning change masks between replays."""
    for search in (RigL(SGD, 3, interval=4, drop=0.5), GradualMagnitude(ADAM, 3, updates=3)):
        recordings.clear()
        tickets = [
            replace(search, engine=engine)(sc.sparsify_(images()), resident(), sparsity=0.6)
            for engine in ("eager", "graph")
        ]
        eager, graph = tickets
        assert graph.hash == eager.hash
        assert graph.meta == eager.meta | {"engine": "graph"}
        assert all(torch.equal(w, eager.weights[k]) for k, w in graph.weights.items())
        assert len(recordings) == 1 + graph.meta["updates"]


@pytest.mark.parametrize(
    "search",
    [
        ContinuousSparsification(3, recipe=replace(ADAM, clip_norm=1.0)),
        EdgePopup(3),
    ],
    ids=lambda s: type(s).__name__,
)
def test_searches_in_plain_steps_are_graphs_too(
    search: ContinuousSparsification | EdgePopup, recordings: list[Recording]
) -> None:
    eager, graph = (
        replace(search, engine=engine)(sc.sparsify_(images()), resident(), sparsity=0.6)
        for engine in ("eager", "graph")
    )
    assert graph.hash == eager.hash and graph.meta | {"engine": "eager"} == eager.meta
    assert [r.touches for r in recordings] == [[]]


def test_what_a_callback_sees_of_a_batch_is_the_batch(recordings: list[Recording]) -> None:
    """Not the graph's own memory, which later kernels of the step have overwritten."""
    for batches in (resident, loaded):
        model = images() if batches is resident else mlp()
        expected = [b for e in range(3) for b in batches().epoch(e)]
        seen: list[Tensor] = []

        def keep(step: Step, seen: list[Tensor] = seen) -> None:
            seen.extend(t.clone() for t in step.batch)

        train(model, batches(), None, SGD, engine="graph", after_step=keep)
        flat = [t for batch in expected for t in batch]
        assert len(seen) == len(flat) and all(map(torch.equal, seen, flat))


# --- Loops of one's own -----------------------------------------------------------------------------


def own_loop(engine: str, optimizer: str, scheduler: bool = True) -> tuple[list[Tensor], nn.Module]:
    model = masked(images)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    made = kind(model.parameters(), lr=0.05, weight_decay=0.01, fused=True)
    batches = list(resident().epoch(0))
    step = sc.TrainStep(model, F.cross_entropy, made, batches[0], engine=engine, clip_norm=1.0)
    rate = torch.optim.lr_scheduler.StepLR(made, 3, 0.5)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i, (x, y) in enumerate([*batches, *batches, *batches]):
            losses.append(step(x, y))
            rate.step()
            if i == 6:
                masks = masks_of(model)
                masks["0"] = masks["0"] & (torch.arange(6) > 1)[:, None, None, None]
                sc.remask_(model, masks, made)
            if i == 8:
                model.get_submodule("1").eval()
    return losses, model


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loop_of_ones_own_may_change_everything_between_steps(
    optimizer: str, recordings: list[Recording]
) -> None:
    expected, eager = own_loop("eager", optimizer)
    found, graph = own_loop("graph", optimizer)
    # A rate on the device is rounded to float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graph.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-6)
    assert len(recordings) == 3  # the mask, and a mode, made it another step


def test_rates_frozen_weights_precision_and_loaded_state_are_seen(
    recordings: list[Recording],
) -> None:
    def run(engine: str) -> tuple[list[Tensor], nn.Module]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
        x, y = next(Blobs().epoch(0))
        step = sc.TrainStep(model, F.cross_entropy, optimizer, (x, y), engine=engine)
        losses, state = [], copy.deepcopy(optimizer.state_dict())
        for i in range(15):
            if i == 3:
                optimizer.param_groups[0]["lr"] = 0.01  # as loops without a scheduler do
            if i == 6:
                state = copy.deepcopy(optimizer.state_dict())
            if i == 9:
                optimizer.load_state_dict(state)
            if i == 12:
                next(model.parameters()).requires_grad_(False)
            losses.append(step(x, y))
        with torch.autocast("cpu", torch.bfloat16):  # around all of them: nothing cast is kept
            losses += [step(x, y) for _ in range(4)]
        return losses, model

    expected, eager = run("eager")
    found, graph = run("graph")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(graph.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-6)
    assert len(recordings) == 4


def test_steps_that_are_another_one_each_time_are_launched_by_themselves(
    recordings: list[Recording], caplog: pytest.LogCaptureFixture
) -> None:
    model = mlp()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)  # its rate is a number of Python's
    x, y = next(Blobs().epoch(0))
    step = sc.TrainStep(model, F.cross_entropy, optimizer, (x, y), engine="graph")
    rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(20):
        step(x, y)
        rate.step()
    assert not recordings and "launched one by one from here on" in caplog.text


class Frozen:
    """In place of `torch.cuda.make_graphed_callables`: what it was called with, and that it counted."""

    calls = 0

    def __call__(self, model: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
        self.calls += 1
        plain = model.forward
        plain(*example)  # moves BatchNorm's statistics, as its own tries do
        model.forward = lambda *x: plain(*x) * 1
        return model


def test_a_graphed_model_is_the_model(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = Frozen()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", frozen)
    x = randn(4, 1, 6, 6)
    plain, model = masked(images), masked(images)
    for net in (model, plain):  # no dropout: its draws are the graph's own
        net.get_submodule("4").p = 0.0  # type: ignore[assignment]
    made = sc.graphed(model, x)
    assert made is model
    for inputs in (x, x, x[:2], x):
        torch.testing.assert_close(model(inputs), plain(inputs))
    assert frozen.calls == 1 and same(model, plain)
    for net in (model, plain):
        sc.remask_(net, {"0": ~masks_of(net)["0"]})
    torch.testing.assert_close(model(x), plain(x))
    assert frozen.calls == 2
    other = copy.deepcopy(model)  # computes with its own weights
    with torch.no_grad():
        other.get_parameter("5.bias").zero_()
    y = model(x)
    torch.testing.assert_close(plain(x), y)
    assert not torch.equal(other(x), y) and frozen.calls == 2
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    assert frozen.calls == 2
    model.train()
    for _ in range(2):  # in another precision the graph would be another one
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert frozen.calls == 3


# --- What cannot be ---------------------------------------------------------------------------------


def test_names_and_devices_are_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"engine: expected one of auto, eager, .* got 'fast'"):
        train(mlp(), loaded(), None, SGD, engine="fast")
    with pytest.raises(EngineError, match="engine graph: expected a GPU for graphs, got cpu"):
        train(mlp(), loaded(), None, SGD, engine="graph")
    with pytest.raises(ValueError, match="expected one of auto"):
        RigL(SGD, 3, engine="fast")
    assert Way.of("compile-graph, channels_last") == Way(True, True, True)


def test_a_step_that_reads_a_value_is_told(
    recordings: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsecore import capture

    def fails(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "record", fails)
    with pytest.raises(
        EngineError, match=r"cannot be captured \(operation not .*; use engine=eager"
    ):
        train(mlp(), loaded(), None, SGD, engine="graph")


def test_a_timeline_gives_every_step_its_numbers() -> None:
    line = Timeline({"a": [1.0, 2.0, 3.0], "b": [5.0, 6.0, 7.0]}, torch.device("cpu"))
    now = line.now["b"]
    line.to(1)
    line.advance()
    assert line.now["a"].item() == 2 and now.item() == 6
    line.advance()
    assert now.item() == 7 and now is line.now["b"]


def test_an_evaluation_counts_each_sample_once(recordings: list[Recording]) -> None:
    model, batches = images(), Batches(small_data(), "test", 4, shuffle=False)
    counted = [model.eval()(x).argmax(-1) == y for x, y in batches.epoch(0)]
    expected = 100 * float(torch.cat(counted).double().mean())
    model.train()
    graph = Evaluation(model, batches, engine="graph")
    assert (
        [graph.measure().accuracy for _ in range(3)]
        == [expected] * 3
        == [sc.evaluate(model, batches)] * 3
    )
    assert model.training and len(recordings) == 1
