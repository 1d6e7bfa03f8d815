"""One function over three strategies: they are right, an explicit one never falls back, a choice says why."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bounds import gated, require
from helpers import DEVICE, ChannelsLast, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.gates import HardConcrete
from sparsecore.granularity import Block
from sparsecore.kernels import (
    GateSpec,
    Unit,
    choice,
    forget,
    gated_conv2d,
    gated_linear,
    philox,
    unit_shape,
)
from sparsecore.kernels import reference as ref
from sparsecore.kernels.gated import layers as gated_layers
from sparsecore.layer import SparseLayer
from sparsecore.patterns import Gated

pytestmark = pytest.mark.gpu  # on the GPU where there is one, in PyTorch's reference otherwise

HARD = GateSpec(ref.HARD_CONCRETE, 2 / 3, -0.1, 1.1)
CASES = {
    "weight": (Unit(), ["materialise", "epilogue", "fused"]),  # the last for linear layers
    "block": (Unit(16, 32), ["materialise", "block"]),
    "channel": (Unit(1, 0), ["materialise", "block"]),
    "2:4": (Unit(1, 4, 2), ["materialise"]),
}


def address() -> dict:
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    return {"gate": HARD, "seed": 5 * one, "step": one, "layer": 2}


def inputs(weight: tuple[int, ...], x: tuple[int, ...], unit: Unit) -> list[Tensor]:
    tensors = [randn(*x), randn(*weight, seed=1), randn(*unit_shape(weight, unit), seed=2)]
    tensors += [randn(weight[0], seed=3), torch.tensor(0.2)]
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def elsewhere(*shape: int) -> Any:
    """A tensor that says it lies on a GPU."""
    said = {"is_cuda": True, "device": DEVICE, "dtype": torch.float32, "requires_grad": False}
    return SimpleNamespace(shape=shape, **said)


def measuring(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> list[str]:
    """Made-up times; the strategies that were measured."""
    measured: list[str] = []

    def time(call: object, impl: str, *_: object) -> float:
        measured.append(impl)
        return times[impl]

    monkeypatch.setattr(gated_layers, "_time", time)
    monkeypatch.setattr(gated_layers, "_measured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return measured


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("case", CASES)
def test_strategies_are_right(case: str, shape: str) -> None:
    unit, impls = CASES[case]
    if shape == "linear":
        layer, product, slide = gated_linear, F.linear, {}
        x, w, s, b, log_gain = tensors = inputs((48, 64), (15, 64), unit)
    else:
        slide = {"padding": 1}
        layer, product = gated_conv2d, partial(F.conv2d, padding=1)
        x, w, s, b, log_gain = tensors = inputs((48, 64, 3, 3), (2, 64, 5, 5), unit)
    dy = randn(*product(x, w).shape, seed=4).to(DEVICE)
    where = address()
    noise = philox.storage_noise(s.detach(), where["seed"], where["step"], where["layer"])
    right = gated(product, x, w, s, b, log_gain.exp(), dy, HARD, unit, noise)
    for impl in (*impls, "auto"):
        if impl == "fused" and shape == "conv":
            continue
        y = layer(x, w, s, b, unit=unit, impl=impl, log_gain=log_gain, **slide, **where)
        dx, dw, ds, db, dlog_gain = torch.autograd.grad(y, tensors, dy)
        found = {"y": y.detach(), "dx": dx, "dweight": dw, "dlogits": ds, "dbias": db}
        for name, value in (found | {"dgain": dlog_gain / log_gain.exp()}).items():
            require(f"{impl}: {name}", value, right[name])


@pytest.mark.parametrize("impl", ["materialise", "epilogue"])
def test_images_stay_channels_last(impl: str) -> None:
    x, w, s, b, _ = inputs((48, 64, 3, 3), (2, 64, 5, 5), Unit())
    with torch.no_grad():
        x, w, s, dy = (
            t.contiguous(memory_format=torch.channels_last)
            for t in (x, w, s, torch.ones_like(x[:, :48]))
        )
    x.requires_grad_()
    with ChannelsLast(x.shape, dy.shape):
        y = gated_conv2d(x, w, s.requires_grad_(), b, padding=1, impl=impl, **address())
        (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", ["materialise", "epilogue", "fused", "auto"])
def test_one_token_without_a_batch_is_a_batch_of_one(impl: str) -> None:
    tensors = inputs((48, 64), (1, 64), Unit())
    x, w, s, b, log_gain = tensors
    found = []
    for given in (x, x[0]):
        y = gated_linear(given, w, s, b, impl=impl, log_gain=log_gain, **address())
        found.append([y.flatten(), *torch.autograd.grad(y.sum(), tensors)])
    for one, batch in zip(*found, strict=True):
        torch.testing.assert_close(one, batch)


def test_an_explicit_strategy_never_falls_back() -> None:
    x, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    with pytest.raises(ValueError, match=r"impl='block': it takes blocks with sides among"):
        gated_linear(x, w, s, b, impl="block", **address())
    with pytest.raises(
        ValueError, match="impl: expected auto, materialise, epilogue, fused, block, got 'dense'"
    ):
        gated_linear(x, w, s, b, impl="dense", **address())
    x, w, s, b, _ = inputs((48, 64), (3, 64), Unit(1, 4, 2))
    with pytest.raises(ValueError, match=r"impl='fused': it takes one free gate for each weight"):
        gated_linear(x, w, s, b, unit=Unit(1, 4, 2), impl="fused", **address())
    x, w, s, b, _ = inputs((8, 4, 3, 3), (2, 8, 5, 5), Unit())
    with pytest.raises(ValueError, match="it takes one group, got 2"):
        gated_conv2d(x, w, s, b, groups=2, impl="epilogue", **address())
    assert gated_conv2d(x, w, s, b, groups=2, **address()).shape == (2, 8, 3, 3)


def test_fused_is_for_linear_layers_of_few_rows() -> None:
    _, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    x = randn(2, 64, 64).to(DEVICE)
    assert gated_linear(x, w, s, b, impl="fused", **address()).shape == (2, 64, 48)
    message = (
        r"impl='fused': it takes a linear layer and at most 128 rows of x, got {}; use another"
    )
    with pytest.raises(ValueError, match=message.format(129)):
        gated_linear(randn(43, 3, 64).to(DEVICE), w, s, b, impl="fused", **address())
    x, w, s, b, _ = inputs((48, 64, 1, 1), (2, 64, 5, 5), Unit())
    with pytest.raises(ValueError, match=message.format("a convolution")):
        gated_conv2d(x, w, s, b, impl="fused", **address())


@pytest.mark.parametrize("rows", [128, 129])
def test_auto_never_considers_fused_beyond(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measuring(monkeypatch, dict.fromkeys(("materialise", "epilogue", "fused"), 1.0))
    _, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    choice(elsewhere(rows, 64), w, s, b, **address())
    assert measured == ["materialise", "epilogue"] + ["fused"] * (rows == 128)


def test_fused_reads_a_copy_of_weights_that_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.dtype] = []
    fused = gated_layers.fused_gated_linear

    def spy(x: Tensor, weight: Tensor, *rest: Tensor, **options) -> Tensor:
        read.append(weight.dtype)
        return fused(x, weight, *rest, **options)

    monkeypatch.setattr(gated_layers, "fused_gated_linear", spy)
    layer = sc.sparsify_(seeded(lambda: nn.Linear(64, 32))).to(DEVICE)
    layer.pattern = pattern = Gated(
        layer.raw_weight.shape, HardConcrete(), density=0.5, impl="fused", device=DEVICE
    )
    pattern.dense = layer.raw_weight.detach().to(torch.bfloat16)
    x = randn(4, 64).to(DEVICE)
    for trains, autocast in ((False, True), (True, True), (False, False)):
        layer.raw_weight.requires_grad_(trains)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            layer(x)
    assert read == [torch.bfloat16, torch.float32, torch.float32]


def test_a_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    told = choice(x, w, s, b, **address())
    if DEVICE == "cpu":
        assert told.impl == "materialise" and "need a GPU" in told.reason
        return
    assert told.reason.startswith("measured") and set(told.times) == {
        "materialise",
        "epilogue",
        "fused",
    }
    monkeypatch.setattr(gated_layers, "_time", lambda *_: pytest.fail("measured twice"))
    assert choice(x, w, s, b, **address()) == told
    forget()


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((1.0, 1.1, 0.9), "fused"),
        ((1.0, 0.8, 0.9), "epilogue"),
        ((1.0, 0.97, 2.0), "materialise"),
        ((1.0, 2.0, 2.0), "materialise"),
    ],
)
def test_another_strategy_must_be_worth_it(
    times: tuple[float, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule itself, with made-up times."""
    measuring(monkeypatch, dict(zip(("materialise", "epilogue", "fused"), times, strict=True)))
    _, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    told = choice(elsewhere(3, 64), w, s, b, **address())
    assert told.impl == expected and "materialise 1.000 ms" in told.reason


def test_graphs_and_launches_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where launches cost, what needs fewer of them wins; as a graph, the kernels decide."""
    kernels = {"materialise": 0.3, "epilogue": 0.2, "fused": 0.4}
    launches = {"materialise": 0.6, "epilogue": 0.9, "fused": 0.1}

    def time(call: gated_layers._Call, impl: str, *_: object) -> float:
        return kernels[impl] + (0.0 if call.captured else launches[impl])

    monkeypatch.setattr(gated_layers, "_time", time)
    monkeypatch.setattr(gated_layers, "_measured", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    for _ in range(2):
        told = choice(elsewhere(3, 64), w, s, b, **address(), captured=True)
        assert told.impl == "epilogue" and "as CUDA graphs" in told.reason
        assert choice(elsewhere(3, 64), w, s, b, **address()).impl == "fused"


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_modules_compute_with_the_strategy_of_their_pattern(kind: str) -> None:
    linear = kind == "linear"
    layer = seeded(lambda: nn.Linear(64, 32) if linear else nn.Conv2d(64, 32, 3, padding=1))
    sparse = sc.sparsify_(layer).to(DEVICE)
    assert isinstance(sparse, SparseLayer)
    x = (randn(4, 64) if linear else randn(2, 64, 6, 6)).to(DEVICE)
    outputs = []
    for impl in ("auto", "materialise", "block"):
        sparse.pattern = Gated(
            sparse.raw_weight.shape, HardConcrete(), Block(16, 16), density=0.5, impl=impl, device=DEVICE
        )  # fmt: skip
        y = sparse(x)
        y.sum().backward()
        outputs.append((y.detach(), sparse.pattern.logits.grad))
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    sparse.pattern.impl = "fused"
    with pytest.raises(ValueError, match="one free gate for each weight"):
        sparse(x)


def test_compiles_in_one_graph() -> None:
    x, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    options = address()

    def run(x: Tensor, s: Tensor) -> Tensor:
        return gated_linear(x, w, s, b, **options).sum()

    run(x, s).backward()
    eager, s.grad = s.grad, None
    torch.compile(run, fullgraph=True)(x, s).backward()
    torch.testing.assert_close(s.grad, eager)
