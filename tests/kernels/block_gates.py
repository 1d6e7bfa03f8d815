"""Layers with gates of blocks and channels, by the kernels and composed in PyTorch, for the tests of both."""

from functools import partial
from typing import NamedTuple

import torch
from bounds import Expected, gated
from helpers import DEVICE, randn
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels import philox
from sparsecore.kernels.gated import blocks as block_gated
from sparsecore.kernels.reference import (
    BERNOULLI,
    CONCRETE,
    GAUSSIAN,
    HARD_CONCRETE,
    GateSpec,
    sample_ref,
)
from sparsecore.kernels.units import Unit, apply_ref, unit_shape

HARD = GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1)
GAUSS = GateSpec(GAUSSIAN, 0.5)
STEP = GateSpec(BERNOULLI)
SOFT = GateSpec(CONCRETE, 0.7)
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
LAYER = 3
NAMES = ("y", "dx", "dweight", "dlogits", "dbias", "dgain")
KERNELS = ("y", "dx", "dweight", "dlogits", "dgain")  # dbias is one sum in PyTorch


class Case(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    unit: Unit
    gate: GateSpec
    axes: tuple[int, ...] = (1, 1, 0, 0, 1, 1)  # stride, padding, dilation


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    logits: Tensor
    bias: Tensor
    gain: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(tensor.detach().to(dtype) for tensor in self))


def one(value: int) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def inputs(case: Case, dtype: torch.dtype, shift: float = -0.4) -> Inputs:
    """x in dtype; everything that trains in float32."""
    weight = randn(*case.weight, seed=2) / case.weight[1] ** 0.5
    logits = randn(*unit_shape(case.weight, case.unit), seed=3) + shift
    bias = randn(case.weight[0], seed=4)
    x = randn(*case.x, seed=1)
    made = Inputs(x, weight, logits, bias, torch.tensor(1.3))
    return Inputs(*(tensor.to(DEVICE) for tensor in made))._replace(x=x.to(DEVICE, dtype))


def noise(case: Case) -> Tensor:
    u = torch.empty(unit_shape(case.weight, case.unit), device=DEVICE)
    return philox.uniform_(u, one(11), one(5), LAYER, exact=True)


def layer(case: Case, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, case.axes[:2], case.axes[2:4], case.axes[4:])


def expected(case: Case, given: Inputs, dy: Tensor) -> dict[str, Expected]:
    return gated(partial(layer, case), *given, dy, case.gate, case.unit, noise(case))


def composed(case: Case, given: Inputs, dy: Tensor, u: Tensor) -> list[Tensor]:
    """y and the gradients by autograd, in x's dtype around the gates' and weights' own."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    x, weight, logits, bias, gain = leaves
    if case.gate.kind == BERNOULLI:  # straight through sigmoid
        soft = torch.sigmoid(logits)
        z = soft + (sample_ref(case.gate, logits, u.to(logits)) - soft).detach()
    else:
        z = sample_ref(case.gate, logits, u.to(logits))
    product = (apply_ref(weight, z, case.unit) * gain).to(x.dtype)
    y = layer(case, x, product, bias.to(x.dtype))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def launched(case: Case, given: Inputs, dy: Tensor) -> list[Tensor]:
    """y and the gradients from the kernels, in the order of `KERNELS`."""
    x, weight, logits, bias, gain = given
    rest = (one(11), one(5), LAYER, list(case.gate), list(case.unit), list(case.axes))
    y = block_gated.launch_forward(x, weight, logits, bias, gain, *rest)
    backward = block_gated.launch_backward(dy, x, weight, logits, gain, *rest, True, True)
    dx, dweight, dlogits, dgain = backward
    return [y, dx, dweight, dlogits, dgain]


def output_like(case: Case, given: Inputs) -> Tensor:
    if given.x.ndim == 2:
        return randn(case.x[0], case.weight[0], seed=9).to(given.x)
    axes = case.axes
    y = F.conv2d(given.x.float(), given.weight, None, axes[:2], axes[2:4], axes[4:])
    return randn(*y.shape, seed=9).to(given.x)


LINEAR = [
    Case((70, 48), (48, 48), Unit(16, 16), HARD),
    Case((37, 75), (50, 75), Unit(16, 16), GAUSS),  # edge blocks
    Case((70, 75), (70, 75), Unit(32, 16), STEP),
    Case((1, 96), (40, 96), Unit(16, 32), SOFT),
    Case((70, 150), (130, 150), Unit(64, 64), HARD),
    Case((70, 130), (64, 130), Unit(64, 128), STEP),
    Case((33, 128), (256, 128), Unit(128, 128), HARD),
    Case((70, 75), (130, 75), Unit(1, 0), HARD),
    Case((70, 70), (150, 70), Unit(3, 0), STEP),
]
CONV = [
    Case((2, 40, 5, 6), (20, 40, 3, 3), Unit(16, 16), HARD, (1, 1, 1, 1, 1, 1)),
    Case((2, 33, 7, 6), (33, 33, 3, 2), Unit(16, 32), STEP, (2, 1, 1, 2, 2, 1)),
    Case((1, 64, 5, 5), (70, 64, 3, 3), Unit(64, 64), GAUSS, (2, 2, 1, 1, 1, 1)),
    Case((2, 20, 5, 4), (24, 20, 3, 3), Unit(1, 0), HARD, (2, 1, 0, 1, 1, 2)),
    Case((2, 40, 4, 5), (20, 40, 1, 1), Unit(16, 16), HARD),
    Case((2, 40, 4, 5), (20, 40, 1, 1), Unit(16, 16), HARD, (2, 2, 0, 0, 1, 1)),
]

if DEVICE == "cuda":  # real sizes
    LINEAR += [
        Case((2048, 4096), (4096, 4096), Unit(64, 64), HARD),
        Case((12608, 768), (3072, 768), Unit(32, 32), GAUSS),
        Case((2048, 4096), (4096, 4096), Unit(1, 0), HARD),
    ]
    CONV += [
        Case((64, 256, 14, 14), (256, 256, 3, 3), Unit(64, 64), HARD, (1, 1, 1, 1, 1, 1)),
        Case((64, 1024, 14, 14), (256, 1024, 1, 1), Unit(128, 128), HARD),
    ]

SMALL = Case((2, 20, 4, 5), (20, 20, 2, 2), Unit(16, 16), HARD, (1, 1, 1, 1, 1, 1))
