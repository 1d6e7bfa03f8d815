"""Fields of frozen values, from the KEY=VALUE texts of a command line."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .control import CONTROLS, AbstractController
from .gates import GATES, AbstractGate
from .objectives import OBJECTIVES, Objective
from .schema import facts
from .writing import FileError

T = TypeVar("T")
_WHOLE = 2**63  # an int64's, which counts and seeds become
# What float32 holds, in which networks compute: a larger number is infinite there, a smaller one 0.
LARGEST, SMALLEST = 3.4e38, 1.2e-38


def choose(what: str, name: str, valid: Any) -> str:
    """`name` if it is one of `valid`, else a ValueError that lists them."""
    if name not in valid:
        raise ValueError(f"{what}: expected one of {', '.join(valid)}, got {name!r}")
    return name


def pairs(texts: list[str] | None, what: str) -> dict[str, Any]:
    """KEY=VALUE texts; a value is JSON where it parses, else a string.

    Errors: ValueError for a text without a key or a value, a key that is given twice, and a number that is not finite.
    """
    options: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"{what}: expected KEY=VALUE, got {text!r}")
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):  # also digits beyond Python's limit
            found = value
        if not _finite(found):
            raise ValueError(
                f"{what} {key}: expected a finite number (a whole one of 64 bits), got {value}"
            )
        if key in options:
            raise ValueError(
                f"{what} {key}: expected one value, got {options[key]!r} and {found!r}; give one"
            )
        options[key] = found
    return options


def _finite(value: Any) -> bool:
    """Whether all numbers within a JSON value are finite, and whole ones of 64 bits."""
    if isinstance(value, list | dict):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -_WHOLE <= value < _WHOLE


def held_as_float32(number: float) -> bool:
    """Whether float32 holds a number as it is, to rounding: 0, or one that neither overflows nor vanishes."""
    return number == 0 or SMALLEST <= abs(number) <= LARGEST


def objective_of(text: str) -> Objective:
    """An objective by name."""
    return OBJECTIVES[choose("objective", text, OBJECTIVES)]


def control_of(text: str) -> AbstractController:
    """A controller by name, or NAME=NUMBER for the field that it is named for, such as fixed=0.5."""
    return _named("control", text, CONTROLS)


def gate_of(text: str) -> AbstractGate:
    """A gate by name, or NAME=NUMBER for its first field, such as gaussian=0.25."""
    return _named("gate", text, GATES)


_MAKERS = {Objective: objective_of, AbstractController: control_of, AbstractGate: gate_of}


def replaced(value: T, options: Mapping[str, Any], what: str) -> T:
    """The frozen dataclass `value` with fields from `pairs`.

    Errors: ValueError for an unknown field, a value of another type or out of range, and a number that float32 does
    not hold.
    """
    hints = {key: hint for key, hint in get_type_hints(type(value)).items() if _settable(hint)}
    made = {}
    for key, text in options.items():
        hint = hints[choose(f"{what} field", key, sorted(hints))]
        make = _maker(hint)
        if make is not None and text is not None:
            made[key] = make(str(text))
        elif _fits(text, hint):
            made[key] = tuple(text) if isinstance(text, list) else text
        else:
            name = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{what} {key}: expected {name}, got {text!r}")
    changed = dataclasses.replace(value, **made)  # type: ignore[type-var]
    for key, number in made.items():
        if isinstance(number, float) and not held_as_float32(number):
            raise ValueError(f"{what} {key}: expected a number that float32 holds, got {number}")
    return changed


def _named(what: str, text: str, table: Mapping[str, Any]) -> Any:
    name, equals, number = text.partition("=")
    make = table[choose(what, name, table)]
    if not equals:
        return make()
    try:
        if not held_as_float32(value := float(number)):
            raise ValueError("not a finite one that float32 holds")
        return make(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} {name}: expected a number it takes, got {number!r} ({error})"
        ) from None


def _maker(hint: Any) -> Callable[[str], Any] | None:
    """What makes such a field from a text, None being one of its values or not."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return next((_MAKERS[kind] for kind in kinds if kind in _MAKERS), None)


def _settable(hint: Any) -> bool:
    if _maker(hint) is not None or hint in (int, float, bool, str, type(None)):
        return True
    if get_origin(hint) is tuple:
        return all(_settable(kind) for kind in get_args(hint) if kind is not Ellipsis)
    return bool(get_args(hint)) and any(kind in (int, float, bool, str) for kind in get_args(hint))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    try:
        facts(value, hint, "")
    except FileError:
        return False
    return True
