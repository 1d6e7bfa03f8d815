"""A weight times its sampled gates, with few allocations and derivatives of any order."""

import torch
from jaxtyping import Float
from torch import Tensor

from .gates import AbstractGate
from .granularity import Granularity


class _GatedWeight(torch.autograd.Function):
    """gain * weight * sample(logits, noise).  Returns z too, so that a second backward can differentiate its slope.

    Weight-sized allocations with one gate per weight: z and the product forward, dlogits backward.
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        logits: Tensor,
        noise: Tensor,
        gain: Tensor | None,
        gate: AbstractGate,
        granularity: Granularity,
    ) -> tuple[Tensor, Tensor]:
        z = gate.sample(logits, noise, granularity.project)
        product = granularity.apply(weight, z)
        if gain is not None:
            product = product.mul_(gain)
        ctx.gate, ctx.granularity = gate, granularity
        ctx.save_for_backward(weight, logits, z, gain, None if gain is None else product)
        ctx.set_materialize_grads(False)
        return product, z

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        grad_product, grad_z = grads
        if grad_product is None and grad_z is None:
            return None, None, None, None, None, None
        if grad_product is None or grad_z is not None or torch.is_grad_enabled():
            weight, logits, gain = _differentiable(ctx, grad_product, grad_z)
        else:
            weight, logits, gain = _in_place(ctx, grad_product)
        return weight, logits, None, gain, None, None


def _in_place(ctx, grad_product: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of weight, logits and gain, with dlogits as the only new tensor of its size."""
    weight, logits, z, gain, product = ctx.saved_tensors
    wanted, granularity = ctx.needs_input_grad, ctx.granularity
    grad_weight = grad_logits = grad_gain = None
    if wanted[0]:
        grad_weight = granularity.apply(grad_product, z)
        grad_weight = grad_weight if gain is None else grad_weight.mul_(gain)
    if wanted[1]:
        grad_logits = ctx.gate.slope(z, logits)  # a new tensor, turned into the gradient
        if z.shape == weight.shape:
            grad_logits.mul_(grad_product).mul_(weight)
        else:
            grad_logits.mul_(granularity.gather(grad_product * weight))
        grad_logits = grad_logits if gain is None else grad_logits.mul_(gain)
    if gain is not None and wanted[3]:
        grad_gain = torch.dot(grad_product.reshape(-1), product.reshape(-1)) / gain
    return grad_weight, grad_logits, grad_gain


def _differentiable(
    ctx, grad_product: Tensor | None, grad_z: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same out of place, for or in a second backward."""
    weight, logits, z, gain, _ = ctx.saved_tensors
    grad_weight = grad_gain = None
    if grad_product is not None:
        scaled = grad_product
        if gain is not None:
            scaled = grad_product * gain
            grad_gain = (grad_product * ctx.granularity.apply(weight, z)).sum()
        grad_weight = ctx.granularity.apply(scaled, z)
        through = ctx.granularity.gather(scaled * weight)
        grad_z = through if grad_z is None else grad_z + through
    return grad_weight, ctx.gate.slope(z, logits) * grad_z, grad_gain


def gated_weight(
    weight: Float[Tensor, "n k *taps"],
    logits: Float[Tensor, "..."],
    noise: Float[Tensor, "..."],
    gate: AbstractGate,
    granularity: Granularity,
    gain: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "n k *taps"]:
    """gain * weight * z with z ~ gate(logits), one gate per unit of `granularity`.

    `logits` and `noise` (uniform in [0, 1)) have the shape `granularity.units(weight.shape)`; `gain` is
    one number for the layer, 1 if None.  Only z is stored for the backward beside the result;
    differentiable twice in `weight`, `logits` and `gain`.
    """
    return _GatedWeight.apply(weight, logits, noise, gain, gate, granularity)[0]
