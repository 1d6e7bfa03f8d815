"""Arguments and fields of the kinds that their annotations say, or one line: what Python would trip over far inside.

Kinds alone, not values: numpy's numbers, tensors of one number and containers of whatever class are as good as Python's
own, and a text is as good as a path.
"""

import dataclasses
import functools
import math
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from inspect import Parameter, get_annotations, signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from .batches import kind_of

F = TypeVar("F", bound=Callable[..., Any])

_MOST = 10_000  # items of a container that are looked at
_WORDS = {
    float: "a number",
    int: "a whole number",
    bool: "True or False",
    str: "a text",
    Path: "a path",
    type(None): "None",
    Callable: "a function",
    Mapping: "a mapping",
    dict: "a dict",
    Sequence: "a sequence",
    tuple: "a tuple",
    list: "a list",
    Collection: "a collection",
    Iterable: "something to iterate",
}


class KindError(TypeError, ValueError):
    """An argument of another kind than is asked for: a TypeError, and, as everything that is refused, a ValueError."""


def checked(function: F) -> F:
    """The function, which refuses arguments of other kinds than its annotations say.

    Errors: KindError; ValueError for a whole number that 64 bits do not hold.
    """

    @functools.wraps(function)
    def first(*args: Any, **kwargs: Any) -> Any:
        given, named = of_kinds(function, args, kwargs)
        return function(*given, **named)

    return cast(F, first)


def of_kinds(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, texts as paths where paths are asked for.  Errors: as `checked`."""
    try:
        parameters = _signature(function)
        bound = parameters.bind(*args, **kwargs)
    except TypeError:  # the call says it better
        return args, kwargs
    hints = _hints(function)
    name = "" if function.__name__.startswith("__") else f"{function.__name__} "
    for key, value in bound.arguments.items():
        kind = parameters.parameters[key].kind
        if key in hints and kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            bound.arguments[key] = _checked(f"{name}{key}", value, hints[key])
    return bound.args, bound.kwargs


def check_fields(value: Any) -> None:
    """Of a frozen dataclass, in its `__post_init__`.  Errors: as `checked`."""
    hints = _hints(type(value))
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        made = _checked(f"{type(value).__name__} {field.name}", given, hints.get(field.name, Any))
        if made is not given:
            object.__setattr__(value, field.name, made)


def _checked(name: str, value: Any, hint: Any) -> Any:
    is_path = Path in (hint, *get_args(hint)) and str not in get_args(hint)
    if is_path and isinstance(value, (str, PathLike)):
        return Path(value)
    if not _fits(value, hint):
        items = get_args(hint)
        if isinstance(value, Mapping) and issubclass(get_origin(hint) or object, Mapping):
            for key, item in value.items():  # the one that is wrong says more than all of them
                if _fits(key, items[0]):
                    _checked(f"{name}[{key!r}]", item, items[1])
        raise KindError(f"{name}: expected {_words(hint)}, got {_kind(value)}")
    value = bool(value) if hint is bool else _plain(value, hint)
    if type(value) is int and not -(2**63) <= value < 2**63 and _is_number(hint):
        raise ValueError(
            f"{name}: expected a number that 64 bits hold, got one of {value.bit_length()} bits"
        )
    if get_origin(hint) is tuple and isinstance(value, (np.ndarray, Tensor)):
        value = value.tolist()
    if get_origin(hint) is tuple and isinstance(value, list):  # a frozen value's fields are hashed
        return tuple(value)
    return value


def _plain(value: Any, hint: Any) -> Any:
    """Numbers of numpy and torch as Python's, which files can hold; 2.0 as 2 where whole ones are asked for."""
    kinds = (hint, *get_args(hint))
    numbers = (np.generic, np.ndarray, Tensor, Real)
    number: Any = value if isinstance(value, numbers) and Tensor not in kinds else None
    if number is not None and not isinstance(number, int):
        if float in kinds and not isinstance(number, float) and _is_a_number(number, float):
            return number.item() if hasattr(number, "item") else float(number)
        if int in kinds and float not in kinds and _is_a_number(number, int):
            return int(number)
    if isinstance(value, (list, tuple)) and any(isinstance(v, (np.generic, Tensor)) for v in value):
        inner = next((k for k in get_args(hint) if k in (int, float)), None)
        if inner is not None and not hasattr(value, "_fields"):
            return type(value)(_plain(v, inner) for v in value)
    return value


def _is_number(hint: Any) -> bool:
    return hint in (int, float) or any(kind in (int, float) for kind in get_args(hint))


@functools.cache
def _signature(function: Callable[..., Any]) -> Any:
    return signature(function)


@functools.cache
def _hints(of: Any) -> dict[str, Any]:
    """Annotations by name; what cannot be resolved here says nothing."""
    found: dict[str, Any] = {}
    for part in reversed(of.__mro__) if isinstance(of, type) else [of]:
        try:
            own = get_annotations(part)
        except NameError:  # of names for type checkers alone
            continue
        known = vars(sys.modules[part.__module__]) if hasattr(part, "__module__") else {}
        found |= {k: known.get(h, Any) if isinstance(h, str) else h for k, h in own.items()}
    found.pop("return", None)
    return found


def _fits(value: Any, hint: Any) -> bool:
    hint = getattr(hint, "array_type", hint)  # a tensor of some shape
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, kind) for kind in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint in (float, int, bool):
        return _is_a_number(value, hint)
    if hint is Path:
        return isinstance(value, (str, PathLike))
    if Callable in (origin, hint):
        return callable(value)
    if origin is Literal or not isinstance(origin or hint, type):
        return True
    return _holds(value, origin or hint, inner)


def _holds(value: Any, kind: type, inner: tuple[Any, ...]) -> bool:
    """Whether it is a container of that kind, with such items; or an object of that class."""
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    if kind is dict:
        kind = Mapping
    if kind is torch.Size:  # a tuple is one
        kind, inner = tuple, (int,)
    if kind in (tuple, list):
        kind = Sequence
    if issubclass(kind, (str, bytes)) or not issubclass(kind, Iterable) or kind is Tensor:
        return isinstance(value, kind) or _does(value, kind)
    if isinstance(value, (str, bytes)):
        return False
    if isinstance(value, (np.ndarray, Tensor)) and not issubclass(kind, Mapping):
        return value.ndim > 0 and (not inner or inner[0] in (Any, int, float, bool, Tensor))
    if not isinstance(value, kind):
        return False
    if not isinstance(value, Collection) or len(value) > _MOST:
        return True
    if isinstance(value, Mapping):
        keys, items = (*inner, Any, Any)[:2]
        return all(_fits(k, keys) and _fits(v, items) for k, v in value.items())
    items = inner[0] if inner else Any
    return all(_fits(item, items) for item in value)


def _does(value: Any, kind: type) -> bool:
    """Whether an object of the user's own stands in for one of this library's: all that is public is there."""
    if not kind.__module__.startswith(__package__ or "") or isinstance(value, type):
        return False
    public = [name for name in vars(kind) if not name.startswith("_")]
    return bool(public) and all(hasattr(value, name) for name in public)


def _is_a_number(value: Any, kind: type) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size != 1 or (isinstance(value, Tensor) and value.is_complex()):
            return False
        return kind is not int or not _is_float(value)
    if kind is bool and (value is None or isinstance(value, np.bool_)):
        return True
    if not isinstance(value, Real):
        return False
    if kind is bool:
        return value in (0, 1)
    return kind is not int or isinstance(value, Integral) or _is_whole(value)


def _is_float(value: Any) -> bool:
    return torch.as_tensor(value).is_floating_point()


def _is_whole(value: Any) -> bool:
    return abs(value) < 2**64 and value == math.floor(value)


def _kind(value: Any) -> str:
    """A value in an error's words: a number as it is, if it is short."""
    if isinstance(value, (bool, float, type(None))):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return kind_of(value)


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(kind) for kind in inner))
    kind = origin or hint
    found = _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
    if inner and isinstance(kind, type) and issubclass(kind, Iterable):
        items = [_words(k).removeprefix("a ") for k in inner if k not in (Any, Ellipsis)]
        return f"{found} of {', '.join(items)}" if items else found
    return found
