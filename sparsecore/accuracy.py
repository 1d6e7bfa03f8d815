"""What accuracy is of: class scores and the labels that belong to them, where it is certain which they are."""

from typing import Any

import torch
from torch import Tensor

from .batches import Batch, kind_of, parts_of
from .loss_functions import is_classifier
from .losses import Loss
from .outputs import is_labels, own_loss


def hits(
    loss: Loss, output: Any, batch: Batch, asked: bool = False
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Where the highest score is the label's, where that counts, and where labels are none of the model's classes, bool
    [B, ...]; NaN is no highest score.  None where there are no classes for sure.

    asked, errors: as of `labelled`.
    """
    found = labelled(loss, output, batch, asked)
    if found is None:
        return None
    scores, labels = found
    right = (scores.argmax(1) == labels) & ~scores.isnan().any(1)
    counts, outside = labels != loss.ignored, (labels < 0) | (labels >= scores.shape[1])
    if callable(loss.fn) and not is_classifier(loss.fn):
        # A function of the user's leaves out what it likes, by what means it likes.
        return right, counts & ~outside, torch.zeros_like(outside)
    return right, counts, counts & outside


def labelled(
    loss: Loss, output: Any, batch: Batch, asked: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Class scores [B, C, ...] and their labels, int64 [B, ...]; None where there are no classes for sure.

    Args:
        asked: whether accuracy was asked for: then the highest output is the prediction, whatever the loss.

    Errors: ValueError where a loss by name does not fit; if it was asked for, where there are no classes.
    """
    target = parts_of(batch)[1]
    if asked and not is_labels(target):
        raise ValueError(
            f"metric accuracy: expected targets that are numbers of classes, integers, got {kind_of(target)}; give "
            "metric= as a function of (output, target)"
        )
    if not asked and (not loss.tells_classes or (callable(loss.fn) and not is_labels(target))):
        return None
    own = own_loss(output) is not None
    try:
        scores = loss.tensor_in(output)
        axis = loss.axis_of(scores, target, own)
    except ValueError:
        if not asked and (callable(loss.fn) or own):
            return None
        raise
    if not asked and (scores.shape[axis] < 2 or not is_labels(target)):
        return None
    if scores.shape[axis] < 2:
        raise ValueError(
            f"metric accuracy: expected at least 2 classes, got {kind_of(scores)}; give metric= as a function of "
            "(output, target)"
        )
    if own and loss.fn is None and not asked and axis % scores.ndim != 1:
        return None  # which token a label belongs to is the model's affair
    return loss.aligned(scores.movedim(axis, 1), target.long())
