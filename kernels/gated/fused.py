"""Gated linear layers of few tokens with the gates sampled inside the matrix product: no mask is ever stored.

y = x @ (gain * weight * z).T + bias, z one gate per weight.  A tile of weights draws its noise from
(seed, step, layer, its place in the weight's memory) where it is multiplied, once forward and once
backward, where the same pass over the weights makes dx, dlogits, dweight and dgain.  Weight and logits in
float32 are 8 bytes a weight forward and 12 backward, where materialising the gated weight takes 28; with
a weight in 16 bits 6 and 10.  The tokens must fit one tile for that: TOKENS at most.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ..device import PLAIN, gpu_kernel
from ..philox import storage_noise
from ..reference import GateSpec, sample_ref, slope_ref
from .fused_launch import TOKENS, launch_backward, launch_forward
from .tile import Gated

# --- In plain PyTorch ------------------------------------------------------------------------------


def _sample(g: Gated) -> tuple[Tensor, Tensor | float]:
    noise = storage_noise(g.normal.logits, g.seed, g.step, g.layer).to(g.logits.dtype)
    return sample_ref(g.gate, g.logits, noise), 1.0 if g.gain is None else g.gain


def forward_ref(x: Tensor, bias: Tensor | None, g: Gated) -> Tensor:
    z, gain = _sample(g)
    weight = (g.weight * z * gain).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def backward_ref(dy: Tensor, x: Tensor, g: Gated) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dlogits, dweight, dgain."""
    z, gain = _sample(g)
    dx = dy @ (g.weight * z * gain).to(x.dtype)
    dw = dy.to(g.logits.dtype).T @ x.to(g.logits.dtype)
    dlogits = dw * g.weight * slope_ref(g.gate, z, g.logits)
    return dx, dlogits * gain, (dw * z * gain).to(g.weight.dtype), (dw * g.weight * z).sum()


# --- Custom operations -----------------------------------------------------------------------------
# x [T, k], weight [n, k]; `gate` is a GateSpec.


@torch.library.custom_op("sparsecore::fused_gated_linear", mutates_args=(), device_types=PLAIN)
def _op(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float],
) -> Tensor:  # fmt: skip
    return forward_ref(x, bias, _gated(weight, logits, gain, seed, step, layer, gate))


@gpu_kernel(_op)
def forward_by_kernel(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float],
) -> Tensor:  # fmt: skip
    g = _gated(weight, logits, gain, seed, step, layer, gate)
    y = x.new_empty(len(x), len(weight))
    if not (y.numel() and weight.numel()):
        return forward_ref(x, bias, g)
    return launch_forward(y, x, bias, g)


@_op.register_fake
def _(x, weight, logits, bias, gain, seed, step, layer, gate):
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op(
    "sparsecore::fused_gated_linear_backward", mutates_args=(), device_types=PLAIN
)
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dlogits, dweight, dgain; empty where `needs` says so."""
    g = _gated(weight, logits, gain, seed, step, layer, gate)
    outs = _new_gradients(x, weight, logits, needs)
    for out, gradient in zip(outs, backward_ref(dy, x, g), strict=True):
        if out.numel():
            out.copy_(gradient)
    return outs


@gpu_kernel(_backward_op)
def backward_by_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g = _gated(weight, logits, gain, seed, step, layer, gate)
    outs = _new_gradients(x, weight, logits, needs)
    if not (dy.numel() and weight.numel()):
        for out in outs:
            out.zero_()
        return outs
    wanted = (needs[0], any(needs[1:]), *needs[2:])
    dx, ds, dw, dgain = (out if want else None for out, want in zip(outs, wanted, strict=True))
    launch_backward(dx, ds, dw, dgain, dy.contiguous(), x, g)
    return outs


@_backward_op.register_fake
def _(dy, x, weight, logits, gain, seed, step, layer, gate, needs):
    return _new_gradients(x, weight, logits, needs)


def _gated(weight, logits, gain, seed, step, layer, gate) -> Gated:
    return Gated(weight, logits, gain, seed, step, layer, GateSpec.of(gate))


def _new_gradients(
    x: Tensor, weight: Tensor, logits: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    any_gate = any(needs[1:])  # logits' gradient comes with the others
    return (
        x.new_empty(x.shape) if needs[0] else x.new_empty(0),
        torch.empty_like(logits) if any_gate else logits.new_empty(0),
        torch.empty_like(weight) if needs[2] else weight.new_empty(0),
        logits.new_empty(()) if needs[3] else logits.new_empty(0),
    )


def _setup(ctx, inputs, output) -> None:
    x, weight, logits, bias, gain, seed, step, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, logits, gain, seed, step)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy: Tensor):
    x, weight, logits, gain, seed, step = ctx.saved_tensors
    need_x, need_w, need_s, need_b, need_gain = ctx.needs_input_grad[:5]
    needs = [need_x, need_s, need_w, need_gain]
    grads: Sequence[Tensor | None] = [None] * 4
    if any(needs):
        outs = _backward_op(dy, x, weight, logits, gain, seed, step, *ctx.rest, needs)
        grads = [out if need else None for out, need in zip(outs, needs, strict=True)]
    dx, ds, dw, dgain = grads
    db = dy.sum(0, dtype=ctx.bias_dtype) if need_b else None
    return dx, dw, ds, db, dgain, *[None] * 4


torch.library.register_autograd("sparsecore::fused_gated_linear", _backward, setup_context=_setup)


# --- Public function -------------------------------------------------------------------------------


def fused_gated_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "n k"],
    logits: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    gate: GateSpec,
    seed: Int64[Tensor, "1"],
    step: Int64[Tensor, "1"],
    layer: int,
    gain: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "*batch n"]:
    """y = x @ (gain * weight * z).T + bias, one gate z per weight, drawn in the product and never stored.

    Computes in x's dtype with float32 sums; under autocast x is cast to the autocast dtype.  On the
    CPU it is the formula in plain PyTorch, with the noise that `uniform_` gives there.  Gradients: x,
    weight, logits, bias, gain; none twice.

    Args:
        x: float32, float16 or bfloat16 (float64 on the CPU), of TOKENS rows at most.
        weight, bias: float32 or x's dtype.  logits: float32 (float64 with a float64 x).
        seed, step: int64, one element, on x's device; never synchronised.  gain: as logits.

    Errors: ValueError for other shapes, dtypes and devices.
    """
    x = in_compute_dtype(x)
    _check(x, weight, logits, bias, gain, seed, step)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = _op(rows, weight, logits, bias, gain, seed, step, layer, tuple(gate))
    return y.view(*x.shape[:-1], weight.shape[0])


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in the dtype that its layer computes in: under autocast in autocast's."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check(x, weight, logits, bias, gain, seed, step) -> None:
    def expect(ok: bool, expected: str, got: object) -> None:
        if not ok:
            raise ValueError(f"fused_gated_linear: expected {expected}, got {got}")

    allowed = [torch.float32, torch.float16, torch.bfloat16]
    if not x.is_cuda:
        allowed.append(torch.float64)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    expect(x.dtype in allowed, f"x in one of {allowed}", x.dtype)
    expect(weight.ndim == 2, "a weight of 2 dimensions", tuple(weight.shape))
    expect(
        x.ndim >= 1 and x.shape[-1] == weight.shape[1],
        f"x [*batch, {weight.shape[1]}] for weight {tuple(weight.shape)}",
        tuple(x.shape),
    )
    rows = x.shape[:-1].numel()
    expect(rows <= TOKENS, f"at most {TOKENS} rows of x", f"{rows}; materialise the gated weight")
    expect(
        logits.shape == weight.shape,
        f"one logit for each weight, {tuple(weight.shape)} (other units do not fuse)",
        tuple(logits.shape),
    )
    expect(logits.dtype == wide, f"{wide} logits", logits.dtype)
    tensors = {"weight": weight, "logits": logits, "seed": seed, "step": step}
    expect(weight.dtype in (wide, x.dtype), f"weight in {wide} or x's dtype", weight.dtype)
    if bias is not None:
        expect(bias.shape == weight.shape[:1], f"bias [{weight.shape[0]}]", tuple(bias.shape))
        expect(bias.dtype in (wide, x.dtype), f"bias in {wide} or x's dtype", bias.dtype)
        tensors["bias"] = bias
    if gain is not None:
        expect(gain.ndim == 0 and gain.dtype == wide, f"gain as a {wide} scalar", gain)
        tensors["gain"] = gain
    for key, value in (("seed", seed), ("step", step)):
        ok = value.dtype == torch.int64 and value.numel() == 1
        expect(ok, f"{key} as one int64", f"{value.dtype} {tuple(value.shape)}")
    for key, value in tensors.items():
        expect(value.device == x.device, f"{key} on {x.device}", value.device)
