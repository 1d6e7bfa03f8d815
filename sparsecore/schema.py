"""What a file has to say: facts by their types, tensors by what they belong to; looked at before anything uses them.

A digest tells of damage, not of intent: whoever can write a file can write its digest.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor
from typing_extensions import NotRequired, get_type_hints, is_typeddict

from .writing import FileError

_WHOLE = 2**63  # whole numbers are an int64's
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Range:
    """A bound on a number: `Annotated[float, Range(0, 1)]`."""

    least: float = -math.inf
    most: float = math.inf

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most


@dataclass(frozen=True)
class Most:
    """A bound on how many items a list has, looked at before any of them: `Annotated[list[int], Most(64)]`."""

    items: int


Count = Annotated[int, Range(0)]
Shape = Annotated[list[Count], Most(64)]  # as many sides as a tensor has
Seconds = Annotated[float, Range(0, 1e12)]
Fraction = Annotated[float, Range(0, 1)]
Percent = Annotated[float, Range(0, 100)]
Facts = dict[str, Any]
ANY = object()
Number = Annotated[float, ANY]  # what a metric of a user's own may say: nan too


def facts(value: Any, hint: Any, what: str) -> Any:
    """The JSON value as its type: lists become tuples where those are asked for.

    Args:
        hint: int, float (finite), str, bool, None, Any, Literal, Annotated with a `Range` or a `Most`, unions, list,
            dict, tuple, or a TypedDict, whose keys have to be there; further ones are left out.
        what: begins the message.

    Errors: FileError.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is NotRequired:
        return facts(value, args[0], what)
    if is_typeddict(hint):
        return _fields(value, hint, what)
    if origin is Annotated:
        return _bounded(value, args[0], args[1:], what)
    if origin in (Union, UnionType):
        return _one_of(value, args, what)
    if origin is Literal:
        good = any(value == arg and type(value) is type(arg) for arg in args)
    elif origin is list and isinstance(value, list):
        return _items(value, args[:1] * len(value), what)
    elif origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise _other(value, hint, what)
        return tuple(_items(value, kinds, what))
    elif origin is dict and isinstance(value, dict):
        return {str(k): facts(v, args[1], f"{what} {k!s:.40}") for k, v in value.items()}
    else:
        good = _is(value, hint)
    if not good:
        raise _other(value, hint, what)
    return value


def _is(value: Any, hint: Any) -> bool:
    """Whether it is a value of a plain kind."""
    if hint is float and type(value) in (int, float):
        return -_WHOLE <= value < _WHOLE if isinstance(value, int) else math.isfinite(value)
    if hint is int:
        return type(value) is int and -_WHOLE <= value < _WHOLE
    return type(value) is (NoneType if hint is None else hint)


def _items(values: list[Any], hints: tuple[Any, ...], what: str) -> list[Any]:
    if hints and hints[0] in (int, float) and {*hints} == {hints[0]}:  # there may be millions
        if all(_is(value, hints[0]) for value in values):
            return [*values]
    pairs = zip(values, hints, strict=True)
    return [facts(value, hint, f"{what} {i}") for i, (value, hint) in enumerate(pairs)]


def _bounded(value: Any, hint: Any, bounds: tuple[Any, ...], what: str) -> Any:
    for bound in bounds:
        if bound is ANY and type(value) is float:
            return value
        if isinstance(bound, Most) and isinstance(value, list) and len(value) > bound.items:
            raise FileError(f"{what}: expected at most {bound.items:,} items, got {len(value):,}")
    value = facts(value, hint, what)
    for bound in bounds:
        if isinstance(bound, Range) and not bound.holds(value):
            raise FileError(f"{what}: expected {bound.least:g} to {bound.most:g}, got {value}")
    return value


def _one_of(value: Any, kinds: tuple[Any, ...], what: str) -> Any:
    refused = []
    for kind in kinds:
        try:
            return facts(value, kind, what)
        except FileError as error:
            refused.append(error)
    raise refused[0]


def _fields(value: Any, hint: Any, what: str) -> Facts:
    if not isinstance(value, dict):
        raise _other(value, dict, what)
    hints = _hints_of(hint)
    if missing := sorted(hint.__required_keys__ - value.keys()):
        raise FileError(f"{what}: expected {missing[0]}, got {', '.join(map(str, value))[:80]}")
    return {k: facts(v, hints[k], f"{what} {k}") for k, v in value.items() if k in hints}


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _other(value: Any, hint: Any, what: str) -> FileError:
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    # A number of any length, a value of any depth: told by its kind where it is more than a few letters.
    got = repr(value) if type(value) in (bool, float, NoneType) else f"{type(value).__name__}"
    if isinstance(value, str):
        got = repr(value[:40])
    if type(value) is int:
        got = str(value) if value.bit_length() <= 64 else f"one of {value.bit_length()} bits"
        name += " of 64 bits" if hint in (int, float) else ""
    return FileError(f"{what}: expected {name}, got {got}")


def tensors(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str, sizes: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of exactly these names, each as `tensor` takes it.

    Args: sizes: how names begin whose values cannot be negative, counts of steps and means of squares.

    Errors: FileError.
    """
    if wrong := sorted(found.keys() ^ own.keys()):
        raise FileError(
            f"{what}: expected the {len(own)} tensors of this run, got {len(found)} "
            f"(different: {', '.join(wrong[:4])})"
        )
    taken = {name: tensor(found[name], value, f"{what} {name}") for name, value in own.items()}
    for name, value in taken.items():
        if name.startswith(sizes) or name.endswith((".running_var", ".num_batches_tracked")):
            at_least_0(value, f"{what} {name}")
    return taken


def tensor(found: Tensor, own: Tensor, what: str) -> Tensor:
    """A tensor that is put in the place of `own`: of its dtype and shape, and as finite as it is.

    Errors: FileError.
    """
    if (found.dtype, found.shape) != (own.dtype, own.shape):
        raise FileError(
            f"{what}: expected {_kind(own)} {tuple(own.shape)}, got {_kind(found)} {tuple(found.shape)}"
        )
    if own.is_floating_point() and not all_finite(found) and (own.is_meta or all_finite(own)):
        raise FileError(f"{what}: expected finite numbers, got others among them")
    return found


def at_least_0(value: Tensor, what: str) -> None:
    """Errors: FileError for a negative number."""
    if bool((value < 0).any()):
        raise FileError(f"{what}: expected numbers from 0 on, got negative ones")


def castable(found: Tensor, own: Tensor, what: str) -> Tensor:
    """A tensor as `tensor` takes it, but for the width of floating point.  Errors: FileError."""
    if found.dtype in FLOATS and own.dtype in FLOATS:
        found = found.to(own.dtype)
    return tensor(found, own, what)


def all_finite(value: Tensor) -> bool:
    """Whether all numbers are finite."""
    return not value.is_floating_point() or bool(value.isfinite().all())


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
