"""The gated weight materialised forward, its gradient never: dlogits in the epilogue of the dW product.

Forward and dX are the vendor's products with w_eff (K1); backward, dW_eff = dY^T X stays in registers and
only dlogits, and dweight where weights train, are written (K2 as `dlogits._dlogits_kernel`).  It
saves a weight-sized tensor and its two passes, and multiplies in Triton: it pays while T is small
against the memory that it saves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from ..device import PLAIN, gpu_kernel
from ..formats import Layer, conv_grad_input
from ..gates.weight import gated_weight
from ..philox import storage_noise
from ..reference import GateSpec, sample_ref, slope_ref
from ..units import Unit
from .dlogits import launch_dlogits
from .tile import Gated

# --- dlogits as an operation ------------------------------------------------------------------------
# x [T, k], weight [n, k], or x [B, k, H, W], weight [n, k, r, s]; `gate` is a GateSpec, `conv` is stride,
# padding and dilation, each (rows, columns).


def dlogits_ref(
    dy: Tensor, x: Tensor, g: Gated, conv: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """dlogits, dweight, dgain."""
    noise = storage_noise(g.normal.logits, g.seed, g.step, g.layer).to(g.logits.dtype)
    z = sample_ref(g.gate, g.logits, noise)
    gain, wide = 1.0 if g.gain is None else g.gain, g.logits.dtype
    if x.ndim == 2:
        dw = dy.to(wide).T @ x.to(wide)
    else:
        slide = {"stride": conv[:2], "padding": conv[2:4], "dilation": conv[4:]}
        dw = conv2d_weight(x.to(wide), g.weight.shape, dy.to(wide), **slide)
    dlogits = dw * g.weight * slope_ref(g.gate, z, g.logits) * gain
    return dlogits, (dw * z * gain).to(g.weight.dtype), (dw * g.weight * z).sum()


@torch.library.custom_op("sparsecore::gated_dlogits", mutates_args=(), device_types=PLAIN)
def _dlogits_op(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dlogits, dweight, dgain; the latter two empty where `needs` says so."""
    g = Gated(weight, logits, gain, seed, step, layer, GateSpec.of(gate))
    outs = _new_gradients(weight, logits, needs)
    for out, gradient in zip(outs, dlogits_ref(dy, x, g, conv), strict=True):
        if out.numel():
            out.copy_(gradient)
    return outs


@gpu_kernel(_dlogits_op)
def _(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: Sequence[float], conv: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ds, dw, dgain = outs = _new_gradients(weight, logits, needs)
    if not (dy.numel() and weight.numel()):
        for out in outs:
            out.zero_()
        return outs
    g = Gated(weight, logits, gain, seed, step, layer, GateSpec.of(gate))
    layout = torch.channels_last if dy.ndim == 4 else torch.contiguous_format
    dy = dy.contiguous(memory_format=layout)
    want_w, want_gain = needs
    launch_dlogits(
        ds, dw if want_w else None, dgain if want_gain else None, dy, x, g, conv=tuple(conv)
    )
    return outs


@_dlogits_op.register_fake
def _(dy, x, weight, logits, gain, seed, step, layer, gate, conv, needs):
    return _new_gradients(weight, logits, needs)


def _new_gradients(
    weight: Tensor, logits: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(logits),
        torch.empty_like(weight) if needs[0] else weight.new_empty(0),
        logits.new_empty(()) if needs[1] else logits.new_empty(0),
    )


# --- The layer --------------------------------------------------------------------------------------


class _EpilogueGated(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, logits, bias, log_gain, seed, step, layer, gate, slide):
        address = {"gate": gate, "seed": seed, "step": step, "layer": layer}
        w = gated_weight(weight, logits, log_gain, unit=Unit(), dtype=x.dtype, **address)
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, w, bias) if slide is None else F.conv2d(x, w, bias, *slide)
        return y, w

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, logits, bias, log_gain, seed, step, *ctx.rest = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, logits, log_gain, seed, step, output[1])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> Any:
        dy = grads[0]
        x, weight, logits, log_gain, seed, step, w = ctx.saved_tensors
        layer, gate, slide = ctx.rest
        need_x, need_w, need_s, need_b, need_gain = ctx.needs_input_grad[:5]
        dx = None
        if need_x:
            if slide is None:
                dx = dy @ w
            else:
                dx = conv_grad_input(dy, w, Layer(tuple(w.shape), _flat(slide)), x.shape)
        ds = dw = dgain = None
        if need_s or need_w or need_gain:
            flat = x.reshape(-1, x.shape[-1]) if slide is None else x
            dy_flat = dy.reshape(-1, dy.shape[-1]) if slide is None else dy
            gain = None if log_gain is None else log_gain.exp()
            conv = (1, 1, 0, 0, 1, 1) if slide is None else _flat(slide)
            ds, dw, dgain = _dlogits_op(
                dy_flat, flat, weight, logits, gain, seed, step, layer, tuple(gate), conv,
                [need_w, need_gain],
            )  # fmt: skip
            dgain = dgain * gain if need_gain and gain is not None else None
        db = None
        if need_b:
            rows, over = (dy.reshape(-1, len(weight)), 0) if slide is None else (dy, (0, 2, 3))
            db = rows.sum(over, dtype=ctx.bias_dtype)
        return dx, dw if need_w else None, ds, db, dgain, *[None] * 5


def _flat(slide) -> tuple[int, ...]:
    return tuple(v for pair in slide for v in pair)


def epilogue_gated(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, log_gain: Tensor | None,
    *, gate: GateSpec, seed: Tensor, step: Tensor, layer: int,
    slide: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None = None,
) -> Tensor:  # fmt: skip
    """x [*batch, k] and weight [n, k], or x [b, k, h, w] and weight [n, k, r, s] with `slide` = stride, padding
    and dilation, each (rows, columns); one gate a weight.  Differentiable once.

    Computes in x's dtype, under autocast in autocast's.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return _EpilogueGated.apply(
            x, weight, logits, bias, log_gain, seed, step, layer, gate, slide
        )[0]
