"""The operation around products with gates sampled inside: autograd, compilation, autocast, bad arguments."""

from functools import partial
from typing import Any

import pytest
import torch
from fused_cases import CASES, GATES, Case, Problem, by_autograd, check, problem
from helpers import DEVICE
from torch import Tensor

from sparsecore.kernels import philox
from sparsecore.kernels.gated.fused import (
    Gated,
    fused_gated_conv2d,
    fused_gated_linear,
)
from sparsecore.kernels.reference import (
    GateSpec,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_scratch")]


@pytest.fixture
def kernels_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's operation with the kernels' noise."""
    uniform_ = philox.uniform_

    def exact(out: Tensor, seed: Tensor, step: Tensor, layer: int, **_) -> Tensor:
        return uniform_(out, seed, step, layer, exact=True)

    monkeypatch.setattr("sparsecore.kernels.philox.uniform_", exact)


def leaves(p: Problem) -> list[Tensor]:
    tensors = (p.x, p.g.weight, p.g.logits, p.bias, p.g.gain)
    return [tensor.detach().requires_grad_() for tensor in tensors]


def address(g: Gated) -> dict[str, Any]:
    return {"gate": g.gate, "seed": g.seed, "step": g.step, "layer": g.layer}


def apply(
    p: Problem, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor, gain: Tensor
) -> Tensor:
    if x.ndim == 2:
        return fused_gated_linear(x, weight, logits, bias, gain=gain, **address(p.g))
    slide = {"stride": p.g.conv[:2], "padding": p.g.conv[2:4], "dilation": p.g.conv[4:]}
    return fused_gated_conv2d(x, weight, logits, bias, gain=gain, **slide, **address(p.g))


@pytest.mark.parametrize("case", CASES)
def test_gradients_through_autograd(case: str, kernels_noise: None) -> None:
    p = problem(CASES[case], torch.float32)
    inputs = leaves(p)
    y = apply(p, *inputs)
    assert y.stride() == p.dy.stride()
    dx, dw, ds, db, dgain = torch.autograd.grad(y, inputs, p.dy)
    found = {"y": y.detach(), "dx": dx, "dlogits": ds, "dweight": dw, "dgain": dgain, "dbias": db}
    check(p, found)


def test_only_what_is_asked_for(kernels_noise: None) -> None:
    p = problem(CASES["odd"], torch.float32)
    truth = by_autograd(p, torch.float64, torch.float64)
    names = ["dx", "dweight", "dlogits", "dbias", "dgain"]
    for position, name in enumerate(names):
        inputs = [leaf.requires_grad_(i == position) for i, leaf in enumerate(leaves(p))]
        (gradient,) = torch.autograd.grad(apply(p, *inputs), inputs[position], p.dy)
        torch.testing.assert_close(gradient.double(), truth[name], rtol=1e-4, atol=1e-4)


def test_batches_and_expanded_gradients() -> None:
    p = problem(Case((6, 20), (5, 20)), torch.float32)
    rows = apply(p, *leaves(p))
    batch = fused_gated_linear(
        p.x.view(2, 3, 20), p.g.weight, p.g.logits, p.bias, gain=p.g.gain, **address(p.g)
    )
    assert torch.equal(batch.flatten(0, 1), rows)
    single = fused_gated_linear(p.x[0], p.g.weight, p.g.logits, **address(p.g))
    assert single.shape == (5,)
    inputs = leaves(p)
    apply(p, *inputs).sum().backward()  # a gradient of stride 0
    torch.testing.assert_close(inputs[3].grad, torch.full((5,), 6.0, device=DEVICE))


@pytest.mark.parametrize("case", ["odd", "all-of-it"])
def test_no_tokens(case: str) -> None:
    p = problem(CASES[case], torch.float32)
    inputs = leaves(p)
    y = apply(p, inputs[0][:0], *inputs[1:])
    assert y.shape == (0, *p.dy.shape[1:])
    y.sum().backward()
    assert all(not leaf.grad.any() for leaf in inputs[1:])


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels have no float64")
@pytest.mark.parametrize("gate", GATES[:4], ids=str)
@pytest.mark.parametrize("case", [Case((3, 4), (5, 4)), Case((1, 2, 4, 3), (3, 2, 2, 2))], ids=str)
def test_the_formula_and_its_gradient(case: Case, gate: GateSpec) -> None:
    p = problem(case, torch.float32, gate)
    inputs = [leaf.detach().double().requires_grad_() for leaf in leaves(p)]
    assert torch.autograd.gradcheck(partial(apply, p), inputs, fast_mode=True)


@pytest.mark.parametrize("case", ["odd", "all-of-it"])
def test_opcheck(case: str) -> None:
    p = problem(CASES[case], torch.float32)
    inputs = leaves(p)
    x, weight, logits, bias, gain = inputs
    g, conv = p.g, list(p.g.conv)
    forward = torch.ops.sparsecore.fused_gated_conv.default
    rest = (g.seed, g.step, g.layer, [float(v) for v in g.gate], conv)
    torch.library.opcheck(forward, (x, weight, logits, bias, gain, *rest))
    torch.library.opcheck(forward, (x, weight, logits, None, None, *rest))
    backward = torch.ops.sparsecore.fused_gated_conv_backward.default
    plain = [t.detach() for t in (p.dy, x, weight, logits, gain)]
    torch.library.opcheck(backward, (*plain, *rest, [False, True, False, True]))


@pytest.mark.parametrize("case", ["odd", "all-of-it"])
def test_compiles_in_one_graph(case: str) -> None:
    p = problem(CASES[case], torch.float32)
    torch.use_deterministic_algorithms(False)
    inputs = leaves(p)
    compiled = torch.compile(partial(apply, p), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(apply(p, *inputs), inputs, p.dy)
    found = torch.autograd.grad(compiled(*inputs), inputs, p.dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_x_alone() -> None:
    p = problem(CASES["odd"], torch.float32)
    inputs = leaves(p)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = apply(p, *inputs)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in inputs)
    assert torch.equal(y, apply(p, inputs[0].bfloat16(), *inputs[1:]))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 5)}, r"expected x \[\*batch, 4\]"),
    ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "expected x in one of"),
    ({"weight": torch.zeros(2, 4, dtype=torch.float16)}, "expected weight in"),
    ({"logits": torch.zeros(2, 1)}, "one logit for each weight"),
    ({"logits": torch.zeros(2, 4, dtype=torch.float16)}, "float32 logits"),
    ({"bias": torch.zeros(4)}, r"expected bias \[2\]"),
    ({"gain": torch.zeros(1)}, "expected gain as"),
    ({"seed": torch.zeros(1)}, "seed as one int64"),
    ({"step": torch.zeros(1, dtype=torch.int64, device="meta")}, "expected step on"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(3, 4), "weight": torch.zeros(2, 4), "logits": torch.zeros(2, 4)}
    good |= {"seed": torch.zeros(1, dtype=torch.int64), "step": torch.zeros(1, dtype=torch.int64)}
    arguments = {key: value.to(DEVICE) for key, value in good.items()}
    arguments |= {k: v if v.is_meta else v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        fused_gated_linear(**arguments, gate=GATES[0], layer=0)


def test_bad_convolutions() -> None:
    p = problem(CASES["3x3"], torch.float32)
    x, weight, logits, *_ = leaves(p)
    call = partial(fused_gated_conv2d, **address(p.g))
    with pytest.raises(ValueError, match="groups are not supported"):
        call(torch.cat((x, x), 1), weight, logits)
    with pytest.raises(ValueError, match="does not fit"):
        call(x, weight, logits, dilation=5)
    with pytest.raises(ValueError, match="expected stride as"):
        call(x, weight, logits, stride=0)
    with pytest.raises(ValueError, match="a weight of 4 dimensions"):
        call(x, weight[..., 0], logits[..., 0])
