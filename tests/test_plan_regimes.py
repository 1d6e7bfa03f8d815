"""Plans for steps that are launched one by one and for steps that are CUDA graphs: what each of them weighs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, mlp, rand, randn
from replay import Recording
from torch import nn
from triton import OutOfResources

import sparsecore as sc
from sparsecore import capture, costs, planner, steptime
from sparsecore.convert import sparse_layers
from sparsecore.costs import Machine
from sparsecore.kernels import Layer
from sparsecore.planner import cache_of, choose, order
from sparsecore.products import runs
from sparsecore.steptime import step_time

LAUNCH = 100e-6
# Launches of a product, and seconds of the kernels of forward, dX and dW.
FAKE = {
    "dense": (1, (240e-6,) * 3), "mask": (1, (250e-6,) * 3), "state": (2, (245e-6,) * 3),
    "block:16x16": (2, (5e-6,) * 3), "block:32x32": (2, (6e-6,) * 3),
    "block:16x16/1": (2, (4e-6, 9e-6, 4.9e-6)), "block:16x16/2": (2, (3e-6, 9e-6, 9e-6)),
}  # fmt: skip
# What is fastest there: tiles by product, where they gain more than noise.
BLOCKS = ("block:16x16/2", "block:16x16", "block:16x16")


class FakeGpu:
    """Launches take the host 100 us each; kernels of blocks take 5 us, dense ones 250."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.asked = model, 0

    def products(self, name: str, *_: object) -> list[tuple[str, int]]:
        return [(name, i) for i in range(3)]

    def seconds(self, product: tuple[str, int], *_: object, captured: bool = False) -> float:
        self.asked += 1
        launches, kernels = FAKE[product[0]]
        return max(0 if captured else launches * LAUNCH, kernels[product[1]])

    def step(self, *_: object, captured: bool = False, **__: object) -> float:
        self.asked += 1
        launches, kernels = 0, 0.0
        for layer in sparse_layers(self.model).values():
            formats = getattr(layer.pattern, "formats", ("mask",) * 3)
            launches += 2 * sum(FAKE[f][0] for f in formats)  # as many around the products
            kernels += sum(FAKE[f][1][i] for i, f in enumerate(formats))
        return max(0 if captured else launches * LAUNCH, kernels)


@pytest.fixture
def model() -> nn.Module:
    model = sc.sparsify_(mlp())
    for layer in sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.3)
    return model


@pytest.fixture
def gpu(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake, machine = FakeGpu(model), Machine(flops=1e14, bandwidth=1e12, updates=1e12)
    monkeypatch.setattr(capture, "possible_on", lambda device: True)
    monkeypatch.setattr(planner, "candidates", lambda *_: ["state", "block:16x16", "block:32x32"])
    monkeypatch.setattr(planner, "machine", lambda *_: machine)
    monkeypatch.setattr(planner, "products_of", fake.products)
    monkeypatch.setattr(planner, "dense_products", fake.products)
    monkeypatch.setattr(planner, "runs", lambda products: True)
    monkeypatch.setattr(planner, "seconds", fake.seconds)
    monkeypatch.setattr(steptime, "seconds", fake.step)
    return fake


def chosen(model: nn.Module) -> set[tuple[str, ...] | None]:
    return {row.choice.formats for row in sc.report(model)}


def test_a_graph_is_chosen_by_its_kernels_and_a_launched_step_by_its_host(
    model: nn.Module, gpu: FakeGpu, tmp_path: Path
) -> None:
    x, cache = randn(8, 12), tmp_path / "plans.json"
    sc.plan_(model, "auto", x, captured=True, cache=cache)
    assert chosen(model) == {BLOCKS}
    assert all(row.choice.reason.endswith("as CUDA graphs") for row in sc.report(model))
    sc.plan_(model, "mask")
    sc.plan_(model, "auto", x, cache=cache)
    assert chosen(model) == {None}  # alone, blocks would take 200 us where the mask takes 250
    for row in sc.report(model):
        assert row.choice.reason.startswith("mask: as a whole step launched one by one, ms: ")
    keys, asked = json.loads(cache.read_text()), gpu.asked
    for how in ("as CUDA graphs", "launched one by one"):
        assert sum(f"| {how} |" in key for key in keys) == 3  # two layers and the step
    for captured, formats in ((True, BLOCKS), (False, None)):  # each has its entries
        sc.plan_(model, "mask")
        sc.plan_(model, "auto", x, captured=captured, cache=cache)
        assert chosen(model) == {formats} and gpu.asked == asked


@pytest.mark.usefixtures("gpu")
def test_tiles_that_the_device_cannot_hold_are_left_out(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "runs", lambda products: not products[0][0].endswith("/2"))
    sc.plan_(model, "auto", randn(8, 12), captured=True, cache=tmp_path / "plans.json")
    assert chosen(model) == {("block:16x16/1", "block:16x16", "block:16x16")}
    first, _ = sc.report(model)
    assert set(first.choice.measured) == {*FAKE} - {"block:16x16/2"}

    def greedy() -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert runs((int, int, int)) and not runs((int, int, greedy))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("captured", [False, True])
def test_a_first_use_weighs_the_same(model: nn.Module, tmp_path: Path, captured: bool) -> None:
    sc.plan_(model, captured=captured, cache=tmp_path / "plans.json")(randn(8, 12))
    how = "as CUDA graphs" if captured else "launched one by one"
    assert all(row.choice.reason.endswith(how) for row in sc.report(model))


def test_a_cpu_knows_one_way(model: nn.Module, tmp_path: Path) -> None:
    cache, x = tmp_path / "plans.json", randn(8, 12)
    first = sc.report(sc.plan_(model, "auto", x, cache=cache))
    known = json.loads(cache.read_text())
    sc.plan_(model, "mask")
    assert sc.report(sc.plan_(model, "auto", x, captured=True, cache=cache)) == first
    assert json.loads(cache.read_text()) == known


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_gpu_measures_as_it_will_run(captured: bool, tmp_path: Path) -> None:
    model, x = sc.sparsify_(mlp(hidden=256).to(DEVICE)), randn(512, 12).to(DEVICE)
    for layer in sparse_layers(model).values():
        layer.set_mask_((rand(*layer.weight_shape) < 0.1).to(DEVICE))
    sc.plan_(model, "auto", x, captured=captured, cache=tmp_path / "plans.json")
    how = planner.regime(x.device, captured)
    assert all(how in row.choice.reason for row in sc.report(model))
    assert all(min(t.total for t in row.choice.measured.values()) > 0 for row in sc.report(model))


def test_an_image_measured_in_one_memory_format_says_nothing_of_another(tmp_path: Path) -> None:
    cache, layer = tmp_path / "plans.json", Layer((6, 5, 3, 3), (1, 1, 1, 1, 1, 1))
    mask, x = rand(*layer.shape) < 0.4, randn(2, 5, 9, 8)

    def entries(x: torch.Tensor) -> int:
        choose(mask, layer, x, cache=cache_of(cache))
        return len(json.loads(cache.read_text()))

    last = x.contiguous(memory_format=torch.channels_last)
    assert [entries(t) for t in (x, last, x, last.clone())] == [2, 3, 3, 3]  # and the machine's


def test_the_order_of_dimensions_ignores_those_that_have_none() -> None:
    x = randn(2, 3, 4, 1)
    assert order(x) == (0, 1, 2)
    assert order(x.contiguous(memory_format=torch.channels_last)) == (0, 2, 1)
    assert order(randn(3, 4).T) == (1, 0) and order(randn(3, 4).to_sparse()) == ()


def test_a_captured_time_is_of_several_steps_in_one_graph(
    monkeypatch: pytest.MonkeyPatch, recordings: list[Recording]
) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(costs, "perf_counter", lambda: 1e-3 * next(ticks))  # any run takes 1 ms
    x = torch.zeros(3)
    time = costs.seconds(lambda: x.add_(1), x.device, budget=0.03, captured=True)
    assert time == pytest.approx(1e-4)  # a third of the budget is 10 steps
    assert [len(made.operations) for made in recordings] == [10]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_step_includes_its_optimiser(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On a GPU it runs, on a CPU its time is added; no parameter changes."""
    model, x, steps = mlp(), randn(8, 12), 0
    before = [p.detach().clone() for p in model.parameters()]

    def seconds(step: Callable[[], object], *_: object, **__: object) -> float:
        step()
        return 1.0

    def counted(*_: object, **__: object) -> None:
        nonlocal steps
        steps += 1

    monkeypatch.setattr(steptime, "seconds", seconds)
    monkeypatch.setattr(steptime, "device_of", lambda model: torch.device(kind))
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    assert step_time(model, (x,), 7.0) == (1007.0 if kind == "cpu" else 1000.0)
    assert steps == (kind == "cuda")
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
