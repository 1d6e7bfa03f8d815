"""A weight where its mask is, 0 elsewhere, forward and backward."""

import torch
from torch import Tensor

from .zeros import Keeper


class MaskedWeight(torch.autograd.Function):
    """where(mask, weight, 0) forward and backward: pruned entries see a gradient of exactly 0, even from inf."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, mask: Tensor, bits: Tensor | None, keeper: Keeper | None
    ) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.bits, ctx.keeper = bits, keeper
        return _where(weight, mask, bits)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (mask,) = ctx.saved_tensors  # linear, so it is its own backward
        if torch.is_grad_enabled():
            return MaskedWeight.apply(grad, mask, ctx.bits, None), None, None, None
        masked = _where(grad, mask, ctx.bits)
        if ctx.keeper is not None:
            ctx.keeper.note(masked)
        return masked, None, None, None


def _where(weight: Tensor, mask: Tensor, bits: Tensor | None) -> Tensor:
    if bits is None or bits.element_size() != weight.element_size():
        return torch.where(mask, weight, 0)
    return (weight.view(bits.dtype) & bits).view(weight.dtype)


class Bits:
    """A mask as integers of all or no bits, since on the CPU PyTorch vectorises `and` but not a choice.

    Only for the CPU outside of graphs; made again when the mask or the weight's dtype changes.
    """

    def __init__(self) -> None:
        self.bits: Tensor | None = None
        self.mask: Tensor | None = None  # held, so that no other can take its place in memory
        self.made_of: tuple[int, torch.dtype] | None = None

    def of(self, mask: Tensor, weight: Tensor) -> Tensor | None:
        if weight.device.type != "cpu" or torch.compiler.is_compiling() or mask.is_inference():
            return None
        now = (mask._version, weight.dtype)
        if mask is not self.mask or now != self.made_of:
            dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(weight.element_size())
            self.bits = None if dtype is None else mask.to(dtype).neg_()
            self.mask, self.made_of = mask, now
        return self.bits

    def __deepcopy__(self, memo: dict) -> "Bits":
        return Bits()

    def __reduce__(self) -> tuple:
        return Bits, ()
