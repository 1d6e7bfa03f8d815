"""How good a model is on data: its accuracy, or what else is asked for."""

import math
from typing import Any, Literal

from torch import nn

from .calls import normalises_by_batch
from .claims import claimed, require_module
from .engine import Evaluation
from .kinds import checked
from .loaders import batches_of
from .losses import Loss, LossLike, loss_of


def metric_of(metric: LossLike, by: Loss) -> Loss | Literal["accuracy"] | None:
    """What users give as `metric=`; None: accuracy where the loss tells classes for sure.

    Errors: as `losses.loss_of`; ValueError for an accuracy of a loss without classes.
    """
    if metric is None:
        return None
    if not isinstance(metric, str) or metric != "accuracy":
        return loss_of(metric, "metric")
    if not by.has_classes:
        raise ValueError(
            f"metric accuracy: expected a loss with classes, got {by.name}; give metric= as a function of "
            "(output, target)"
        )
    return "accuracy"


@checked
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
        batches: as `loaders.batches_of` takes them.  Where BatchNorm takes the statistics of its batch even so (in a
            search's `watch`), a last batch of one sample is left out.
        metric: the mean over samples of what this is for a batch: a loss by name, a function of (output, target) or of
            (model, batch), or a `losses.Loss`.  A function may give a Python number, a mean over the batch too.
            "accuracy": of the highest output along the class axis, per pixel or token where labels are.  None: that,
            where the loss tells for sure that outputs are class scores.
        loss: that the model trained by, which knows where class scores are and which label is left out.

    Errors: ValueError where there are no classes for sure and no metric, labels beyond them, or a model that another
    thread works with; DataEnded for fewer batches than their length says; TypeError for what is no model.
    """
    require_module(model, "evaluate")
    # Nothing is changed for a while where all is in evaluation mode already.
    changes = any(module.training for module in model.modules())
    with claimed(model, "evaluation", shared=not changes):
        return _evaluated(model, batches, metric, loss, steps_per_epoch)


def _evaluated(
    model: nn.Module,
    batches: Any,
    metric: LossLike,
    loss: LossLike,
    steps_per_epoch: int | None,
) -> float:
    # One sample has no statistics of its own.
    found = batches_of(batches, model if normalises_by_batch(model) else None, steps_per_epoch)
    by = loss_of(loss)
    asked = metric_of(metric, by)
    measured = Evaluation(model, found, by=by, metric=asked).measure()
    if isinstance(asked, Loss):
        return measured.loss
    if math.isnan(measured.accuracy):
        raise ValueError(
            f"evaluate: expected classes for an accuracy, got none for sure from the loss {by.name} and its "
            "targets; say metric='accuracy' or loss=sc.Loss(function, class_axis=1) if the highest output is the "
            "prediction, or metric=, a loss by name ('mse', 'bce') or a function of (output, target)"
        )
    return measured.accuracy
