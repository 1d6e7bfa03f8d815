"""Problems of products with gates sampled inside, their truth in float64, and what the kernels make of them."""

from typing import NamedTuple

import torch
from helpers import DEVICE, randn
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels import philox
from sparsecore.kernels.gated.fused import (
    Gated,
    _launch_dlogits,
    _launch_dx,
    _launch_forward,
    _normal,
)
from sparsecore.kernels.gated.fused_launch import Tiles
from sparsecore.kernels.reference import (
    BERNOULLI,
    CONCRETE,
    GAUSSIAN,
    HARD_CONCRETE,
    GateSpec,
    sample_ref,
    slope_ref,
)

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


CASES = {
    "one": Case((1, 1), (1, 1)),
    "quads": Case((65, 64), (63, 64)),
    "odd": Case((17, 65), (130, 65)),
    "long": Case((150, 36), (33, 36)),
    "transposed": Case((33, 20), (17, 20), layout="transposed"),
    "every-second": Case((33, 20), (17, 20), layout="every-second"),
    "3x3": Case((2, 19, 9, 8), (17, 19, 3, 3), (1, 1, 1, 1, 1, 1)),
    "3x3-channels-last": Case((2, 16, 5, 6), (18, 16, 3, 3), (1, 1, 1, 1, 1, 1), "channels_last"),
    "all-of-it": Case((2, 5, 9, 8), (7, 5, 3, 2), (2, 3, 1, 0, 2, 1), "channels_last"),
    "padding-past-the-filter": Case((1, 3, 4, 3), (5, 3, 2, 1), (3, 2, 3, 2, 1, 1)),
    "1x1": Case((3, 12, 4, 5), (9, 12, 1, 1)),
    "1x1-channels-last": Case((3, 12, 4, 5), (9, 12, 1, 1), PLAIN, "channels_last"),
    "1x1-strided": Case((3, 12, 4, 5), (9, 12, 1, 1), (2, 2, 0, 0, 1, 1), "channels_last"),
}


if DEVICE == "cuda":  # real sizes
    CASES |= {
        "4096": Case((64, 4096), (4096, 4096)),
        "vit-b": Case((512, 768), (3072, 768)),
        "resnet-50": Case((8, 256, 14, 14), (256, 256, 3, 3), (1, 1, 1, 1, 1, 1), "channels_last"),
    }


class Problem(NamedTuple):
    x: Tensor
    bias: Tensor
    dy: Tensor
    g: Gated


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
    g = Gated(weight, logits, gain, one(5), one(2**33 + 6), 7, gate, case.conv)
    y = product_of(x, weight.to(dtype), bias.to(dtype), g)
    return Problem(x, bias, dense(randn(*y.shape, seed=5).to(DEVICE, dtype)), g)


def product_of(x: Tensor, weight: Tensor, bias: Tensor, g: Gated) -> Tensor:
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, g.conv[:2], g.conv[2:4], g.conv[4:])


def by_autograd(p: Problem, dtype: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by PyTorch: gates in `wide`, products in `dtype`, the kernels' noise."""
    g = p.g
    u = philox.storage_noise(_normal(g).logits, g.seed, g.step, g.layer, exact=True)
    logits = g.logits.to(wide)
    z = sample_ref(g.gate, logits, u.to(wide)).requires_grad_()
    x, dy = p.x.detach().to(dtype).requires_grad_(), p.dy.to(dtype)
    weight = g.weight.detach().to(wide).requires_grad_()
    gain = g.gain.detach().to(wide).requires_grad_()
    bias = p.bias.detach().to(wide).requires_grad_()
    product = (gain * weight * z).to(dtype)
    y = product_of(x, product, bias.to(dtype), g)
    dx, dz, dw, dgain, db = torch.autograd.grad(y, (x, z, weight, gain, bias), dy)
    dlogits = dz * slope_ref(g.gate, z.detach(), logits)
    found = {"y": y, "dx": dx, "dlogits": dlogits, "dweight": dw, "dgain": dgain, "dbias": db}
    return {name: value.detach() for name, value in found.items()}


def poisoned(like: Tensor, guard: list[Tensor]) -> Tensor:
    """NaN in the shape and layout of a tensor, with NaN around it to be checked afterwards."""
    room = torch.full((like.numel() + 128,), float("nan"), dtype=like.dtype, device=like.device)
    guard += [room[:64], room[-64:]]
    return room[64:-64].as_strided(like.shape, torch.empty_like(like).stride())


def by_kernels(p: Problem, tiles: dict[str, Tiles] | None = None) -> dict[str, Tensor]:
    tiles, guard = tiles or {}, []
    y, dx = poisoned(p.dy, guard), poisoned(dense(p.x), guard)
    ds, dw = poisoned(p.g.logits, guard), poisoned(p.g.weight, guard)
    dgain = poisoned(torch.empty((), device=DEVICE), guard)
    _launch_forward(y, p.x, p.bias, p.g, tiles=tiles.get("fwd"))
    _launch_dx(dx, p.dy, p.x, p.g, tiles=tiles.get("dx"))
    _launch_dlogits(ds, dw, dgain, p.dy, p.x, p.g, tiles=tiles.get("dlogits"))
    assert all(bool(edge.isnan().all()) for edge in guard), "memory beyond an output was written"
    return {"y": y, "dx": dx, "dlogits": ds, "dweight": dw, "dgain": dgain}


def check(p: Problem, found: dict[str, Tensor]) -> None:
    exact = by_autograd(p, torch.float64, torch.float64)
    torchs = by_autograd(p, p.x.dtype, torch.float32)
    for name, value in found.items():
        truth = exact[name]
        scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((value.double() - truth).abs().max() / scale).item()
        bound = 2 * ((torchs[name].double() - truth).abs().max() / scale).item() + 1e-6
        assert value.shape == truth.shape
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"  # also fails for NaN
