"""How one layer's weight is sparse now.  A pattern turns the layer's parameter into the weight it computes with."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from . import kernels
from .gates import AbstractGate
from .granularity import Granularity, Weight


class _GatedWeight(torch.autograd.Function):
    """weight * sample(logits, noise).  Returns z too, so that a second backward can differentiate its slope.

    Weight-sized allocations with one gate per weight: z and the product forward, dlogits backward.
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        logits: Tensor,
        noise: Tensor,
        gate: AbstractGate,
        granularity: Granularity,
    ) -> tuple[Tensor, Tensor]:
        z = gate.sample(logits, noise, granularity.project)
        ctx.gate, ctx.granularity = gate, granularity
        ctx.save_for_backward(weight, logits, z)
        ctx.set_materialize_grads(False)
        return granularity.apply(weight, z), z

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        weight, logits, z = ctx.saved_tensors
        grad_product, grad_z = grads
        grad_weight = grad_logits = None
        if ctx.needs_input_grad[0] and grad_product is not None:
            grad_weight = ctx.granularity.apply(grad_product, z)
        if ctx.needs_input_grad[1]:
            grad_logits = ctx.gate.slope(z, logits)  # a new tensor, turned into the gradient
            if grad_z is not None:  # in a second backward only
                grad_dz = grad_z
                if grad_product is not None:
                    grad_dz = grad_dz + ctx.granularity.gather(grad_product * weight)
                grad_logits = grad_logits * grad_dz
            elif grad_product is None:
                grad_logits = None
            elif z.shape == weight.shape:
                grad_logits = grad_logits.mul_(grad_product).mul_(weight)
            else:
                grad_logits = grad_logits.mul_(ctx.granularity.gather(grad_product * weight))
        return grad_weight, grad_logits, None, None, None


def gated_weight(
    weight: Float[Tensor, "n k *taps"],
    logits: Float[Tensor, "..."],
    noise: Float[Tensor, "..."],
    gate: AbstractGate,
    granularity: Granularity,
) -> Float[Tensor, "n k *taps"]:
    """weight * z with z ~ gate(logits), one gate per unit of `granularity`.

    `logits` and `noise` (uniform in [0, 1)) have the shape `granularity.units(weight.shape)`.  Only z
    is stored for the backward; differentiable twice in `weight` and `logits`.
    """
    return _GatedWeight.apply(weight, logits, noise, gate, granularity)[0]


class _MaskedWeight(torch.autograd.Function):
    """where(mask, weight, 0) forward and backward: pruned entries see a gradient of exactly 0, even from inf."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _MaskedWeight.apply(grads[0], mask), None  # linear, so it is its own backward


class Dense(nn.Module):
    """The parameter itself."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Masked(nn.Module):
    """A decided mask; it travels in the state_dict as `<layer>.pattern.mask`."""

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "n k *taps"]) -> None:
        super().__init__()
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}; use `scores > 0`")
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return _MaskedWeight.apply(weight, self.mask)

    def extra_repr(self) -> str:
        return f"sparsity={1 - self.mask.float().mean().item():.4f}"

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        # A dense checkpoint has no mask: keep ours, so that dense weights load into a sparse model.
        if prefix + "mask" in missing:
            missing.remove(prefix + "mask")


class Gated(nn.Module):
    """A gate per unit with trainable logits; samples in training mode, uses the gate's mean in evaluation.

    The sample is a function of (seed, step, layer), so recomputing a forward (activation
    checkpointing) draws the same mask; `advance_(model)` moves on to the next draw.

    Args:
        shape: the weight's shape [n, k, *taps].
        density: initial expected share of kept units, 0 < density < 1.
        seed, layer: with the step, the address of this layer's noise; equal addresses draw equal noise.

    Errors: ValueError for a density out of range or beyond what an N:M pattern can hold.
    """

    seed: Int64[Tensor, "1"]
    step: Int64[Tensor, "1"]

    def __init__(
        self,
        shape: torch.Size,
        gate: AbstractGate,
        granularity: Granularity | None = None,
        *,
        density: float,
        seed: int = 0,
        layer: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.granularity = granularity or Weight()
        self.layer = layer
        self.open = False  # while True the layer computes with its dense weight
        units = self.granularity.units(shape)
        self.logits = nn.Parameter(torch.full(units, gate.init(density), device=device))
        self.register_buffer("seed", torch.tensor([seed], dtype=torch.int64, device=device))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        if self.open:
            return weight
        if not self.training:
            z = self.granularity.project(self.gate.mean(self.logits))
            return self.granularity.apply(weight, z)
        noise = torch.empty_like(self.logits, requires_grad=False)
        kernels.uniform_(noise, self.seed, self.step, self.layer)
        return gated_weight(weight, self.logits, noise, self.gate, self.granularity)

    def extra_repr(self) -> str:
        return f"{self.gate}, granularity={self.granularity}, layer={self.layer}"
