"""One thread at a time searches, trains or changes a model; a second one is refused before it begins.

Models that share a module, a parameter or a buffer count as one.  A thread may do within what it does already: a search
trains, and its `watch` evaluates.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from inspect import signature
from threading import Lock, get_ident
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from .batches import kind_of
from .interrupts import ending_with, signals_later
from .kinds import KindError, of_kinds
from .patterns import PATTERNS
from .process import torch_that_trains

P = ParamSpec("P")
R = TypeVar("R")


class _Claim(NamedTuple):
    thread: int
    what: str
    of: Any  # kept alive: another object must not come by its id


_claims: dict[int, _Claim] = {}
_lock = Lock()


@contextmanager
def claimed(model: nn.Module, what: str, *, shared: bool = False) -> Iterator[None]:
    """The model is this thread's inside.

    Args:
        what: is done to it, in an error's words.
        shared: only refuse, so that others may do the same at once.

    Errors: ValueError where another thread searches, trains or changes it, or what it shares with another model.
    """
    parts, own = _parts(model), dict[int, Any]()

    def give_back() -> None:
        with _lock:
            for key in own:
                _claims.pop(key, None)

    with ending_with(give_back):
        with _lock:
            for key in parts:
                other = _claims.get(key)
                if other is not None and other.thread != get_ident():
                    raise ValueError(
                        f"model: expected one that no other thread works with, got one that is under {other.what} "
                        f"there already, or shares a module or a parameter with such a one; {what} can begin when "
                        "that has ended, or on a copy.deepcopy made before"
                    )
            if not shared:
                own = {key: part for key, part in parts.items() if key not in _claims}
                _claims.update({k: _Claim(get_ident(), what, part) for k, part in own.items()})
        yield


_looking = ContextVar[dict[int, Any] | None]("looking", default=None)


@contextmanager
def only_looking(model: nn.Module) -> Iterator[None]:
    """Inside, this model and what is claimed are looked at alone; copies and other models are the user's."""
    token = _looking.set(_parts(model))
    try:
        yield
    finally:
        _looking.reset(token)


def _require_own(model: nn.Module, what: str, looked: Mapping[int, Any]) -> None:
    with _lock:
        if any(key in looked or key in _claims for key in _parts(model)):
            raise ValueError(
                f"{what}: expected a model of the watch's own, got one that the search is at work on; a watch looks at "
                "it, and changes a copy.deepcopy"
            )


def _parts(model: nn.Module) -> dict[int, Any]:
    """All that two models can have in common, by id; patterns are their layers'."""
    found: list[Any] = []
    for module in model.modules():
        if not isinstance(module, PATTERNS):
            tensors = [*module._parameters.values(), *module._buffers.values()]
            found += [t for t in tensors if t is not None]
            # An activation that two models share holds nothing; whether dropout draws is a mode of its own.
            if tensors or any(module.children()) or isinstance(module, _DropoutNd):
                found.append(module)
    return {id(part): part for part in found}


def sole(
    what: str, *, differentiates: bool = False, whole: bool = False, alters: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function of a `model` that has it for itself, takes arguments of the kinds it says, and leaves tensors that can
    train, under `torch.inference_mode` too.

    Args:
        what: it does, in an error's words.
        differentiates: whether it takes gradients, under `torch.no_grad` too.
        whole: whether a signal comes when it is done, since half of it would be no model; for what takes no time.
        alters: whether the model is another afterwards, which a search's `watch` may not make of it.

    Errors: KindError for what is no module, and as `kinds.checked`; ValueError as `claimed`, for parameters made in
    inference mode, and for what alters a model that is only to be looked at.
    """

    def of(function: Callable[P, R]) -> Callable[P, R]:
        place = list(signature(function).parameters).index("model")
        later = signals_later if whole else nullcontext

        @functools.wraps(function)
        def alone(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) <= place and "model" not in kwargs:
                return function(*args, **kwargs)  # which says what it lacks
            model: Any = args[place] if len(args) > place else kwargs["model"]
            require_trainable_tensors(require_module(model, what), what, values=differentiates)
            given, named = of_kinds(function, args, kwargs)
            if alters and (looked := _looking.get()) is not None:
                _require_own(model, what, looked)
            with claimed(model, what), torch_that_trains(differentiates), later():
                return function(*given, **named)

        return alone

    return of


def require_module(model: Any, what: str) -> nn.Module:
    """The model.  Errors: KindError for what is none."""
    if not isinstance(model, nn.Module) or isinstance(model, type):
        raise KindError(f"{what}: expected a model, an nn.Module, got {kind_of(model)}")
    return model


def require_trainable_tensors(model: nn.Module, what: str, *, values: bool) -> None:
    """Errors: ValueError for a parameter or buffer that PyTorch will never let train, or, if `values` are looked at,
    that has none.
    """
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(t):  # told where it matters
            continue
        if t.is_inference():
            raise ValueError(
                f"{what}: expected a model that can train, got {name} made under torch.inference_mode(), which never "
                "can; make, load and copy the model outside of it"
            )
        if values and t.is_meta:
            raise ValueError(
                f"{what}: expected a model with values, got {name} on the meta device; make it on another, or "
                "model.to_empty(device='cpu') and load weights"
            )
