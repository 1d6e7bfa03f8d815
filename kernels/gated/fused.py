"""Gated linear and convolution with the gates sampled inside the matrix product: no mask is ever stored.

y = x @ (gain * weight * z).T + bias, z one gate per weight.  A tile of weights draws its noise from
(seed, step, layer, its place in the weight's memory) where it is multiplied, and backward draws it
again.  Each tile of tokens draws anew, so this pays for few tokens.  The sampled tile is the left
operand (y^T = W x^T), which tensor cores take from registers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ..conv_tiles import output_size
from ..philox import storage_noise
from ..reference import GateSpec, sample_ref, slope_ref
from .fused_launch import Gated, _launch_dlogits, _launch_dx, _launch_forward, _normal

# --- In plain PyTorch ------------------------------------------------------------------------------


def _sample(g: Gated) -> tuple[Tensor, Tensor | float]:
    noise = storage_noise(_normal(g).logits, g.seed, g.step, g.layer).to(g.logits.dtype)
    return sample_ref(g.gate, g.logits, noise), 1.0 if g.gain is None else g.gain


def forward_ref(x: Tensor, bias: Tensor | None, g: Gated) -> Tensor:
    z, gain = _sample(g)
    weight = (g.weight * z * gain).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    y = F.conv2d(x, weight, bias, g.conv[:2], g.conv[2:4], g.conv[4:])
    return y.contiguous(memory_format=torch.channels_last)


def backward_ref(dy: Tensor, x: Tensor, g: Gated) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dlogits, dweight, dgain."""
    z, gain = _sample(g)
    weight = (g.weight * z * gain).to(x.dtype)
    wide = g.logits.dtype
    if x.ndim == 2:
        dx = dy @ weight
        dw = dy.to(wide).T @ x.to(wide)
    else:
        conv: dict[str, Any] = {
            "stride": g.conv[:2],
            "padding": g.conv[2:4],
            "dilation": g.conv[4:],
        }
        dx = conv2d_input(x.shape, weight, dy, **conv).contiguous(memory_format=torch.channels_last)
        dw = conv2d_weight(x.to(wide), weight.shape, dy.to(wide), **conv)
    dlogits = dw * g.weight * slope_ref(g.gate, z, g.logits)
    return dx, dlogits * gain, (dw * z * gain).to(g.weight.dtype), (dw * g.weight * z).sum()


# --- Custom operations -----------------------------------------------------------------------------
# x [T, k], weight [n, k], or x [B, k, H, W], weight [n, k, r, s]; `gate` is a GateSpec, `conv` is stride,
# padding and dilation, each (rows, columns).  Outputs that are images are dense and channels-last.


@torch.library.custom_op("sparsecore::fused_gated_conv", mutates_args=(), device_types="cpu")
def _op(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
) -> Tensor:  # fmt: skip
    return forward_ref(x, bias, _gated(weight, logits, gain, seed, step, layer, gate, conv))


@_op.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
) -> Tensor:  # fmt: skip
    g = _gated(weight, logits, gain, seed, step, layer, gate, conv)
    y = _new_output(x, weight, conv)
    if not (y.numel() and weight.numel()):
        return forward_ref(x, bias, g)
    return _launch_forward(y, x, bias, g)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
) -> Tensor:  # fmt: skip
    return _new_output(x, weight, conv)


@torch.library.custom_op(
    "sparsecore::fused_gated_conv_backward", mutates_args=(), device_types="cpu"
)
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dlogits, dweight, dgain; empty where `needs` says so."""
    g = _gated(weight, logits, gain, seed, step, layer, gate, conv)
    outs = _new_gradients(x, weight, logits, needs)
    for out, gradient in zip(outs, backward_ref(dy, x, g), strict=True):
        if out.numel():
            out.copy_(gradient)
    return outs


@_backward_op.register_kernel("cuda")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g = _gated(weight, logits, gain, seed, step, layer, gate, conv)
    dx, ds, dw, dgain = outs = _new_gradients(x, weight, logits, needs)
    if not (dy.numel() and weight.numel()):
        for out in outs:
            out.zero_()
        return outs
    dy = dy.contiguous(memory_format=_layout(dy))
    if needs[0]:
        _launch_dx(dx, dy, x, g)
    if any(needs[1:]):
        _launch_dlogits(ds, dw if needs[2] else None, dgain if needs[3] else None, dy, x, g)
    return outs


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _new_gradients(x, weight, logits, needs)


def _gated(weight, logits, gain, seed, step, layer, gate, conv) -> Gated:
    return Gated(weight, logits, gain, seed, step, layer, GateSpec.of(gate), tuple(conv))


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format


def _new_output(x: Tensor, weight: Tensor, conv: Sequence[int]) -> Tensor:
    shape = [x.shape[0], weight.shape[0]]
    for axis in range(x.ndim - 2):
        shape.append(output_size(x.shape[2 + axis], weight.shape[2 + axis], *conv[axis::2]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _new_gradients(
    x: Tensor, weight: Tensor, logits: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    any_gate = any(needs[1:])  # logits' gradient comes with the others
    return (
        dx if needs[0] else x.new_empty(0),
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
    db = None
    if need_b:
        db = dy.sum([axis for axis in range(dy.ndim) if axis != 1], dtype=ctx.bias_dtype)
    return dx, dw, ds, db, dgain, *[None] * 5


torch.library.register_autograd("sparsecore::fused_gated_conv", _backward, setup_context=_setup)


# --- Public functions ------------------------------------------------------------------------------


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
        x: float32, float16 or bfloat16 (float64 on the CPU).
        weight, bias: float32 or x's dtype.  logits: float32 (float64 with a float64 x).
        seed, step: int64, one element, on x's device; never synchronised.  gain: as logits.

    Errors: ValueError for other shapes, dtypes and devices.
    """
    x = _autocast(x)
    _check("fused_gated_linear", x, weight, logits, bias, gain, seed, step, ndim=2)
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fused_gated_linear: expected x [*batch, {weight.shape[1]}] for weight "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = _op(rows, weight, logits, bias, gain, seed, step, layer, tuple(gate), (1, 1, 0, 0, 1, 1))
    return y.view(*x.shape[:-1], weight.shape[0])


def fused_gated_conv2d(
    x: Float[Tensor, "b k h w"],
    weight: Float[Tensor, "n k r s"],
    logits: Float[Tensor, "n k r s"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    gate: GateSpec,
    seed: Int64[Tensor, "1"],
    step: Int64[Tensor, "1"],
    layer: int,
    gain: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "b n oh ow"]:
    """`fused_gated_linear` as a convolution of one group: the same dtypes, gradients and errors.

    The output is channels-last.  x and weight are read as they lie; channels-last is the fast layout.
    """
    x = _autocast(x)
    _check("fused_gated_conv2d", x, weight, logits, bias, gain, seed, step, ndim=4)
    if x.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"fused_gated_conv2d: expected x [b, {weight.shape[1]}, h, w] for weight "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}; groups are not supported"
        )
    conv = (
        *_pair("stride", stride, 1),
        *_pair("padding", padding, 0),
        *_pair("dilation", dilation, 1),
    )
    for axis in range(2):
        span = conv[4 + axis] * (weight.shape[2 + axis] - 1) + 1
        if x.shape[2 + axis] + 2 * conv[2 + axis] < span:
            raise ValueError(
                f"fused_gated_conv2d: a filter that spans {span} does not fit in "
                f"{x.shape[2 + axis]} pixels with padding {conv[2 + axis]}"
            )
    return _op(x, weight, logits, bias, gain, seed, step, layer, tuple(gate), conv)


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(
            f"fused_gated_conv2d: expected {name} as one or two integers >= {least}, got {value}"
        )
    return pair


def _check(name, x, weight, logits, bias, gain, seed, step, *, ndim: int) -> None:
    def expect(ok: bool, expected: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {got}")

    allowed = [torch.float32, torch.float16, torch.bfloat16]
    if not x.is_cuda:
        allowed.append(torch.float64)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    expect(x.dtype in allowed, f"x in one of {allowed}", x.dtype)
    expect(weight.ndim == ndim, f"a weight of {ndim} dimensions", tuple(weight.shape))
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
