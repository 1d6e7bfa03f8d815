"""A loss that is a function of the user's: what it takes, whether it has classes, and what it means to say."""

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import kind_of
from .calls import first_line, of_the_users
from .interrupts import signals_later

_MODEL = ("model", "module")  # a first parameter that takes the model
_NETWORK = ("net", "network")  # the same, unless the second one takes targets
_BATCH = ("batch",)
_OUTPUT = {
    "output", "outputs", "out", "pred", "preds", "prediction", "predictions", "predicted", "logit", "logits", "score",
    "scores", "input", "inputs", "hat", "yhat", "recon", "o", "y", "z",
}  # fmt: skip
_TARGET = {
    "y", "t", "target", "targets", "tgt", "label", "labels", "true", "truth", "gt", "actual",
}  # fmt: skip
_CLASSIFIERS = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_CLASSIFYING = (F.cross_entropy, F.nll_loss, F.multi_margin_loss)


class LossError(ValueError):
    """What is refused here, in words that are the user's already."""


def plain(fn: Any) -> Any:
    """The function inside partials and what `torch.compile` made."""
    while True:
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif (inner := uncompiled(fn)) is not None:
            fn = inner
        else:
            return fn


def setting(fn: Any, name: str) -> Any:
    """A named setting of a loss: a partial's keyword, or the object's attribute; None where it has none."""
    while isinstance(fn, functools.partial):
        if name in fn.keywords:
            return fn.keywords[name]
        fn = fn.func
    inner = uncompiled(fn)
    return getattr(fn if inner is None else inner, name, None)


def uncompiled(fn: Any) -> Any:
    """What `torch.compile` was given; None for what it did not make."""
    if isinstance(fn, nn.Module):
        return dict(fn.named_children()).get("_orig_mod")
    return getattr(fn, "_torchdynamo_orig_callable", None)


def is_classifier(fn: Any) -> bool:
    """Whether the highest of the outputs that it takes is the class that they stand for, for sure."""
    fn = plain(fn)
    return isinstance(fn, _CLASSIFIERS) or any(fn is known for known in _CLASSIFYING)


def averages_labels(fn: Any) -> bool:
    """Whether it is a mean over the labels that it does not leave out."""
    inner = plain(fn)
    known = isinstance(inner, (nn.CrossEntropyLoss, nn.NLLLoss))
    return known or inner in (F.cross_entropy, F.nll_loss) or ignored_label(fn) is not None


def ignored_label(fn: Any) -> int | None:
    """The label that it leaves out, where it names one."""
    found = setting(fn, "ignore_index")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def takes_model(fn: Any) -> bool:
    """Whether it is a function of (model, batch), as its parameters are called, rather than of (output, target)."""
    given = _by_place(fn)
    if not given:
        return False
    first, second = given[0], given[1].name.lower() if len(given) > 1 else ""
    if _annotated(first, "Module", nn.Module):
        return True
    name = first.name.lower().strip("_")
    start, end = name.partition("_")[0], name.rpartition("_")[2]
    if _annotated(first, "Tensor", Tensor):
        return False
    if _OUTPUT & {start, end} and end not in (*_MODEL, *_NETWORK):
        return False
    if name in _NETWORK:
        return not _TARGET & set(second.split("_"))
    return name in _MODEL or second in _BATCH


def _by_place(fn: Any) -> list[inspect.Parameter]:
    try:
        given = inspect.signature(_called(fn)).parameters.values()
    except (TypeError, ValueError):  # built in
        return []
    return [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _called(fn: Any) -> Any:
    """What has the parameters: a module's forward."""
    inner = plain(fn) if not isinstance(fn, functools.partial) else fn
    return inner.forward if isinstance(inner, nn.Module) else inner


def _annotated(parameter: inspect.Parameter, name: str, kind: type) -> bool:
    found = parameter.annotation
    if isinstance(found, str):
        return found.rpartition(".")[2] == name
    return isinstance(found, type) and found is not parameter.empty and issubclass(found, kind)


def check_function(fn: Any, role: str, name: str) -> None:
    """Refuses what is no function of (output, target) or (model, batch), or no mean.

    Errors: ValueError for a class, other numbers of parameters, or `reduction` of "sum" or "none" in PyTorch's losses.
    """
    if isinstance(inner := plain(fn), type):
        raise ValueError(
            f"{role}: expected a loss, got the class {inner.__name__}; make one: {inner.__name__}()"
        )
    try:
        signature = inspect.signature(_called(fn))
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(None, None)
        except TypeError:
            raise ValueError(
                f"{role} {name}: expected a function of (output, target), or of (model, batch), got one of "
                f"{signature}; wrap it: lambda output, target: ..."
            ) from None
    reduction = setting(fn, "reduction")
    if reduction in ("sum", "none") and _reduces(inner):
        raise ValueError(
            f"{role} {name}: expected a mean over the batch, got reduction={reduction!r}; make it reduction='mean'"
        )


def _reduces(inner: Any) -> bool:
    """Whether `reduction` says what becomes of the values: a function of one's own may divide by itself."""
    called = type(inner).forward if isinstance(inner, nn.Module) else inner
    return str(getattr(called, "__module__", "")).startswith("torch.nn.")


@contextmanager
def explained(fn: Any, name: str, first: Any, second: Any) -> Iterator[None]:
    """Around a function of (output, target) or (model, batch): what it says no to, as one line.

    Errors: ValueError; one that the user's function raises stays as it is.
    """
    try:
        yield
    except (TypeError, AttributeError, RuntimeError, LookupError, ValueError) as error:
        theirs = isinstance(error, ValueError) and not _reduces(plain(fn))
        full = isinstance(error, torch.OutOfMemoryError)
        if theirs or full or isinstance(error, LossError) or not of_the_users(error):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(first, nn.Module):
            text = (
                f"expected a function of (model, batch), as its parameters are called, got {said}, for batches of "
                f"{kind_of(second)}; one of (output, target) calls its first parameter output"
            )
        elif "not callable" in said or isinstance(error, AttributeError):
            text = (
                f"expected a function of (output, target), got {said}, on {kind_of(first)}; one of (model, batch) "
                "has to call its first parameter model"
            )
        else:
            text = (
                f"expected targets that it can take, got {kind_of(second)} for the output {kind_of(first)} ({said})"
                f"{_mend(fn, first, second)}"
            )
        raise ValueError(f"{name}: {text}") from error


def _mend(fn: Any, output: Any, target: Any) -> str:
    """How to mend targets that a classifier of PyTorch's cannot take; empty where it is not known."""
    if not is_classifier(fn) or not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return ""
    if target.shape == output.shape and not target.is_floating_point():
        return "; give class numbers, target.argmax(1), or probabilities, target.float()"
    if target.is_floating_point() and target.ndim < output.ndim:
        return "; class numbers are integers: target.long()"
    if output.ndim > 2 and target.shape == output.shape[:-1]:
        return "; it takes classes on axis 1: loss='cross-entropy' takes them last too"
    if target.ndim == output.ndim and target.shape[-1] == 1:
        return "; class numbers have no axis of 1: target.squeeze(-1)"
    return ""


@contextmanager
def untouched(loss: Any) -> Iterator[None]:
    """A loss that is a module is given back as it was: its buffers and gradients, whatever is computed with it."""
    fn = plain(getattr(loss, "fn", loss))
    if not isinstance(fn, nn.Module):
        yield
        return
    buffers = {name: b.clone() for name, b in fn.named_buffers()}
    grads = [(p, p.grad) for p in fn.parameters()]
    try:
        yield
    finally:
        with signals_later():
            with torch.no_grad():
                for name, b in fn.named_buffers():
                    b.copy_(buffers[name])
            for p, grad in grads:
                p.grad = grad


def own_parameters(loss: Any, model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a loss that take gradients and are none of the model's, by name."""
    fn = plain(getattr(loss, "fn", loss))
    known = set(map(id, model.parameters()))
    named = fn.named_parameters() if isinstance(fn, nn.Module) else ()
    return {name: p for name, p in named if p.requires_grad and id(p) not in known}


def mean_of(value: Any, sources: Iterable[Any], name: str) -> Tensor:
    """What a loss gave as a tensor of one number, 0-dim; a metric of another library's may be a number.

    Args:
        sources: what gradients should come to, where they are asked for.

    Errors: ValueError for anything else, or a number that no gradient passes through.
    """
    array = isinstance(value, np.ndarray) and value.ndim == 0
    if (array or isinstance(value, (int, float, np.number))) and not torch.is_grad_enabled():
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or value.numel() != 1:
        mend = "; take its mean()" if isinstance(value, Tensor) else ""
        raise ValueError(
            f"{name}: expected a mean over the batch, a tensor of one number, got {kind_of(value)}{mend}"
        )
    # A leaf is made of nothing that gradients come to, also where it was told to want some.
    if torch.is_grad_enabled() and value.is_leaf:
        whole = value.requires_grad  # then a leaf among the sources may be it
        if any(
            isinstance(t, Tensor) and t.requires_grad and not (whole and t.is_leaf) for t in sources
        ):
            raise ValueError(
                f"{name}: expected a number that gradients pass through, got one without (of argmax, comparisons, "
                "detach, item or a tensor of its own); train by another loss, and give this one as metric="
            )
    return value if value.ndim == 0 else value.squeeze()
