"""What losses compute without a word although it means nothing: refused, in the first call or by shapes alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .batches import kind_of
from .loss_functions import LossError, plain, uncompiled

# Whose target would be broadcast against the output, and give a number that means nothing.
_ELEMENTWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_ELEMENTWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
_COMPARING = (*_ELEMENTWISE, F.poisson_nll_loss, F.gaussian_nll_loss, F.kl_div)
_ARITHMETIC = {"sub", "rsub", "mul", "rmul", "div", "truediv", "rtruediv"}
_RANGES = {  # of targets, beyond which a loss has no least value or leaves samples out
    F.binary_cross_entropy_with_logits: (0.0, 1.0),
    F.soft_margin_loss: (-1.0, 1.0),
    F.hinge_embedding_loss: (-1.0, 1.0),
}


def refuse_accidents(fn: Any, output: Any, target: Any) -> None:
    """What losses of PyTorch's compute without a word although it means nothing, by shapes alone."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return
    inner = plain(fn)
    if inner in _ELEMENTWISE or isinstance(inner, _ELEMENTWISE_MODULES):
        if output.shape != target.shape:
            raise _broadcast(output, target)
    if inner is F.cross_entropy or isinstance(inner, nn.CrossEntropyLoss):
        refuse_one_class(output)


def refuse_one_class(output: Tensor, axis: int = 1) -> None:
    """Errors: ValueError for a single class, or none."""
    if output.ndim > 1 and output.shape[axis] < 2:
        raise LossError(
            f"loss: expected at least 2 classes, got {kind_of(output)}, whose cross-entropy is 0 whatever the "
            "model does; name what it is: loss='mse', loss='bce', or a function of (output, target)"
        )


def _broadcast(output: Tensor, target: Tensor) -> ValueError:
    return LossError(
        f"loss: expected targets of the output's shape {list(output.shape)}, got {kind_of(target)}, which "
        "would be broadcast; reshape the targets, or squeeze the output in a function of (output, target)"
    )


def check_range(target: Tensor, low: float, high: float, name: str) -> None:
    """Errors: ValueError for targets beyond what a loss is made for.  A host sync."""
    if target.dtype == torch.bool or not target.numel():
        return
    between = low == -1.0  # only the ends are targets there
    slack = 1e-3  # of half precision
    outside = (target < low - slack) | (target > high + slack)
    wrong = (target != low) & (target != high) if between else outside
    if bool(wrong.any()):
        least, most = target.min().item(), target.max().item()
        expected = "targets of -1 and 1 alone" if between else "targets from 0 to 1"
        raise LossError(
            f"loss {name}: expected {expected}, got {least:g} to {most:g}, for which it is no loss; convert them: "
            + ("2 * target - 1 of 0 and 1" if between else "(target + 1) / 2 of -1 and 1")
        )


def watched(fn: Callable[..., Any], output: Any, target: Any) -> Any:
    """What a function of (output, target) gives, watched for accidents inside it: for the first call, not for each.

    Errors: ValueError for targets that are broadcast against the output, or are no targets of the loss in it.
    """
    if (
        uncompiled(fn) is not None
        or not isinstance(output, Tensor)
        or not isinstance(target, Tensor)
    ):
        return fn(output, target)
    with _Watching(output, target):
        return fn(output, target)


class _Watching(TorchFunctionMode):
    """Looks at what PyTorch's losses, and plain arithmetic of the output and the target themselves, are called with."""

    def __init__(self, output: Tensor, target: Tensor) -> None:
        super().__init__()
        self.both = output, target

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = [*args, *(kwargs[n] for n in ("input", "target") if n in kwargs)][:2]
        if len(first) == 2 and all(isinstance(t, Tensor) for t in first):
            a, b = first
            if func in _COMPARING or self._themselves(func, a, b):
                _refuse_outer(a, b)
            if func is F.cross_entropy:
                refuse_one_class(a)
            if func in _RANGES:
                check_range(b, *_RANGES[func], func.__name__)
        return func(*args, **kwargs)

    def _themselves(self, func: Any, a: Tensor, b: Tensor) -> bool:
        output, target = self.both
        arithmetic = getattr(func, "__name__", "").strip("_") in _ARITHMETIC
        return arithmetic and ((a is output and b is target) or (a is target and b is output))


def _refuse_outer(a: Tensor, b: Tensor) -> None:
    """Broadcasting that makes more of both: every output against every target."""
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        return
    if shape.numel() > max(a.numel(), b.numel()):
        raise _broadcast(a, b)
