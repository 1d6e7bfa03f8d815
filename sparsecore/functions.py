"""What a function of the user's takes from around it."""

import dis
from collections.abc import Callable
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


def is_of(value: type | Callable[..., Any], libraries: tuple[str, ...]) -> bool:
    """Whether a class or function is one of these packages'."""
    return str(getattr(value, "__module__", "")).partition(".")[0] in libraries


def _filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
