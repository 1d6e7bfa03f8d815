"""Trials of engine="auto" leave no trace, and what a graph cannot repeat is none."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Blobs, mlp, randn, seeded
from replay import Recording
from runs import RECIPE, always, images, masked, resident, same, small_data
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore import capture
from sparsecore.control import CONTROLS
from sparsecore.data import Batches
from sparsecore.engine import EngineError, Way, auto
from sparsecore.recipe import Recipe
from sparsecore.search import ConcreteSearch, JointSearch
from sparsecore.training import Step, train

EAGER, GRAPH, LAST = Way(), Way(graph=True), Way(channels_last=True)
COMPILED, BOTH = Way(compiled=True), Way(graph=True, compiled=True)


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


@pytest.mark.parametrize("plan", ["state", "csr", "compact"])
def test_planned_convolutions_are_tried_in_another_memory_format(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their parameters are vectors, and no image is among them."""
    always(monkeypatch, compiles=1e9)
    build = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 4))  # noqa: E731
    model = sc.sparsify_(seeded(build))
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(randn(*layer.weight_shape, seed=i) > 0)
    sc.plan_(model, plan)
    assert all(p.ndim == 1 for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = randn(8, 1, 6, 6), torch.arange(8) % 4
    told = sc.TrainStep(model, F.cross_entropy, optimizer, x).told
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
