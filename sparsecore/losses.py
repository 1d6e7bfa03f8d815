"""What a model's output should be: the loss, and the classes in it.

Everything that trains, searches, scores or evaluates takes `loss=` and makes one value of it (`loss_of`), which alone
knows how a batch becomes a number, where an output has its class scores, and on which axis.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import TARGETS, Batch, kind_of, parts_of, size_of
from .calls import forward
from .outputs import auxiliary_in, is_labels, own_loss, scores_in

NAMES = ("cross-entropy", "mse", "bce", "lm")
_IGNORED = -100  # the target that cross-entropy leaves out
_MODEL = (
    "model",
    "net",
    "network",
    "module",
)  # what a first parameter that takes the model is called
_BATCH = ("batch",)
# Whose target would be broadcast against the output, and give a number that means nothing.
_ELEMENTWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_ELEMENTWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


@dataclass(frozen=True)
class Loss:
    """A mean over the batch, 0-dim.

    Args:
        fn: None: cross-entropy where shapes leave no doubt, integer targets [B, ...] of class scores [B, C, ...], or
            the loss that the model itself gives (an output's `.loss` or ["loss"]).  A name: "cross-entropy" (classes
            may also be last, and float targets be probabilities), "mse", "bce" (of logits, any number of labels),
            "lm" (scores [B, T, C] against the tokens [B, T] themselves, each predicting the next; shifted here).  Or
            a function: of (model, batch) where its first parameter is called model, net, network or module, is
            annotated with a module, or its second is called batch; of (output, target) otherwise.
        scores: of what the model gives, its class scores; by default the output itself, its `.logits`, ["logits"]
            or ["out"].
        class_axis: of class scores; by default 1, or the last where targets have that shape alone.
        label_smoothing: of cross-entropy.

    Targets of -100 are left out by cross-entropy, "lm" and accuracy.

    Errors: ValueError for another name, or smoothing of a loss that has none.
    """

    fn: str | Callable[..., Any] | None = None
    scores: Callable[[Any], Tensor] | None = None
    class_axis: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.fn, str) and self.fn not in NAMES:
            raise ValueError(
                f"loss: expected one of {', '.join(NAMES)}, or a function, got {self.fn!r}"
            )
        if self.fn is not None and not isinstance(self.fn, str) and not callable(self.fn):
            raise ValueError(
                f"loss: expected one of {', '.join(NAMES)}, or a function, got {kind_of(self.fn)}"
            )
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

    @property
    def facts(self) -> tuple[Any, ...]:
        """What tells it from other losses in a fingerprint; nothing for the default one."""
        if self.fn is None and self.class_axis is None:
            return ()
        return ("loss", self.name, self.class_axis)

    @property
    def is_cross_entropy(self) -> bool:
        return self.fn in (None, "cross-entropy", "lm")

    @property
    def has_classes(self) -> bool:
        """False where there are none for sure."""
        return self.fn not in ("mse", "bce")

    @cached_property
    def takes_model(self) -> bool:
        """Whether it is a function of (model, batch)."""
        return callable(self.fn) and _takes_model(self.fn)

    def smoothed(self, label_smoothing: float) -> "Loss":
        """The same with a recipe's label smoothing.  Errors: ValueError for a loss that has none."""
        return replace(self, label_smoothing=label_smoothing) if label_smoothing else self

    @property
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
        if self.takes_model:
            return self._mean(self.fn(model, batch))  # type: ignore[operator]
        return self.of(forward(model, parts_of(batch)[0], call), batch)

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
            return self._mean(own)
        if target is None:
            raise ValueError(
                f"loss: expected batches with a target, (inputs, targets) or a dict with one of {', '.join(TARGETS)}, "
                f"got {kind_of(batch)}; or give loss= as a function of (model, batch)"
            )
        if callable(self.fn):
            return self._mean(self._asked(output, target))
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
        scores = self._tensor(output)
        axis = self._axis(scores, target, own_loss(output) is not None)
        if scores.shape[axis] < 2:
            raise ValueError(
                f"class scores: expected at least 2 classes, got {kind_of(scores)}, whose cross-entropy is 0 whatever "
                "the model does; name what it is: loss='mse', loss='bce', or a function of (output, target)"
            )
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

    def hits(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Where the highest score is the label's, and where that counts, both bool [B, ...].

        None where there are no classes for sure.  Errors: ValueError where a loss by name does not fit.
        """
        target = parts_of(batch)[1]
        if not self.has_classes or (callable(self.fn) and not is_labels(target)):
            return None
        own = own_loss(output) is not None
        try:
            scores = self._tensor(output)
            axis = self._axis(scores, target, own)
        except ValueError:
            if callable(self.fn) or own:
                return None
            raise
        if scores.shape[axis] < 2 or not is_labels(target):
            return None
        if own and self.fn is None and axis % scores.ndim != 1:
            return None  # which token a label belongs to is the model's affair
        scores, labels = self.aligned(scores.movedim(axis, 1), target.long())
        return scores.argmax(1) == labels, labels != _IGNORED

    def counted(self, batch: Batch) -> Tensor | int:
        """How much of a batch its mean is over: labels that are not left out, or samples."""
        target = parts_of(batch)[1]
        if self.is_cross_entropy and is_labels(target):
            labels = target[:, 1:] if self.fn == "lm" and target.ndim == 2 else target
            return (labels.long() != _IGNORED).sum()
        return size_of(batch)

    def summed(self, output: Any, batch: Batch) -> Tensor:
        """The loss over all that `counted` counts, float64, 0-dim: what an evaluation adds up."""
        target = parts_of(batch)[1]
        if self.is_cross_entropy and is_labels(target) and own_loss(output) is None:
            return self._cross_entropy(output, target, "none").sum(dtype=torch.float64)
        return self.of(output, batch).double() * self.counted(batch)

    def weighed(self, mean: Tensor, part: Batch, whole: Batch) -> Tensor:
        """What the mean loss of a part adds to that of the whole batch."""
        some, all_of = self.counted(part), self.counted(whole)
        if isinstance(some, int) or isinstance(all_of, int):
            return mean * (some / all_of)
        share = (some.double() / all_of.double()).to(mean.dtype)
        # A part whose labels are all left out has a mean of nothing, NaN.
        return torch.where(some > 0, mean * share, torch.zeros_like(mean))

    # --- Parts --------------------------------------------------------------------------------------

    def _tensor(self, output: Any) -> Tensor:
        """The tensor of an output that scores lie in."""
        return scores_in(output) if self.scores is None else self.scores(output)

    def _axis(self, scores: Tensor, target: Any, own: bool = False) -> int:
        """Where the classes are; `own`: the model has a loss, which knows what they mean.

        Errors: ValueError where shapes do not tell.
        """
        if self.class_axis is not None:
            return self.class_axis
        if self.fn == "lm":
            return -1
        if target is None and scores.ndim > 1:
            return 1
        if isinstance(target, Tensor) and self.fn == "cross-entropy" and target.is_floating_point():
            if target.shape == scores.shape:  # probabilities of the classes
                return 1
        elif is_labels(target) and scores.ndim > 1:
            first = scores.shape[:1] + scores.shape[2:] == target.shape
            last = scores.ndim > 2 and scores.shape[:-1] == target.shape
            if first and not (last and scores.ndim == 3):
                return 1
            if first:
                raise ValueError(
                    f"loss: expected shapes that tell which axis the classes are on, got scores {list(scores.shape)} "
                    f"for targets {list(target.shape)}; say so: loss=sc.Loss('cross-entropy', class_axis=1) or -1"
                )
            if last and (own or self.fn is not None):
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

    def _cross_entropy(self, output: Any, target: Any, reduction: str = "mean") -> Tensor:
        if self.scores is None and (spare := auxiliary_in(output)):
            raise ValueError(
                f"loss: expected one output to train, got {type(output).__name__} with {spare} beside the logits; give "
                "loss= as a function of (output, target) that weighs them, or leave them out of the model"
            )
        scores, labels = self.aligned(self.class_scores(output, target), target)
        if is_labels(labels):
            labels = labels.long()
        try:
            return F.cross_entropy(
                scores, labels, label_smoothing=self.label_smoothing, reduction=reduction
            )
        except IndexError:  # the CPU's
            found = labels[labels != _IGNORED]
            raise ValueError(
                f"loss: expected labels from 0 to {scores.shape[1] - 1}, as the model has {scores.shape[1]} outputs, "
                f"got {int(found.min())} to {int(found.max())}; mend the labels or the model's last layer"
            ) from None

    def _elementwise(self, output: Any, target: Any) -> Tensor:
        """mse and bce: of as many numbers as there are targets; an axis of 1 at the end of either is none."""
        values = self._tensor(output)
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
        target = target.to(values.dtype)
        if self.fn == "mse":
            return F.mse_loss(values, target)
        return F.binary_cross_entropy_with_logits(values, target)

    def _asked(self, output: Any, target: Any) -> Any:
        """The user's function of (output, target)."""
        fn: Any = self.fn
        _refuse_accidents(fn, output, target)
        try:
            return fn(output, target)
        except (TypeError, AttributeError) as error:
            if "not callable" not in str(error) and not isinstance(error, AttributeError):
                raise
            raise ValueError(
                f"loss {self.name}: expected a function of (output, target), got {type(error).__name__} ({error}) on "
                f"{kind_of(output)}; one of (model, batch) has to call its first parameter model"
            ) from error
        except IndexError as error:
            raise ValueError(
                f"loss {self.name}: expected targets that it can take, got {kind_of(target)} ({error})"
            ) from error

    def _mean(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"loss {self.name}: expected a mean over the batch, a tensor of one number, got {kind_of(value)}; "
                "take its mean()"
            )
        return value if value.ndim == 0 else value.squeeze()


LossLike = Loss | str | Callable[..., Any] | None  # as users give it


def loss_of(loss: LossLike) -> Loss:
    """The value of what users give as `loss=`.  Errors: ValueError for what is none."""
    return loss if isinstance(loss, Loss) else Loss(loss)


def _takes_model(fn: Any) -> bool:
    try:
        given = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # built in
        return False
    if len(given) > 1 and given[1].name in _BATCH:
        return True
    kind = given[0].annotation if given else None
    if isinstance(kind, str):
        named = kind.rpartition(".")[2] == "Module"
    else:
        named = (
            isinstance(kind, type)
            and kind is not inspect.Parameter.empty
            and issubclass(kind, nn.Module)
        )
    return bool(given) and (given[0].name in _MODEL or named)


def _refuse_accidents(fn: Any, output: Any, target: Any) -> None:
    """What torch's own losses compute without a word although it means nothing."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return
    if fn in _ELEMENTWISE or isinstance(fn, _ELEMENTWISE_MODULES):
        if output.shape != target.shape:
            raise ValueError(
                f"loss: expected targets of the output's shape {list(output.shape)}, got {kind_of(target)}, which "
                "would be broadcast; reshape the targets, or squeeze the output in a function of (output, target)"
            )
    if (fn is F.cross_entropy or isinstance(fn, nn.CrossEntropyLoss)) and output.ndim > 1:
        if output.shape[1] == 1:
            raise ValueError(
                f"loss: expected at least 2 classes, got {kind_of(output)}, whose cross-entropy is 0 whatever the "
                "model does; name what it is: loss='mse', loss='bce', or a function of (output, target)"
            )
