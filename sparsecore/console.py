"""What commands write: lines on the screen, warnings at the end, JSON files."""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from .data import DataWarning
from .start_weights import WeightsWarning
from .telling import ShortSearchWarning, SparsityWarning

console = Console()
_TOLD = (SparsityWarning, DataWarning, WeightsWarning)
_LINES = 3  # a comparison has many tickets


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def check_folder(path: Path | None) -> None:
    """Told before hours of work, not after."""
    if path is not None and path.is_dir():
        raise ValueError(f"{path}: expected the name of a file, got a folder")
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; create {path.absolute().parent}")


def show(lines: list[str]) -> None:
    """Text as it is: names of layers are no markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def warnings_at_the_end() -> Iterator[None]:
    """Warnings of our own are one line each on stderr, after all progress; a short search is told by the command."""
    told: dict[str, None] = {}
    with warnings.catch_warnings():
        for kind in _TOLD:
            warnings.simplefilter("always", kind)
        show = warnings.showwarning

        def keep(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, _TOLD):
                show(message, category, *place, **more)
            elif not issubclass(category, ShortSearchWarning):
                told[" ".join(str(message).split())] = None

        warnings.showwarning = keep
        try:
            yield
        finally:
            for line in [*told][:_LINES]:
                print(f"warning: {line}", file=sys.stderr)
            if len(told) > _LINES:
                print(
                    f"warning: and {len(told) - _LINES} more like these; sparsecore info tells of each ticket",
                    file=sys.stderr,
                )
