"""What a function of the user's takes from around it."""

from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any


def closed_over(function: FunctionType) -> list[Any]:
    """The values in its closure, those that are there by now."""
    return [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]


def names_in(code: CodeType) -> frozenset[str]:
    """Globals and attributes that code names, in functions within it too."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    return frozenset(code.co_names).union(*inner)


def is_of(value: type | Callable[..., Any], libraries: tuple[str, ...]) -> bool:
    """Whether a class or function is one of these packages'."""
    return str(getattr(value, "__module__", "")).partition(".")[0] in libraries


def _filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
