"""What a model gives: where its class scores are, and the loss that it has computed by itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

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


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of an output, in whatever it holds them: tuples, dicts, dataclasses, ModelOutput."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (list, tuple, set)):
        parts = list(output)
    elif dataclasses.is_dataclass(output):
        parts = list(vars(output).values())
    else:
        return []
    return [tensor for part in parts for tensor in tensors_in(part)]


def is_labels(target: Any) -> TypeGuard[Tensor]:
    """Whether these are numbers of classes: a tensor of integers."""
    return isinstance(target, Tensor) and not (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    )


def class_axis(scores: Tensor, target: Any, named: bool) -> int:
    """The axis of the classes, as shapes tell it: 1, or the last.

    Args:
        target: labels; None where there are none.
        named: whether it is known that they are labels of classes, by a loss's name or the model's own loss.

    Errors: ValueError where shapes do not tell.
    """
    if target is None and scores.ndim > 1 and scores.ndim != 3:
        return 1
    if target is None and scores.ndim == 3:
        raise ValueError(
            f"loss: expected targets that tell which axis the classes are on, got none for scores "
            f"{list(scores.shape)}; say so: loss=sc.Loss(function, class_axis=1) or -1"
        )
    if is_labels(target) and scores.ndim > 1:
        first = scores.shape[:1] + scores.shape[2:] == target.shape
        last = scores.ndim > 2 and scores.shape[:-1] == target.shape
        if first and not (last and scores.ndim == 3):
            return 1
        if first:
            raise ValueError(
                f"loss: expected shapes that tell which axis the classes are on, got scores {list(scores.shape)} "
                f"for targets {list(target.shape)}; say so: loss=sc.Loss('cross-entropy', class_axis=1) or -1"
            )
        if last and named:
            return -1
        if last:
            raise ValueError(
                f"loss: expected integer targets [B, ...] for class scores [B, C, ...], got {kind_of(target)} for "
                f"{kind_of(scores)}; name what it is: loss='lm' where each token predicts the next, "
                "loss='cross-entropy' where targets are the classes of these very positions"
            )
    raise ValueError(
        f"loss: expected integer targets [B, ...] for class scores [B, C, ...], got {kind_of(target)} for "
        f"{kind_of(scores)}; name what it is: loss='cross-entropy', 'mse', 'bce', 'lm', or a function of "
        "(output, target)"
    )


def probability_axis(target: Tensor) -> int:
    """The axis along which targets are probabilities: 1, unless they add up to 1 along the last alone.  A host sync."""
    if target.ndim < 3:
        return 1
    sums = (target.float().sum(axis) for axis in (1, -1))
    first, last = (bool((s - 1).abs().max() < 1e-2) for s in sums)
    return -1 if last and not first else 1


def shifts_labels(output: Any, target: Any, own: Tensor) -> bool:
    """Whether a model's own loss has each token [B, T] predict the next.  A host sync where shapes allow it."""
    try:
        scores = scores_in(output).detach().float()
    except ValueError:
        return False
    if not is_labels(target) or target.ndim != 2 or scores.shape[:-1] != target.shape:
        return False
    labels = target.long()
    same = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
    following = F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    apart = [float((found - own.detach()).abs()) for found in (same, following)]
    return apart[1] < apart[0] and apart[1] < 1e-2 * max(1.0, float(following))
