"""One layer's gated weight as an operator of PyTorch: w_eff = exp(log_gain) w z, z ~ gate(logits).

Sampling and its backward are the kernels of `gates`; nothing but the inputs is kept for the backward,
which draws z again from (seed, step, layer).  On the CPU it is plain PyTorch.
"""

from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..device import PLAIN, gpu_kernel
from ..philox import storage_noise
from ..reference import BERNOULLI, GateSpec, sample_ref, slope_ref
from ..units import Unit, apply_ref, gather_ref, project_ref, unit_shape
from .launch import launch_backward, launch_sample
from .segments import Geometry, Segments, is_channels_last, is_dense, plan


@cache  # for good: graphs remember where these tables lie
def _plan(geometry: Geometry, unit: Unit, device: torch.device) -> Segments:
    return plan([geometry], unit, [[0] * 6], device)


@torch.library.custom_op("sparsecore::gated_weight", mutates_args=(), device_types=PLAIN)
def _gated_weight(
    weight: Tensor, logits: Tensor, log_gain: Tensor | None, seed: Tensor, step: Tensor,
    layer: int, gate: list[float], unit: list[int], fast: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    spec, covers = GateSpec.of(gate), Unit(*unit)
    noise = storage_noise(logits, seed, step, layer).to(logits.dtype)
    z = project_ref(sample_ref(spec, logits, noise), covers)
    product = apply_ref(weight, z, covers)
    product = product if log_gain is None else product * log_gain.exp()
    return product.to(dtype)


@gpu_kernel(_gated_weight)
def launch_gated_weight(
    weight: Tensor, logits: Tensor, log_gain: Tensor | None, seed: Tensor, step: Tensor,
    layer: int, gate: list[float], unit: list[int], fast: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """K1 for one layer."""
    covers = Unit(*unit)
    out = torch.empty_like(weight, dtype=dtype)
    if out.numel():
        launch_sample(
            _plan(_geometry(weight, layer), covers, weight.device), GateSpec.of(gate), covers,
            weight=weight, logits=logits, out=out, q=None, log_gain=log_gain,
            seed=seed, step=step, fast=fast,
        )  # fmt: skip
    return out


@_gated_weight.register_fake
def _(weight, logits, log_gain, seed, step, layer, gate, unit, fast, dtype):
    return torch.empty_like(weight, dtype=dtype)


@torch.library.custom_op("sparsecore::gated_weight_backward", mutates_args=(), device_types=PLAIN)
def _backward(
    grad: Tensor, weight: Tensor, logits: Tensor, log_gain: Tensor | None, seed: Tensor,
    step: Tensor, layer: int, gate: list[float], unit: list[int], fast: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dlogits, dweight or nothing, dlog_gain)."""
    spec, covers = GateSpec.of(gate), Unit(*unit)
    noise = storage_noise(logits, seed, step, layer).to(logits.dtype)
    z = project_ref(sample_ref(spec, logits, noise), covers)
    scaled = grad.to(weight.dtype)
    scaled = scaled if log_gain is None else scaled * log_gain.exp()
    through = gather_ref(scaled * weight, covers)
    grad_weight = apply_ref(scaled, z, covers) if want_weight else weight.new_empty(0)
    return (
        (slope_ref(spec, z, logits) * through).to(logits.dtype),
        grad_weight,
        torch.dot(through.flatten(), z.flatten()),
    )


@gpu_kernel(_backward)
def launch_gated_weight_backward(
    grad: Tensor, weight: Tensor, logits: Tensor, log_gain: Tensor | None, seed: Tensor,
    step: Tensor, layer: int, gate: list[float], unit: list[int], fast: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """K2 for one layer."""
    covers = Unit(*unit)
    like = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
    grad = grad.contiguous(memory_format=like)
    made = _plan(_geometry(weight, layer), covers, weight.device)
    ds = torch.empty_like(logits)
    dw = torch.empty_like(weight) if want_weight else None
    partials = torch.zeros(len(made.chunks), 4, device=weight.device, dtype=torch.float32)
    if weight.numel():
        launch_backward(
            made, GateSpec.of(gate), covers, grad=grad, grad_offsets=torch.zeros_like(seed),
            weight=weight, logits=logits, out=weight, q=None, log_gain=log_gain, seed=seed,
            step=step, ds=ds, dw=dw, partials=partials, multi=False, fast=fast,
        )  # fmt: skip
    return ds, weight.new_empty(0) if dw is None else dw, partials[:, 3].sum()


@_backward.register_fake
def _(grad, weight, logits, log_gain, seed, step, layer, gate, unit, fast, want_weight):
    dw = torch.empty_like(weight) if want_weight else weight.new_empty(0)
    return torch.empty_like(logits), dw, torch.empty((), device=weight.device, dtype=weight.dtype)


def _keep(ctx, inputs, output) -> None:
    weight, logits, log_gain, seed, step, *ctx.rest = inputs
    ctx.save_for_backward(weight, logits, log_gain, seed, step)


def _autograd(ctx, grad: Tensor):
    weight, logits, log_gain, seed, step = ctx.saved_tensors
    layer, gate, unit, fast, _ = ctx.rest
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        found = _differentiable(grad, (weight, logits, log_gain), wanted, seed, step, *ctx.rest)
    else:
        ds, dw, dgain = _backward(
            grad, weight, logits, log_gain, seed, step, layer, gate, unit, fast, wanted[0]
        )
        found = dw if wanted[0] else None, ds, dgain if wanted[2] else None
    return *found, None, None, None, None, None, None, None


def _differentiable(grad, inputs, wanted, seed, step, layer, gate, unit, fast, dtype):
    """The gradients as a graph, for a second backward: autograd through the reference."""
    weight, logits, log_gain = inputs
    spec, covers = GateSpec.of(gate), Unit(*unit)
    noise = storage_noise(logits.detach(), seed, step, layer).to(logits.dtype)
    z = sample_ref(spec, logits, noise)
    if spec.kind == BERNOULLI:
        p = torch.sigmoid(logits)
        z = z.detach() + p - p.detach()  # straight through
    product = apply_ref(weight, project_ref(z, covers), covers)
    product = product if log_gain is None else product * log_gain.exp()
    chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(product.to(dtype), chosen, grad, create_graph=True))
    return tuple(next(found) if want else None for want in wanted)


_gated_weight.register_autograd(_autograd, setup_context=_keep)


def _geometry(weight: Tensor, layer: int) -> Geometry:
    return Geometry(tuple(weight.shape), is_channels_last(weight), layer)


def gated_weight(
    weight: Float[Tensor, "n k *taps"],
    logits: Float[Tensor, "..."],
    log_gain: Float[Tensor, ""] | None = None,
    *,
    gate: GateSpec,
    unit: Unit,
    seed: Int64[Tensor, "1"],
    step: Int64[Tensor, "1"],
    layer: int,
    dtype: torch.dtype | None = None,
    fast: bool = True,
) -> Float[Tensor, "n k *taps"]:
    """exp(log_gain) * weight * z in `dtype`, with z ~ gate(logits) drawn at the address (seed, step, layer).

    Differentiable in weight, logits and log_gain, also twice.  Under autocast `dtype` is autocast's.

    Args:
        weight: [n, k] or [n, k, r, s], contiguous or channels_last (anything else is copied).
        logits: float32, `unit_shape(weight.shape, unit)`; memory format as the weight's where each weight
            has a gate.
        dtype: of the result, the weight's by default.
        fast: approximate special functions on a GPU (about 2 ulp) in place of exact ones.

    Errors: ValueError for a shape that does not fit.
    """
    expected = unit_shape(weight.shape, unit)
    if logits.shape != expected:
        raise ValueError(
            f"logits: expected shape {tuple(expected)} for a weight {tuple(weight.shape)} and {unit}, "
            f"got {tuple(logits.shape)}"
        )
    if dtype is None:
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    if not is_dense(weight):
        weight = weight.contiguous()
    if unit.single and weight.ndim == 4:
        like = torch.channels_last if is_channels_last(weight) else torch.contiguous_format
        logits = logits.contiguous(memory_format=like)
    else:
        logits = logits.contiguous()
    return _gated_weight(
        weight, logits, log_gain, seed, step, layer, [float(v) for v in gate], list(unit), fast, dtype
    )  # fmt: skip
