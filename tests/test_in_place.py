"""What follows a sparse layer may write into its output, as it may into that of any layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import rand, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc

PLANS = ("mask", "state", "csr", "compact", "block:16x16")
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: F.relu(y, inplace=True),
    "add": lambda y: y.add_(1),
    "mul": lambda y: y.mul_(2),
    "dropout": lambda y: F.dropout(y, 1.0, inplace=True),  # all of it: nothing is drawn
    "fill": lambda y: y.masked_fill_(y > 0, 3.0),
    "slice": lambda y: y[:, :1].zero_().new_zeros(()) + y,
}
INPUTS = {
    "2d": (5, 8),
    "one": (1, 8),
    "none": (0, 8),
    "3d": (2, 3, 8),
    "1d": (8,),
    "images": (2, 8, 5, 5),
    "image": (1, 8, 5, 5),
    "no images": (0, 8, 5, 5),
}
MASKS = {"empty": 0.0, "half": 0.5, "full": 1.0}


def layer_of(plan: str, kind: str, density: float, bias: bool) -> nn.Module:
    conv = "image" in kind

    def build() -> nn.Module:
        return nn.Conv2d(8, 16, 3, bias=bias) if conv else nn.Linear(8, 16, bias=bias)

    model: Any = sc.sparsify_(nn.Sequential(seeded(build)))
    shape = (16, 8, 3, 3) if conv else (16, 8)
    model[0].set_mask_(rand(*shape) < density)
    sc.plan_(model, plan)
    return model


@pytest.mark.parametrize("density", MASKS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("plan", PLANS)
def test_an_output_may_be_written_to(plan: str, kind: str, density: str) -> None:
    """The gradients are those of writing to a copy."""
    if plan.startswith("block") and kind not in ("2d", "no images"):
        return  # interpreted kernels take their time
    for bias in (True, False):
        model = layer_of(plan, kind, MASKS[density], bias)
        for name, after in AFTER.items():
            if name == "slice" and kind == "1d":
                continue
            found = []
            for copied in (True, False):
                x = randn(*INPUTS[kind], seed=1).requires_grad_()
                model.zero_grad()
                y = model(x)
                y = after(y.clone() if copied else y)
                y.square().sum().backward()
                gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                found.append([y.detach(), x.grad, *gradients])
            for expected, got in zip(*found, strict=True):
                torch.testing.assert_close(got, expected)  # strides differ, and with them sums


@pytest.mark.parametrize("density", MASKS)
@pytest.mark.parametrize("plan", PLANS)
def test_evaluated_outputs_and_inputs_share_no_memory(plan: str, density: str) -> None:
    for kind in ("2d", "3d", "images"):
        model, x = layer_of(plan, kind, MASKS[density], True).eval(), randn(*INPUTS[kind])
        with torch.no_grad():
            first = model(x)
            kept = first.clone()
            model(x).fill_(7.0)
            assert torch.equal(first, kept) and torch.equal(model(x), kept)
        assert torch.equal(x, randn(*INPUTS[kind]))
