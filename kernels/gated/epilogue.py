"""The gated weight materialised forward, its gradient never: dlogits in the epilogue of the dW product.

Forward and dX are the vendor's products with w_eff (K1); backward, dW_eff = dY^T X stays in registers and
only dlogits, and dweight where weights train, are written (K2 as `fused_kernels._dlogits_kernel`).  It
saves a weight-sized tensor and its two passes, and multiplies in Triton: it pays while T is small
against the memory that it saves.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import Layer, conv_grad_input
from ..gates.weight import gated_weight
from ..reference import GateSpec
from ..units import Unit
from .fused import _backward_op


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
            flat = x.flatten(0, -2) if slide is None else x
            dy_flat = dy.flatten(0, -2) if slide is None else dy
            gain = None if log_gain is None else log_gain.exp()
            conv = (1, 1, 0, 0, 1, 1) if slide is None else _flat(slide)
            needs = [False, True, need_w, need_gain]
            _, ds, dw, dgain = _backward_op(
                dy_flat, flat, weight, logits, gain, seed, step, layer, tuple(gate), conv, needs
            )
            dgain = dgain * gain if need_gain and gain is not None else None
        db = None
        if need_b:
            channel = dy.ndim - 1 if slide is None else 1
            db = dy.sum([i for i in range(dy.ndim) if i != channel], dtype=ctx.bias_dtype)
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
