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

_STORE = dis.opmap["STORE_GLOBAL"]


def closed_over(function: FunctionType) -> list[Any]:
    """The values in its closure, those that are there by now."""
    return [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]


def names_in(code: CodeType) -> frozenset[str]:
    """Globals and attributes that code names, in functions within it too."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


def written_by(function: FunctionType) -> frozenset[str]:
    """Globals that it sets as it runs, as one that counts does (`global calls; calls += 1`)."""
    if _STORE not in function.__code__.co_code[::2]:
        return frozenset()
    code = dis.get_instructions(function)
    return frozenset(i.argval for i in code if i.opcode == _STORE)


def sets_attributes(function: FunctionType) -> frozenset[str]:
    """Attributes that it sets, of whatever object."""
    code = _instructions(function.__code__)
    return frozenset(i.argval for i in code if i.opname == "STORE_ATTR")


def gathers(function: FunctionType) -> bool:
    """Whether it may change what containers and objects around it hold, as one does that counts or logs."""
    code = [*_instructions(function.__code__)]
    return any(i.opname in _CHANGE for i in code) or any(i.argval in _CHANGING for i in code)


_CHANGE = ("STORE_ATTR", "STORE_SUBSCR", "DELETE_ATTR", "DELETE_SUBSCR")
_CHANGING = {*vars(MutableMapping), *vars(MutableSequence), *vars(MutableSet)} - {
    *vars(Mapping),
    *vars(Sequence),
    *vars(Set),
}
_CHANGING = frozenset(name for name in _CHANGING if not name.startswith("_"))


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
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
