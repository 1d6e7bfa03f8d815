"""How a model is called with a batch: the one place that decides what its arguments are."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map

from .batches import TARGETS, Several, kind_of, size_of, target_key, trainable

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
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        told = _explained(error, model, inputs, args, named) if of_the_users(error) else None
        if told is None:
            raise
        raise ValueError(told) from error


def forward_example(model: nn.Module, example: Sequence[Any]) -> Any:
    """What the model gives for its inputs one by one, or for one batch's dict of keywords (a target may be there).

    Errors: as `forward`.
    """
    example = tree_map(lambda t: trainable(t) if isinstance(t, Tensor) else t, tuple(example))
    return forward(model, example[0] if len(example) == 1 else Several(example))


def of_the_users(error: Exception) -> bool:
    """Whether an error may speak of what a user gave: not of the device, its memory, a compiler or a capture."""
    device = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    if isinstance(error, device) or "CUDA error" in str(error):
        return False
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _explained(
    error: Exception,
    model: nn.Module,
    inputs: Any,
    args: tuple[Any, ...],
    named: Mapping[str, Any],
) -> str | None:
    """What the user can do about an error of a forward, where that is certain."""
    given = (args, dict(named))
    said, name = str(error), type(model).__name__
    if isinstance(error, ValueError) and "more than 1 value per channel" in said:
        return (
            f"BatchNorm: expected more than one sample in every batch that it trains on, got a batch of "
            f"{size_of(inputs)}; leave such a last batch out (drop_last=True), or raise the batch size"
        )
    if isinstance(error, RuntimeError) and (told := _of_dtypes(said, model, given)):
        return told
    if not isinstance(error, (TypeError, AttributeError, RuntimeError, IndexError)):
        return None
    if isinstance(error, NotImplementedError):
        return None
    nested = len(args) == 1 and isinstance(args[0], (tuple, list)) and len(args[0]) > 1
    if nested and not isinstance(error, (RuntimeError, IndexError)):
        if isinstance(inputs, Several) and takes(model).most < len(args[0]):
            return (
                f"batches: expected (inputs, target), as {name}.forward takes one input, got {len(args[0]) + 1} "
                f"parts, the inputs {kind_of(tuple(inputs))}; put what the loss needs beside the target, (inputs, "
                "(target, weight)), or give loss= as a function of (model, batch)"
            )
        if takes(model).most >= len(args[0]):
            return (
                f"batches: expected inputs that {name}.forward takes, got {kind_of(inputs)} as one "
                f"argument ({error}); give flat batches (*inputs, target) or dicts to pass each by itself"
            )
    if isinstance(error, AttributeError) or not _at_the_inputs(said):
        return None
    return (
        f"batches: expected inputs that {name}.forward takes, got {kind_of(inputs)} "
        f"({type(error).__name__}: {first_line(error)}); look at what a batch holds, (inputs, target), and at shapes"
    )


def _at_the_inputs(said: str) -> bool:
    """Whether an error of PyTorch's speaks of arguments, sizes or indices."""
    words = "must be tensor|shape|size|channel|dimension|index out of range|missing|positional"
    of_layout = "stride|contiguous|memory format"  # what the model does with its own tensors
    said = said.lower()
    return any(w in said for w in words.split("|")) and not any(
        w in said for w in of_layout.split("|")
    )


def _of_dtypes(said: str, model: nn.Module, inputs: Any) -> str | None:
    """What is to be converted, where an error speaks of dtypes."""
    if "type" not in said and "not implemented for" not in said:
        return None
    given = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    if "indices" in said or "embedding" in said.lower():
        other = [t for t in given if t.dtype not in (torch.int64, torch.int32)]
        wanted = "int64, as an embedding takes its tokens"
    else:
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        if weight is None:
            return None
        other = [t for t in given if t.dtype != weight.dtype]
        floats = [t for t in other if t.is_floating_point() or t.is_complex()]
        if torch.is_autocast_enabled():  # which converts floats by itself
            floats = []
        # For an embedding integers may be tokens, and bool is a mask beside other inputs.
        tokens = any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in model.modules())
        masks = [t for t in other if t.dtype == torch.bool and len(given) > 1]
        numbers = [t for t in other if not any(t is mask for mask in masks)]
        other = floats or ([] if tokens else numbers)
        wanted = f"{str(weight.dtype).removeprefix('torch.')}, as the weights are"
    if not other:
        return None
    return f"batches: expected inputs of {wanted}, got {kind_of(other[0])}; convert them"


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a training step computes statistics over its batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def normalises_by_batch(model: nn.Module) -> bool:
    """Whether BatchNorm computes statistics over its batch in evaluation mode too."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return any(module.running_mean is None for module in norms)
