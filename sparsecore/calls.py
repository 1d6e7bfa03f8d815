"""How a model is called with a batch: the one place that decides what its arguments are."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from .batches import TARGETS, Several, kind_of, size_of, target_key

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_INFINITE = 1 << 30


class Takes(NamedTuple):
    """What a forward takes: at least and at most so many arguments by place, these names, any name."""

    least: int
    most: int
    names: frozenset[str]
    any_name: bool


def takes(model: nn.Module) -> Takes:
    """What the forward of a model takes, of the model inside where it is wrapped."""
    while isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod  # type: ignore[assignment]
    forward = model.forward
    return _takes(getattr(forward, "__func__", forward), inspect.ismethod(forward))


@lru_cache(maxsize=256)
def _takes(forward: Callable[..., Any], bound: bool) -> Takes:
    try:
        given = list(inspect.signature(forward).parameters.values())[int(bound) :]
    except (TypeError, ValueError):  # compiled code tells nothing
        return Takes(1, _INFINITE, frozenset(), True)
    by_place = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = any(p.kind is p.VAR_POSITIONAL for p in given)
    return Takes(
        sum(p.default is p.empty for p in by_place),
        _INFINITE if rest else len(by_place),
        frozenset(p.name for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)),
        any(p.kind is p.VAR_KEYWORD for p in given),
    )


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a model takes a batch's inputs as (`batches.parts_of`).

    A dict becomes keywords, without its target where the forward does not know that name.  A tuple is one argument,
    unless the forward needs several, or the batch was flat and the forward takes as many.

    Errors: ValueError for a dict whose keys the forward does not take.
    """
    if isinstance(inputs, Mapping):
        return _keywords(model, dict(inputs))
    if isinstance(inputs, (tuple, list)):
        given, flat = takes(model), isinstance(inputs, Several)
        if (flat or given.least > 1) and given.least <= len(inputs) <= given.most:
            return tuple(inputs), {}
        if flat:
            inputs = tuple(inputs)
    return (inputs,), {}


def _keywords(model: nn.Module, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given, key = takes(model), target_key(named)
    if key is not None and key not in given.names and not given.any_name:
        del named[key]
    foreign = [] if given.any_name else [name for name in named if name not in given.names]
    if (
        foreign == [*named] and len(foreign) == given.least == 1
    ):  # one input, under a name of the data's
        return (named[foreign[0]],), {}
    if foreign:
        raise ValueError(
            f"batches: expected a dict with the keywords of {type(model).__name__}.forward "
            f"({', '.join(sorted(given.names))}) and a target under one of {', '.join(TARGETS)}, got "
            f"{', '.join(foreign)} too; rename or drop them, or give loss= as a function of (model, batch)"
        )
    return (), named


def fits(model: nn.Module, inputs: Any) -> bool:
    """Whether the model can be called with the inputs alone, as far as its signature tells."""
    try:
        args, named = arguments(model, inputs)
    except ValueError:
        return False
    given = takes(model)
    return len(args) <= given.most and len(args) + len(named) >= given.least


def forward(model: nn.Module, inputs: Any, call: Callable[..., Any] | None = None) -> Any:
    """What the model gives for a batch's inputs.

    call: `call(model, *arguments)` in place of the model itself, as the engine compiles it.

    Errors: the model's; ValueError where it is known what is wrong with the inputs.
    """
    args, named = arguments(model, inputs)
    try:
        return model(*args, **named) if call is None else call(model, *args, **named)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        told = _explained(error, model, inputs, args)
        if told is None:
            raise
        raise ValueError(told) from error


def _explained(
    error: Exception, model: nn.Module, inputs: Any, args: tuple[Any, ...]
) -> str | None:
    """What the user can do about an error of a forward, where that is certain."""
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return (
            f"BatchNorm: expected more than one sample in every batch that it trains on, got a batch of "
            f"{size_of(inputs)}; leave such a last batch out (drop_last=True), or raise the batch size"
        )
    if (
        isinstance(error, RuntimeError)
        and "dtype" in str(error)
        and not torch.is_autocast_enabled()
    ):
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        other = [
            t for t in tree_leaves(inputs)
            if isinstance(t, Tensor) and weight is not None and t.dtype != weight.dtype
            and (t.is_floating_point() or t.dtype == torch.uint8)
        ]  # fmt: skip
        if other and weight is not None:
            wanted = str(weight.dtype).removeprefix("torch.")
            return f"batches: expected inputs of {wanted}, as the weights are, got {kind_of(other[0])}; convert them"
    if isinstance(error, (TypeError, AttributeError)) and len(args) == 1:
        given = takes(model)
        if isinstance(args[0], (tuple, list)) and 1 < len(args[0]) <= given.most:
            return (
                f"batches: expected inputs that {type(model).__name__}.forward takes, got {kind_of(inputs)} as one "
                f"argument ({error}); give flat batches (*inputs, target) or dicts to pass each by itself"
            )
    return None


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a training step computes statistics over its batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())
