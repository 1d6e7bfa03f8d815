"""The operation around block and channel gates: its CPU kernel, compilation and arguments."""

import pytest
import torch
from block_gates import (
    CONV,
    HARD,
    KERNELS,
    LAYER,
    LINEAR,
    NAMES,
    Case,
    Inputs,
    composed,
    inputs,
    launched,
    output_like,
)
from helpers import DEVICE, randn
from torch import Tensor

from sparsecore.kernels import philox
from sparsecore.kernels.gated.blocks import block_gated_conv2d, block_gated_linear
from sparsecore.kernels.units import Unit

OPERATIONS = [LINEAR[1], LINEAR[8], CONV[1], CONV[3]]


def call(case: Case, x: Tensor, weight: Tensor, logits: Tensor, bias, gain) -> Tensor:
    seed, step = (torch.tensor([value], device=x.device) for value in (11, 5))
    rest = {"gate": case.gate, "unit": case.unit, "seed": seed, "step": step, "layer": LAYER}
    if x.ndim != 4:
        return block_gated_linear(x, weight, logits, bias, gain=gain, **rest)
    names = ("stride", "padding", "dilation")
    pairs = {name: case.axes[2 * i : 2 * i + 2] for i, name in enumerate(names)}
    return block_gated_conv2d(x, weight, logits, bias, gain=gain, **pairs, **rest)


def on_cpu(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    return Inputs(*(tensor.to("cpu", dtype) for tensor in inputs(case, torch.float32)))


@pytest.mark.parametrize("case", OPERATIONS, ids=str)
def test_cpu_is_the_reference(case: Case) -> None:
    given = on_cpu(case)
    u = philox.uniform_(
        torch.empty(given.logits.shape), torch.tensor([11]), torch.tensor([5]), LAYER
    )
    leaves = [tensor.requires_grad_() for tensor in given]
    y = call(case, *leaves)
    dy = randn(*y.shape, seed=9, dtype=torch.float64)
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    for name, value, expected in zip(NAMES, results, composed(case, given, dy, u), strict=True):
        assert value.dtype == expected.dtype
        # The slope of a gate is computed from z, whose noise is float32.
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", [LINEAR[1], CONV[1]], ids=str)
def test_opcheck(case: Case) -> None:
    given = on_cpu(case, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in given]
    x, weight, logits, bias, gain = leaves
    rest = (torch.tensor([11]), torch.tensor([5]), LAYER, list(case.gate), list(case.unit))
    op = torch.ops.sparsecore.block_gated_conv
    torch.library.opcheck(op, (x, weight, logits, bias, gain, *rest, list(case.axes)))
    last = x.detach().contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.detach()
    frozen = (last, weight.detach(), logits, None, None, *rest, list(case.axes))
    torch.library.opcheck(op, frozen, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", [LINEAR[8], CONV[3]], ids=str)
def test_compiles_whole(case: Case) -> None:
    leaves = [tensor.requires_grad_() for tensor in on_cpu(case, torch.float32)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y, again = call(case, *leaves), compiled(case, *leaves)
    torch.testing.assert_close(y, again)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(again.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_autocast_decides_the_type_and_batches_keep_their_shape() -> None:
    case = LINEAR[1]
    given = on_cpu(case, torch.float32)
    x = given.x.expand(2, *given.x.shape).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, x, *given[1:4], None)
    assert y.dtype == torch.bfloat16 and y.shape == (2, case.x[0], case.weight[0])
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), call(case, x, *given[1:4], None), rtol=0.1, atol=0.1)


@pytest.mark.gpu
def test_no_tokens() -> None:
    case = LINEAR[0]._replace(x=(0, 48))
    given = inputs(case, torch.float32)
    y, dx, dweight, dlogits, dgain = launched(case, given, given.x.new_empty(0, 48))
    assert y.shape == (0, 48) and dx.shape == (0, 48)
    assert not dweight.any() and not dlogits.any() and not dgain.any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="the CPU's operation does not run the kernels")
@pytest.mark.parametrize("case", OPERATIONS, ids=str)
def test_the_operation_runs_the_kernels(case: Case) -> None:
    given = inputs(case, torch.float32)
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = call(case, *leaves)
    dy = output_like(case, given)
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    assert torch.equal(results.pop(4), dy.sum([d for d in range(dy.ndim) if d != 1]))  # dbias
    for name, value, expected in zip(KERNELS, results, launched(case, given, dy), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": Unit(16, 1)}, "sides among"),
        ({"unit": Unit(48, 48)}, "sides among"),
        ({"unit": Unit()}, "sides among"),
        ({"unit": Unit(1, 4, 2)}, "sides among"),
        ({"logits": torch.zeros(2, 2)}, "expected logits"),
        ({"x": torch.zeros(4, 5)}, "expected x"),
        ({"bias": torch.zeros(3)}, "expected bias"),
        ({"gain": torch.ones(1)}, "expected gain"),
        ({"seed": torch.tensor([1.0])}, "expected seed"),
        ({"step": torch.tensor([1, 2])}, "expected step"),
        ({"logits": torch.zeros(2, 3, device="meta")}, "expected logits on cpu"),
    ],
)
def test_bad_linear(change: dict, message: str) -> None:
    good = {
        "x": torch.zeros(4, 48),
        "weight": torch.zeros(32, 48),
        "logits": torch.zeros(2, 3),
        "bias": None,
        "gate": HARD,
        "unit": Unit(16, 16),
        "seed": torch.tensor([1]),
        "step": torch.tensor([1]),
        "layer": 0,
    }
    block_gated_linear(**good)
    with pytest.raises(ValueError, match=message):
        block_gated_linear(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 2}, "groups = 1"),
        ({"stride": 0}, "stride"),
        ({"padding": (1, 2, 3)}, "padding"),
        ({"dilation": 9}, "within the padded image"),
        ({"x": torch.zeros(16, 8, 8)}, "expected x"),
        ({"weight": torch.zeros(16, 8, 3, 3)}, "expected x"),
    ],
)
def test_bad_conv(change: dict, message: str) -> None:
    good = {
        "x": torch.zeros(1, 16, 8, 8),
        "weight": torch.zeros(16, 16, 3, 3),
        "logits": torch.zeros(1, 1, 3, 3),
        "gate": HARD,
        "unit": Unit(16, 16),
        "seed": torch.tensor([1]),
        "step": torch.tensor([1]),
        "layer": 0,
    }
    block_gated_conv2d(**good)
    with pytest.raises(ValueError, match=message):
        block_gated_conv2d(**(good | change))
