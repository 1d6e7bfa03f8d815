"""What a model gives: where its class scores are, and the loss that it has computed by itself."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .batches import kind_of


def scores_in(output: Any) -> Tensor:
    """The tensor itself, or an output's `.logits`, ["logits"] or ["out"].  Errors: ValueError for others."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = next((output[key] for key in ("logits", "out") if key in output), None)
    if isinstance(found, Tensor):
        return found
    raise ValueError(
        f"loss: expected a tensor, or an output with logits, got {kind_of(output)} from the model; give loss= as a "
        "function of (output, target), or sc.Loss(function, scores=lambda output: output[0]) where class scores "
        "are needed"
    )


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model has computed by itself; None where it has not."""
    if isinstance(output, Tensor):
        return None
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None


def auxiliary_in(output: Any) -> str:
    """Names of further outputs that are meant to be trained too (torchvision's)."""
    if isinstance(output, Mapping):
        fields = dict(output)
    else:
        fields = output._asdict() if hasattr(output, "_asdict") else {}
    found = [k for k, v in fields.items() if str(k).startswith("aux") and isinstance(v, Tensor)]
    return " and ".join(found)


def is_labels(target: Any) -> TypeGuard[Tensor]:
    """Whether these are numbers of classes: a tensor of integers."""
    return isinstance(target, Tensor) and not (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    )
