"""What a function of the user's takes from around it."""

import dis
from collections.abc import (
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
    Set,
)
from types import CellType, CodeType, FunctionType
from typing import Any


def closed_over(function: FunctionType) -> list[Any]:
    """The values in its closure, those that are there by now."""
    return [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]


def names_in(code: CodeType) -> frozenset[str]:
    """Globals and attributes that code names, in functions within it too."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


def written_by(function: FunctionType) -> frozenset[str]:
    """Globals that it sets as it runs, as one that counts does (`global calls; calls += 1`)."""
    return _arguments(function, "STORE_GLOBAL")


def sets_attributes(function: FunctionType) -> frozenset[str]:
    """Attributes that it sets, of whatever object."""
    return _arguments(function, "STORE_ATTR")


def gathers(function: FunctionType) -> bool:
    """Whether it may change what containers and objects around it hold, as one does that counts or logs."""
    code = [*_instructions(function.__code__)]
    return any(i.opname in _CHANGE for i in code) or not _CHANGING.isdisjoint(
        names_in(function.__code__)
    )


_CHANGE = ("STORE_ATTR", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR")
_CHANGING = frozenset(
    name
    for changing, fixed in (
        (MutableMapping, Mapping),
        (MutableSequence, Sequence),
        (MutableSet, Set),
    )
    for name in vars(changing).keys() - vars(fixed).keys()
    if not name.startswith("_")
)


def _arguments(function: FunctionType, operation: str) -> frozenset[str]:
    return frozenset(i.argval for i in _instructions(function.__code__) if i.opname == operation)


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """Those of functions within it too."""
    yield from dis.get_instructions(code)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _instructions(inner)


def is_of(value: type | Callable[..., Any], libraries: tuple[str, ...]) -> bool:
    """Whether a class or function is one of these packages'."""
    return str(getattr(value, "__module__", "")).partition(".")[0] in libraries


def _filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
