"""Problems of gated layers, their truth in float64, and what the kernels of `fused` and `epilogue` make of them."""

from functools import partial
from typing import NamedTuple

import torch
from bounds import Expected, gated, require
from helpers import DEVICE, randn
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels import philox
from sparsecore.kernels.gated.dlogits import launch_dlogits
from sparsecore.kernels.gated.fused_launch import launch_backward, launch_forward
from sparsecore.kernels.gated.tile import Gated, Tiles
from sparsecore.kernels.reference import (
    BERNOULLI,
    CONCRETE,
    GAUSSIAN,
    HARD_CONCRETE,
    GateSpec,
)
from sparsecore.kernels.units import Unit

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


GATES = [
    GateSpec(CONCRETE, 1.0),
    GateSpec(CONCRETE, 2 / 3),
    GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1),
    GateSpec(GAUSSIAN, 0.5),
    GateSpec(BERNOULLI),
]


PLAIN = (1, 1, 0, 0, 1, 1)


class Case(NamedTuple):
    x: tuple[int, ...]  # [t, k] or [b, k, h, w]
    w: tuple[int, ...]  # [n, k] or [n, k, r, s]
    conv: tuple[int, ...] = PLAIN
    layout: str = "contiguous"


LINEAR = {
    "one": Case((1, 1), (1, 1)),
    "quads": Case((64, 64), (63, 64)),
    "odd": Case((17, 65), (130, 65)),
    "full": Case((128, 36), (33, 36)),
    "one-output": Case((15, 130), (1, 130)),
    "one-input": Case((16, 1), (37, 1)),
    "parts": Case((1, 768), (96, 768)),
    "parts-of-outputs": Case((1, 40), (768, 40)),
    "63": Case((63, 63), (63, 63)),
    "transposed": Case((33, 20), (17, 20), layout="transposed"),
    "every-second": Case((33, 20), (17, 20), layout="every-second"),
}


CONV = {
    "3x3": Case((2, 19, 9, 8), (17, 19, 3, 3), (1, 1, 1, 1, 1, 1)),
    "3x3-channels-last": Case((2, 16, 5, 6), (18, 16, 3, 3), (1, 1, 1, 1, 1, 1), "channels_last"),
    "all-of-it": Case((2, 5, 9, 8), (7, 5, 3, 2), (2, 3, 1, 0, 2, 1), "channels_last"),
    "padding-past-the-filter": Case((1, 3, 4, 3), (5, 3, 2, 1), (3, 2, 3, 2, 1, 1)),
    "1x1": Case((3, 12, 4, 5), (9, 12, 1, 1)),
    "1x1-channels-last": Case((3, 12, 4, 5), (9, 12, 1, 1), PLAIN, "channels_last"),
    "1x1-strided": Case((3, 12, 4, 5), (9, 12, 1, 1), (2, 2, 0, 0, 1, 1), "channels_last"),
}


if DEVICE == "cuda":  # real sizes
    LINEAR |= {
        "4096": Case((64, 4096), (4096, 4096)),
        "4096-full": Case((128, 4096), (4096, 4096)),
        "vit-b": Case((100, 768), (3072, 768)),
    }
    CONV |= {
        "resnet-50": Case((8, 256, 14, 14), (256, 256, 3, 3), (1, 1, 1, 1, 1, 1), "channels_last"),
    }


class Problem(NamedTuple):
    x: Tensor
    bias: Tensor
    dy: Tensor
    g: Gated
    conv: tuple[int, ...] = PLAIN


def one(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


def lay(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "every-second":
        return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]
    return tensor


def dense(tensor: Tensor) -> Tensor:
    return lay(tensor, "channels_last") if tensor.ndim == 4 else tensor.contiguous()


def problem(
    case: Case,
    dtype: torch.dtype,
    gate: GateSpec = GATES[1],
    *,
    shift: float = 0.0,
    weight_dtype: torch.dtype = torch.float32,
) -> Problem:
    x = lay(randn(*case.x, seed=1).to(DEVICE, dtype), case.layout)
    weight = lay(randn(*case.w, seed=2).to(DEVICE, weight_dtype), case.layout)
    logits = lay(randn(*case.w, seed=3).to(DEVICE) + shift, case.layout)
    bias = randn(case.w[0], seed=4).to(DEVICE)
    gain = torch.tensor(1.3, device=DEVICE)
    g = Gated(weight, logits, gain, one(5), one(2**33 + 6), 7, gate)
    y = product_of(x, weight.to(dtype), bias.to(dtype), case.conv)
    return Problem(x, bias, dense(randn(*y.shape, seed=5).to(DEVICE, dtype)), g, case.conv)


def product_of(x: Tensor, weight: Tensor, bias: Tensor, conv: tuple[int, ...]) -> Tensor:
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, conv[:2], conv[2:4], conv[4:])


def expected(p: Problem) -> dict[str, Expected]:
    """Outputs and gradients in float64, with the kernels' noise."""
    g = p.g
    u = philox.storage_noise(g.normal.logits, g.seed, g.step, g.layer, exact=True)
    layer = partial(product_of, conv=p.conv)
    return gated(layer, p.x, g.weight, g.logits, p.bias, g.gain, p.dy, g.gate, Unit(), u)


def poisoned(like: Tensor, guard: list[Tensor]) -> Tensor:
    """NaN in the shape and layout of a tensor, with NaN around it to be checked afterwards."""
    room = torch.full((like.numel() + 128,), float("nan"), dtype=like.dtype, device=like.device)
    guard += [room[:64], room[-64:]]
    return room[64:-64].as_strided(like.shape, torch.empty_like(like).stride())


def by_fused(p: Problem, tiles: Tiles | None = None) -> dict[str, Tensor]:
    """Everything by the two kernels of `fused`."""
    guard: list[Tensor] = []
    y, dx = poisoned(p.dy, guard), poisoned(dense(p.x), guard)
    found = {"y": y, "dx": dx} | gates_of(p, guard)
    launch_forward(y, p.x, p.bias, p.g, tiles=tiles)
    gates = found["dlogits"], found["dweight"], found["dgain"]
    launch_backward(dx, *gates, p.dy, p.x, p.g, tiles=tiles)
    assert all(bool(edge.isnan().all()) for edge in guard), "memory beyond an output was written"
    return found


def by_dlogits(p: Problem, tiles: Tiles | None = None) -> dict[str, Tensor]:
    """The gates' and weights' gradients by the kernel of `epilogue`."""
    guard: list[Tensor] = []
    found = gates_of(p, guard)
    launch_dlogits(*found.values(), p.dy, p.x, p.g, conv=p.conv, tiles=tiles)
    assert all(bool(edge.isnan().all()) for edge in guard), "memory beyond an output was written"
    return found


def gates_of(p: Problem, guard: list[Tensor]) -> dict[str, Tensor]:
    """Where the gradients of gates, weights and gain go."""
    like = {"dlogits": p.g.logits, "dweight": p.g.weight, "dgain": torch.empty((), device=DEVICE)}
    return {name: poisoned(tensor, guard) for name, tensor in like.items()}


def check(p: Problem, found: dict[str, Tensor]) -> None:
    right = expected(p)
    for name, value in found.items():
        require(name, value, right[name])
