"""Real graphs and a real compiler: runs of digits, loaders, searches and loops of one's own are what Python launches.

Convolutions are deterministic and in float32 here, so that ways differ by rounding alone: 6e-8 of a number, which the
24 steps of these runs enlarge less than ten thousand times (CLOSE; 1,600 times for ResNet-20 in another memory
format on a CPU, but forty times as much at a rate of 5e-3).  A lower precision rounds to 4e-3 or 5e-4, and averages it
over a batch (LOW).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, Blobs, generator, mlp, randn, seeded
from runs import masked, points
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import sparsecore as sc
from sparsecore.data import Batches, Dataset
from sparsecore.engine import auto
from sparsecore.recipe import Recipe
from sparsecore.recipes import build
from sparsecore.search import ConcreteSearch, RigL
from sparsecore.search.sparse_training import masks_of
from sparsecore.training import History, Step, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
]
CLOSE, LOW = 6e-4, 2e-2
SGD = Recipe(lr=2e-3, weight_decay=1e-4, batch=128, epochs=2, warmup_epochs=1)


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def remembers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return sc.load("digits")


def network(name: str) -> nn.Module:
    return build(name, (1, 8, 8), 10).to(DEVICE)


def run(model: nn.Module, digits: Dataset, engine: str, recipe: Recipe = SGD, **rest) -> History:
    batches = Batches(digits, "train", recipe.batch, device=DEVICE)
    tests = Batches(digits, "test", 256, shuffle=False, device=DEVICE)
    return train(model, batches, tests, recipe, engine=engine, **rest)


def require_alike(found: History, expected: History, tolerance: float = CLOSE) -> None:
    losses = [[epoch["loss"] for epoch in history.epochs] for history in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    # One sample in three hundred may stand on the edge.
    assert found.accuracy == pytest.approx(expected.accuracy, abs=0.4 if tolerance < LOW else 2.0)


RECIPES = {
    "sgd": SGD,
    "nesterov, average": replace(SGD, nesterov=True, ema=0.9),
    "adamw, clipped": replace(SGD, optimizer="adamw", lr=2e-4, clip_norm=1.0, schedule="cosine"),
    "micro-batches": replace(SGD, accumulate=2),
    "bf16": replace(SGD, amp="bf16"),
    "fp16": replace(SGD, amp="fp16"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("name", ["lenet-300-100", "resnet-20"])
def test_graph_runs_are_the_run(name: str, recipe: Recipe, digits: Dataset) -> None:
    expected = run(network(name), digits, "eager", recipe)
    found = run(network(name), digits, "graph", recipe)
    assert found.engine == "graph"
    require_alike(found, expected, LOW if recipe.amp else CLOSE)


def test_graph_runs_in_another_memory_format(digits: Dataset) -> None:
    expected = run(network("resnet-20"), digits, "eager")
    model = network("resnet-20").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    require_alike(run(model, digits, "graph"), expected)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("lenet-300-100", "compile"),
        ("lenet-300-100", "compile-graph"),
        ("resnet-20", "compile-graph"),
    ],
)
def test_compiled_runs_are_the_run(name: str, engine: str, digits: Dataset) -> None:
    expected = run(network(name), digits, "eager")
    found = run(network(name), digits, engine)
    assert found.engine == engine
    require_alike(found, expected)


@pytest.mark.parametrize("plan", ["mask", "state", "compact", "block:16x16", "block:16x16/2"])
@pytest.mark.parametrize("engine", ["graph", "compile", "compile-graph"])
def test_plans_are_launched_alike(plan: str, engine: str) -> None:
    def trained(how: str) -> History:
        model = sc.sparsify_(mlp(features=32, hidden=64, classes=16).to(DEVICE))
        kept = torch.zeros(64, 64, dtype=torch.bool)
        kept[:16, :32] = kept[32:48, 16:] = True
        for layer in sc.sparse_layers(model).values():
            n, k = layer.raw_weight.shape
            layer.set_mask_(kept[:n, :k].to(DEVICE))
        sc.plan_(model, plan)
        batches = Blobs(classes=16, features=32)
        return train(model, batches, batches, SGD, engine=how)

    require_alike(trained(engine), trained("eager"))


class Pinned(Blobs):
    """Batches from torch's loader, in pinned memory, which it uses again."""

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order(index)
        data = TensorDataset(self.x[order], self.y[order])
        yield from DataLoader(data, self.batch, pin_memory=True, generator=generator())


@pytest.mark.parametrize("batches", [Blobs, Pinned])
def test_graph_steps_on_the_batches_of_a_loader(batches: Callable[..., Blobs]) -> None:
    given = batches(count=250)  # the last batch is a smaller one
    eager, graph = (
        train(points().to(DEVICE), given, given, replace(SGD, batch=64), engine=engine)
        for engine in ("eager", "graph")
    )
    # Dropout draws from the graph's own part of the generator's numbers.
    assert graph.epochs[-1]["loss"] == pytest.approx(eager.epochs[-1]["loss"], rel=0.2)
    without = [
        train(mlp().to(DEVICE), given, given, replace(SGD, batch=64), engine=engine)
        for engine in ("graph", "eager")
    ]
    require_alike(*without)


def test_graph_steps_of_masks_that_change(digits: Dataset) -> None:
    batches = Batches(digits, "train", 128, device=DEVICE)
    eager, graph = (
        RigL(SGD, 2, interval=6, drop=0.3, engine=engine)(
            sc.sparsify_(network("lenet-300-100")), batches, sparsity=0.8
        )
        for engine in ("eager", "graph")
    )
    assert graph.meta["updates"] == eager.meta["updates"] > 1
    assert graph.sparsity == eager.sparsity
    same = torch.cat([(graph.masks[n] == eager.masks[n]).flatten() for n in graph.masks])
    assert same.double().mean() > 0.99  # gradients next to each other change places by rounding


@pytest.mark.parametrize("engine", ["graph", "compile-graph"])
def test_graph_runs_that_were_killed_go_on(engine: str, tmp_path: Path, digits: Dataset) -> None:
    class Killed(Exception):
        pass

    def kill(step: Step) -> None:
        if step.index == 15:
            raise Killed

    model, recipe = "lenet-300-100", replace(SGD, ema=0.9)
    whole = run(network(model), digits, "eager", recipe)
    with pytest.raises(Killed):
        run(network(model), digits, engine, recipe, checkpoint=tmp_path / "c", after_step=kill)
    resumed = run(network(model), digits, "auto", recipe, checkpoint=tmp_path / "c")
    assert resumed.engine == engine
    require_alike(resumed, whole)


def test_graph_is_tried_and_trying_leaves_no_trace(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FEW", 1), ("SHORT", 0.0), ("COMPILES", 1e9)):
        monkeypatch.setattr(auto, name, value)
    found = run(network("resnet-20"), digits, "auto")
    assert "graph: " in found.engine and "ms" in found.engine
    require_alike(found, run(network("resnet-20"), digits, "eager"))


@pytest.mark.parametrize("engine", ["compile", "compile-graph"])
def test_compiled_searches_are_the_search(engine: str, digits: Dataset) -> None:
    batches = Batches(digits, "train", 256, device=DEVICE)
    eager, found = (
        ConcreteSearch(epochs=3, engine=e, channels_last=False)(
            sc.sparsify_(network("lenet-300-100")), batches, sparsity=0.9
        )
        for e in ("eager", engine)
    )
    assert found.meta["engine"] == engine
    losses = [ticket.meta["objective_by_epoch"] for ticket in (found, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)


# --- Loops of one's own -----------------------------------------------------------------------------


def convolutions() -> nn.Module:
    """Without dropout, whose draws are a graph's own."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    return masked(lambda: seeded(layers)).to(DEVICE)


def batch(count: int = 32) -> tuple[Tensor, Tensor]:
    return randn(count, 1, 6, 6).to(DEVICE), (torch.arange(count) % 10).to(DEVICE)


def require_same_weights(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for mine, other in zip(a.parameters(), b.parameters(), strict=True):
        assert float((mine - other).detach().norm()) <= tolerance * float(other.detach().norm())


def drop_a_channel(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    masks = masks_of(model)
    masks["0"] = masks["0"].clone()
    masks["0"][0] = False
    sc.remask_(model, masks, optimizer)


@pytest.mark.parametrize("engine", ["graph", "compile-graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graph_steps_in_a_loop_of_ones_own(precision: str, engine: str) -> None:
    """A scheduler, a scaler, an average of the weights, another mask, a smaller batch."""
    low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def looped(how: str) -> tuple[list[Tensor], nn.Module, nn.Module]:
        model = convolutions()
        # Adam makes a whole step of the sign of a gradient that is rounding alone.
        kind, lr = (torch.optim.SGD, 0.02) if low else (torch.optim.AdamW, 1e-3)
        optimizer = kind(model.parameters(), lr=lr, fused=True)
        scaler = torch.amp.GradScaler(DEVICE) if precision == "fp16" else None
        average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        step = sc.TrainStep(
            model, F.cross_entropy, optimizer, batch(), engine=how, amp=low, scaler=scaler, clip_norm=1.0
        )  # fmt: skip
        rate, losses = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5), []
        for i in range(12):
            losses.append(step(*batch(20 if i == 5 else 32)))
            rate.step()
            average.update_parameters(model)
            if i == 7:
                drop_a_channel(model, optimizer)
        return losses, model, average

    expected, found = looped("eager"), looped(engine)
    tolerance = LOW if low else CLOSE
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    for mine, other in zip(found[1:], expected[1:], strict=True):
        require_same_weights(mine, other, tolerance)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_graph_passes_of_a_model(amp: bool) -> None:
    """`sc.graphed` in a loop with evaluation, a smaller batch and another mask in between."""

    def looped(graph: bool) -> tuple[list[Tensor], nn.Module]:
        model = convolutions()
        if graph:
            model = sc.graphed(model, batch()[0])
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
        for i in range(10):
            x, y = batch(20 if i == 4 else 32)
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            seen.append(loss.detach().clone())
            if i == 6:
                drop_a_channel(model, optimizer)
                with torch.no_grad():
                    seen.append(F.cross_entropy(model.eval()(x), y))
                model.train()
        return seen, model

    (expected, eager), (found, graph) = looped(False), looped(True)
    tolerance = LOW if amp else CLOSE
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    require_same_weights(graph, eager, tolerance)
