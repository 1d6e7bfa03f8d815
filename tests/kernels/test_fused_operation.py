"""The operation around products with gates sampled inside: autograd, compilation, autocast, bad arguments."""

from functools import partial
from typing import Any

import pytest
import torch
from bounds import require
from fused_cases import GATES, LINEAR, Case, Problem, check, expected, problem
from helpers import DEVICE
from torch import Tensor

from sparsecore.kernels.gated.fused import fused_gated_linear
from sparsecore.kernels.gated.tile import Gated
from sparsecore.kernels.reference import GateSpec

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_scratch")]


def leaves(p: Problem) -> list[Tensor]:
    tensors = (p.x, p.g.weight, p.g.logits, p.bias, p.g.gain)
    return [tensor.detach().requires_grad_() for tensor in tensors]


def address(g: Gated) -> dict[str, Any]:
    return {"gate": g.gate, "seed": g.seed, "step": g.step, "layer": g.layer}


def apply(
    p: Problem, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor, gain: Tensor
) -> Tensor:
    return fused_gated_linear(x, weight, logits, bias, gain=gain, **address(p.g))


@pytest.mark.parametrize("case", LINEAR)
def test_gradients_through_autograd(case: str, kernels_noise: None) -> None:
    p = problem(LINEAR[case], torch.float32)
    inputs = leaves(p)
    y = apply(p, *inputs)
    assert y.stride() == p.dy.stride()
    dx, dw, ds, db, dgain = torch.autograd.grad(y, inputs, p.dy)
    found = {"y": y.detach(), "dx": dx, "dlogits": ds, "dweight": dw, "dgain": dgain, "dbias": db}
    check(p, found)


def test_only_what_is_asked_for(kernels_noise: None) -> None:
    p = problem(LINEAR["odd"], torch.float32)
    right = expected(p)
    names = ["dx", "dweight", "dlogits", "dbias", "dgain"]
    for position, name in enumerate(names):
        inputs = [leaf.requires_grad_(i == position) for i, leaf in enumerate(leaves(p))]
        (gradient,) = torch.autograd.grad(apply(p, *inputs), inputs[position], p.dy)
        require(name, gradient, right[name])


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


def test_no_tokens() -> None:
    p = problem(LINEAR["odd"], torch.float32)
    inputs = leaves(p)
    y = apply(p, inputs[0][:0], *inputs[1:])
    assert y.shape == (0, *p.dy.shape[1:])
    y.sum().backward()
    assert all(not leaf.grad.any() for leaf in inputs[1:])


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels have no float64")
@pytest.mark.parametrize("gate", GATES[:4], ids=str)
def test_the_formula_and_its_gradient(gate: GateSpec) -> None:
    p = problem(Case((3, 4), (5, 4)), torch.float32, gate)
    inputs = [leaf.detach().double().requires_grad_() for leaf in leaves(p)]
    assert torch.autograd.gradcheck(partial(apply, p), inputs, fast_mode=True)


def test_opcheck() -> None:
    p = problem(LINEAR["odd"], torch.float32)
    inputs = leaves(p)
    x, weight, logits, bias, gain = inputs
    g = p.g
    forward = torch.ops.sparsecore.fused_gated_linear.default
    rest = (g.seed, g.step, g.layer, [float(v) for v in g.gate])
    torch.library.opcheck(forward, (x, weight, logits, bias, gain, *rest))
    torch.library.opcheck(forward, (x, weight, logits, None, None, *rest))
    backward = torch.ops.sparsecore.fused_gated_linear_backward.default
    plain = [t.detach() for t in (p.dy, x, weight, logits, gain)]
    torch.library.opcheck(backward, (*plain, *rest, [False, True, False, True]))


def test_compiles_in_one_graph() -> None:
    p = problem(LINEAR["odd"], torch.float32)
    torch.use_deterministic_algorithms(False)
    inputs = leaves(p)
    compiled = torch.compile(partial(apply, p), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(apply(p, *inputs), inputs, p.dy)
    found = torch.autograd.grad(compiled(*inputs), inputs, p.dy)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_casts_x_alone() -> None:
    p = problem(LINEAR["odd"], torch.float32)
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
    ({"x": torch.zeros(43, 3, 4)}, "expected at most 128 rows of x, got 129; materialise"),
    ({"weight": torch.zeros(2, 4, 1, 1)}, "expected a weight of 2 dimensions"),
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
