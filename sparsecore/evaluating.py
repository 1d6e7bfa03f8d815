"""How good a model is on data: its accuracy, or what else is asked for."""

import math
from typing import Any

from torch import nn

from .engine import Evaluation
from .loaders import batches_of
from .losses import Loss, LossLike, loss_of


def metric_of(metric: LossLike) -> Loss | None:
    """What users give as `metric=`; None for accuracy.  Errors: as `losses.loss_of`."""
    return None if metric is None or metric == "accuracy" else loss_of(metric)


def evaluate(
    model: nn.Module,
    batches: Any,
    metric: LossLike = None,
    loss: LossLike = None,
    *,
    steps_per_epoch: int | None = None,
) -> float:
    """Accuracy in percent, or another metric, in evaluation mode; every module's mode is put back.

    Args:
        batches: as `loaders.batches_of` takes them.
        metric: the mean over samples of what this is for a batch: a loss by name, a function of (output, target) or of
            (model, batch), or a `losses.Loss`; None: accuracy, per pixel or token where labels are.
        loss: that the model trained by, which knows where class scores are.

    Errors: ValueError where there are no classes and no metric; DataEnded for fewer batches than their length says.
    """
    found = batches_of(batches, None, steps_per_epoch)
    by, asked = loss_of(loss), metric_of(metric)
    measured = Evaluation(model, found, by=by, metric=asked).measure()
    if asked is not None:
        return measured.loss
    if math.isnan(measured.accuracy):
        raise ValueError(
            f"evaluate: expected classes for an accuracy, got none from the loss {by.name} and its targets; say "
            "metric=, a loss by name ('mse', 'bce') or a function of (output, target)"
        )
    return measured.accuracy
