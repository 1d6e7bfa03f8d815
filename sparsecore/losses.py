"""What a model's output should be: the loss, and the classes in it.

Everything that trains, searches, scores or evaluates takes `loss=` and makes one value of it (`loss_of`), which alone
knows how a batch becomes a number, where an output has its class scores, and on which axis.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from . import accidents, loss_functions
from .batches import TARGETS, Batch, kind_of, parts_of, size_of
from .calls import first_line, forward, of_the_users
from .kinds import check_fields
from .outputs import (
    auxiliary_in,
    class_axis,
    is_labels,
    own_loss,
    probability_axis,
    scores_in,
    shifts_labels,
)
from .told_apart import told_apart

NAMES = ("cross-entropy", "mse", "bce", "lm")
_IGNORED = -100  # the target that cross-entropy leaves out


@dataclass(frozen=True)
class Loss:
    """A mean over the batch, 0-dim.

    Args:
        fn: None: cross-entropy where shapes leave no doubt, integer targets [B, ...] of class scores [B, C, ...], or
            the loss that the model itself gives (an output's `.loss` or ["loss"]).  A name: "cross-entropy" (classes
            may also be last, and float targets be probabilities), "mse", "bce" (of logits, any number of labels),
            "lm" (scores [B, T, C] against the tokens [B, T] themselves, each predicting the next; shifted here).  Or
            a function that gives a mean: of (model, batch) where its first parameter is called model, module, net or
            network or is annotated with a module, or its second is called batch; of (output, target) otherwise, also
            where the first is called output, pred, logits or the like, or (net, y) takes a target.
        scores: of what the model gives, its class scores; by default the output itself, its `.logits`, ["logits"]
            or ["out"].
        class_axis: of class scores; by default 1, or the last where targets have that shape alone.  Given with a
            function, it says that the highest of its outputs is the prediction, which accuracy counts; else that
            is known of PyTorch's cross_entropy, nll_loss and multi_margin_loss alone.
        label_smoothing: of cross-entropy.
        role: what errors call it.

    Targets of -100 are left out by cross-entropy, "lm" and accuracy; of a function those of its `ignore_index`.

    Errors: ValueError for another name, smoothing of a loss that has none, a function of other parameters, a class in
    place of its object, and a `reduction` other than a mean.
    """

    fn: str | Callable[..., Any] | None = None
    scores: Callable[[Any], Tensor] | None = None
    class_axis: int | None = None
    label_smoothing: float = 0.0
    role: str = field(default="loss", repr=False, compare=False)

    def __post_init__(self) -> None:
        known = NAMES if self.role == "loss" else ("accuracy", *NAMES)
        if isinstance(self.fn, str) and self.fn not in NAMES:
            raise ValueError(
                f"{self.role}: expected one of {', '.join(known)}, or a function, got {self.fn!r}"
            )
        if self.fn is not None and not isinstance(self.fn, str) and not callable(self.fn):
            raise ValueError(
                f"{self.role}: expected one of {', '.join(known)}, or a function, got {kind_of(self.fn)}"
            )
        if self.scores is not None and not callable(self.scores):
            raise ValueError(
                f"{self.role}: expected scores= as a function of the model's output, got {kind_of(self.scores)}; "
                "scores=lambda output: output.logits, for one"
            )
        if callable(self.fn):
            loss_functions.check_function(self.fn, self.role, self.name)
        check_fields(self)
        if self.label_smoothing and not self.is_cross_entropy:
            raise ValueError(
                f"label_smoothing: expected a loss of cross-entropy to smooth, got {self.name}; set "
                "label_smoothing=0 in the recipe, or smooth in the loss itself"
            )

    @property
    def name(self) -> str:
        """As provenance tells it."""
        if self.fn is None:
            return "cross-entropy"
        if isinstance(self.fn, str):
            return self.fn
        return getattr(self.fn, "__qualname__", type(self.fn).__name__)

    @cached_property
    def facts(self) -> tuple[Any, ...]:
        """What tells it from other losses in a fingerprint; nothing for the default one.  As it was when it was first
        asked: a loss may count what it is called for.
        """
        own: tuple[Any, ...] = () if self.scores is None else (told_apart(self.scores),)
        own += (self.label_smoothing,) if self.label_smoothing else ()
        own += (told_apart(self.fn),) if callable(self.fn) else ()
        if self.fn is None and self.class_axis is None and not own:
            return ()
        return ("loss", self.name, self.class_axis, *own)

    @property
    def is_cross_entropy(self) -> bool:
        return self.fn in (None, "cross-entropy", "lm")

    @property
    def has_classes(self) -> bool:
        """False where there are none for sure."""
        return self.fn not in ("mse", "bce")

    @property
    def tells_classes(self) -> bool:
        """Whether the highest output is the class that it predicts, for sure."""
        if not callable(self.fn):
            return self.has_classes
        return self.class_axis is not None or loss_functions.is_classifier(self.fn)

    @cached_property
    def takes_model(self) -> bool:
        """Whether it is a function of (model, batch)."""
        return callable(self.fn) and loss_functions.takes_model(self.fn)

    @cached_property
    def ignored(self) -> int:
        """The label that is left out."""
        found = loss_functions.ignored_label(self.fn) if callable(self.fn) else None
        return _IGNORED if found is None else found

    def smoothed(self, label_smoothing: float) -> "Loss":
        """The same with a recipe's label smoothing.  Errors: ValueError for a loss that has none."""
        return replace(self, label_smoothing=label_smoothing) if label_smoothing else self

    @cached_property
    def unsmoothed(self) -> "Loss":
        """The same without label smoothing: what is measured."""
        return replace(self, label_smoothing=0.0) if self.label_smoothing else self

    def __call__(
        self, model: nn.Module, batch: Batch, call: Callable[..., Any] | None = None
    ) -> Tensor:
        """The mean loss of a model on a batch.

        call: as `calls.forward` takes it; a function of (model, batch) calls the model itself.

        Errors: ValueError for an output or targets that the loss does not fit.
        """
        if not self.takes_model:
            return self.of(forward(model, parts_of(batch)[0], call), batch)
        return self._mean(self._told(model, batch), model.parameters())

    def of(self, output: Any, batch: Batch) -> Tensor:
        """The mean loss of an output for the batch.  Errors: as a call; ValueError for one of (model, batch)."""
        if self.takes_model:
            raise ValueError(
                f"loss: expected one of (output, target) here, where the model is called once for several "
                f"things, got {self.name} of (model, batch)"
            )
        target = parts_of(batch)[1]
        if self.fn is None and (own := own_loss(output)) is not None:
            if self.label_smoothing:
                raise ValueError(
                    "label_smoothing: expected a loss of cross-entropy to smooth, got the model's own; set "
                    "label_smoothing=0 in the recipe, or name the loss: loss='cross-entropy'"
                )
            if self._first_time():  # which of the labels its mean is over
                self.__dict__["_shifts"] = shifts_labels(output, target, own)
            return self._mean(own, tree_leaves(output))
        if target is None:
            raise ValueError(
                f"loss: expected batches with a target, (inputs, targets) or a dict with one of {', '.join(TARGETS)}, "
                f"got {kind_of(batch)}; or give loss= as a function of (model, batch)"
            )
        if callable(self.fn):
            return self._mean(self._told(output, target), tree_leaves(output))
        if self.is_cross_entropy:
            return self._cross_entropy(output, target)
        return self._elementwise(output, target)

    def class_scores(self, output: Any, target: Any = None) -> Tensor:
        """Class scores [B, C, ...] out of what a model gave.

        target: tells by its shape where classes are last; None: they are where most are.

        Errors: ValueError where there are none, or it is in doubt which they are.
        """
        if not self.has_classes:
            raise ValueError(
                f"class scores: expected a loss with classes, got {self.name}; choose an objective of the loss "
                "alone, as objectives.task or objectives.loss_change"
            )
        try:
            scores = self.tensor_in(output)
            axis = self.axis_of(scores, target, own_loss(output) is not None)
        except ValueError as error:
            if not callable(self.fn) and own_loss(output) is None:
                raise
            raise ValueError(
                f"class scores: expected a tensor [B, C, ...] from the model and labels [B, ...], got "
                f"{kind_of(output)} and {kind_of(target)} under the loss {self.name}; choose an objective of the loss "
                "alone, as objectives.task or objectives.loss_change, or say where they are: sc.Loss(function, "
                "scores=..., class_axis=1)"
            ) from error
        accidents.refuse_one_class(scores, axis)
        return scores if axis % scores.ndim == 1 else scores.movedim(axis, 1)

    def aligned(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [B, C, ...] and the labels that belong to them: of "lm" the next tokens."""
        if self.fn != "lm":
            return scores, target
        if target.ndim != 2 or target.shape[1] < 2:
            raise ValueError(
                f"loss lm: expected tokens [B, T] with T of 2 or more, got {kind_of(target)}"
            )
        return scores[:, :, :-1], target[:, 1:]

    def classified(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Class scores [B, C, ...], and their labels, int64 [B, ...], or probabilities [B, C, ...].

        Errors: as `class_scores`.
        """
        scores, labels = self.aligned(self.class_scores(output, target), target)
        if is_labels(labels):
            return scores, labels.long()
        axis = self.axis_of(self.tensor_in(output), target, own_loss(output) is not None)
        return scores, labels.movedim(axis, 1) if labels.ndim == scores.ndim > 2 else labels

    def counted(self, batch: Batch) -> Tensor | int:
        """How much of a batch its mean is over: labels that are not left out, by class weights, or samples."""
        labels = self._labels(batch)
        if labels is None:
            return size_of(batch)
        counts = labels.long() != self.ignored
        weight = loss_functions.setting(self.fn, "weight") if callable(self.fn) else None
        if isinstance(weight, Tensor) and weight.ndim == 1:
            return weight[labels.long().where(counts, 0)].where(counts, 0).sum()
        return counts.sum()

    def places(self, batch: Batch) -> int:
        """What `counted` would be if nothing were left out, of the batch's shape alone."""
        labels = self._labels(batch)
        return size_of(batch) if labels is None else labels.numel()

    def _labels(self, batch: Batch) -> Tensor | None:
        """The labels that its mean is over; None: it is one over samples."""
        target = parts_of(batch)[1]
        function = callable(self.fn) and not self.takes_model
        averages = function and loss_functions.averages_labels(self.fn)
        if not (self.is_cross_entropy or averages) or not is_labels(target):
            return None
        shifted = self.fn == "lm" or self.__dict__.get("_shifts", False)
        return target[:, 1:] if shifted and target.ndim == 2 else target

    def summed(self, output: Any, batch: Batch) -> Tensor:
        """The loss over all that `counted` counts, float64, 0-dim: what an evaluation adds up."""
        target = parts_of(batch)[1]
        if self.is_cross_entropy and is_labels(target) and own_loss(output) is None:
            return self._cross_entropy(output, target, "none").sum(dtype=torch.float64)
        value, counted = self.of(output, batch).double(), self.counted(batch)
        # A batch whose labels are all left out has a mean of nothing, NaN.
        return (
            value * counted if isinstance(counted, int) else (value * counted).where(counted > 0, 0)
        )

    def weighed(self, mean: Tensor, part: Batch, whole: Batch) -> Tensor:
        """What the mean loss of a part adds to that of the whole batch."""
        some, all_of = self.counted(part), self.counted(whole)
        if isinstance(some, int) or isinstance(all_of, int):
            return mean * (some / all_of)
        share = (some.double() / all_of.double()).to(mean.dtype)
        # A part whose labels are all left out has a mean of nothing, NaN.
        return torch.where(some > 0, mean * share, torch.zeros_like(mean))

    # --- Parts --------------------------------------------------------------------------------------

    def tensor_in(self, output: Any) -> Tensor:
        """The tensor of an output that scores lie in."""
        return scores_in(output) if self.scores is None else self.scores(output)

    def axis_of(self, scores: Tensor, target: Any, own: bool = False) -> int:
        """Where the classes are; `own`: the model has a loss, which knows what they mean."""
        if self.class_axis is not None:
            if not -scores.ndim <= self.class_axis < scores.ndim:
                raise ValueError(
                    f"class_axis: expected an axis of the class scores {list(scores.shape)}, got {self.class_axis}"
                )
            return self.class_axis
        if self.fn == "lm":
            return -1
        if isinstance(target, Tensor) and self.fn == "cross-entropy" and target.is_floating_point():
            if target.shape == scores.shape:
                known = self.__dict__.setdefault(
                    "_axes", {}
                )  # by shape, since it takes a host sync
                if target.shape[1:] not in known:
                    known[target.shape[1:]] = probability_axis(target)
                return known[target.shape[1:]]
        return class_axis(scores, target, own or self.fn is not None)

    def _cross_entropy(self, output: Any, target: Any, reduction: str = "mean") -> Tensor:
        if self.scores is None and (spare := auxiliary_in(output)):
            raise ValueError(
                f"loss: expected one output to train, got {type(output).__name__} with {spare} beside the logits; give "
                "loss= as a function of (output, target) that weighs them, or leave them out of the model"
            )
        scores, labels = self.classified(output, target)
        try:
            return F.cross_entropy(
                scores, labels, label_smoothing=self.label_smoothing, reduction=reduction
            )
        except (RuntimeError, ValueError) as error:
            if not of_the_users(error):
                raise
            raise ValueError(
                f"loss: expected labels of the class scores, got {kind_of(labels)} for scores {list(scores.shape)}, "
                f"classes on axis 1 ({first_line(error)}); say where they are: class_axis="
            ) from error
        except IndexError:  # the CPU's
            found = labels[labels != _IGNORED]
            raise ValueError(
                f"loss: expected labels from 0 to {scores.shape[1] - 1}, as the model has {scores.shape[1]} outputs, "
                f"got {int(found.min())} to {int(found.max())}; mend the labels or the model's last layer"
            ) from None

    def _elementwise(self, output: Any, target: Any) -> Tensor:
        """mse and bce: of as many numbers as there are targets; an axis of 1 at the end of either is none."""
        values = self.tensor_in(output)
        if isinstance(target, Tensor) and values.shape != target.shape:
            if values.shape == (*target.shape, 1):
                values = values.squeeze(-1)
            elif target.shape == (*values.shape, 1):
                target = target.squeeze(-1)
        if not isinstance(target, Tensor) or values.shape != target.shape:
            raise ValueError(
                f"loss {self.name}: expected targets of the output's shape {list(values.shape)}, got {kind_of(target)}"
                "; reshape the targets, or give loss= as a function of (output, target)"
            )
        if self.fn == "bce" and self._first_time():
            accidents.check_range(target, 0.0, 1.0, self.name)
        target = target.to(values.dtype)
        if self.fn == "mse":
            return F.mse_loss(values, target)
        return F.binary_cross_entropy_with_logits(values, target)

    def _told(self, first: Any, second: Any) -> Any:
        """The user's function of (output, target), or of (model, batch)."""
        fn: Any = self.fn
        with loss_functions.explained(fn, f"{self.role} {self.name}", first, second):
            if self.takes_model:
                return fn(first, second)
            accidents.refuse_accidents(fn, first, second)
            if self._first_time():
                return accidents.watched(fn, first, second)
            return fn(first, second)

    def _mean(self, value: Any, sources: Iterable[Any]) -> Tensor:
        return loss_functions.mean_of(value, sources, f"{self.role} {self.name}")

    def _first_time(self) -> bool:
        """Whether nothing has been looked at: what takes a sync, or a call for each operation, is done once."""
        known = "_looked" in self.__dict__
        self.__dict__["_looked"] = True
        return not known


LossLike = Loss | str | Callable[..., Any] | None  # as users give it


def loss_of(loss: LossLike, role: str = "loss") -> Loss:
    """The value of what users give as `loss=` or `metric=`.  Errors: ValueError for what is none."""
    if isinstance(loss, Loss):
        return loss if loss.role == role else replace(loss, role=role)
    return Loss(loss, role=role)
