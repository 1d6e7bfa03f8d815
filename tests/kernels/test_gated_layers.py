"""One function over three strategies: they agree, an explicit one never falls back, a choice says why."""

import pytest
import torch
from helpers import DEVICE, randn, seeded
from torch import Tensor, nn

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
    unit_shape,
)
from sparsecore.kernels import reference as ref
from sparsecore.kernels.gated import layers as gated_layers
from sparsecore.nn import SparseLayer
from sparsecore.patterns import Gated

pytestmark = pytest.mark.gpu  # on the GPU where there is one, in PyTorch's reference otherwise

HARD = GateSpec(ref.HARD_CONCRETE, 2 / 3, -0.1, 1.1)
CASES = {
    "weight": (Unit(), ["materialise", "epilogue", "fused"]),
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


@pytest.mark.parametrize("shape", ["linear", "conv"])
@pytest.mark.parametrize("case", CASES)
def test_strategies_agree(case: str, shape: str) -> None:
    unit, impls = CASES[case]
    weight, given = ((48, 64), (5, 3, 64)) if shape == "linear" else ((48, 64, 3, 3), (2, 64, 5, 5))
    found = []
    for impl in (*impls, "auto"):
        x, w, s, b, gain = tensors = inputs(weight, given, unit)
        options = address() | {"unit": unit, "impl": impl, "log_gain": gain}
        if shape == "linear":
            y = gated_linear(x, w, s, b, **options)
        else:
            y = gated_conv2d(x, w, s, b, padding=1, **options)
        grads = torch.autograd.grad(y.square().sum(), tensors)
        found.append([y.detach(), *grads])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            scale = float(a.abs().max())
            torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5 * scale)


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
        gated_conv2d(x, w, s, b, groups=2, impl="fused", **address())
    assert gated_conv2d(x, w, s, b, groups=2, **address()).shape == (2, 8, 3, 3)


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
    """The rule itself, with made-up times and a tensor that says it lies on a GPU."""

    class Elsewhere:
        is_cuda, device, shape, dtype, requires_grad = True, DEVICE, (3, 64), torch.float32, False

    made_up = dict(zip(("materialise", "epilogue", "fused"), times, strict=True))
    monkeypatch.setattr(gated_layers, "_time", lambda call, impl, *_: made_up[impl])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _, w, s, b, _ = inputs((48, 64), (3, 64), Unit())
    forget()
    told = choice(Elsewhere(), w, s, b, **address())  # type: ignore[arg-type]
    forget()
    assert told.impl == expected and "materialise 1.000 ms" in told.reason


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
