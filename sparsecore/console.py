"""What commands write: lines on the screen, warnings at the end, JSON files."""

import json
import re
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

# What users name, folders say, is no markup.
console = Console(markup=False, emoji=False)
_TOLD = (SparsityWarning, DataWarning, WeightsWarning)
_LINES = 3
_TRIGGERED = re.compile(
    r" \(Triggered internally at [^)]*\)\.?"
)  # PyTorch's, with a path of its own build


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")


def show(lines: list[str]) -> None:
    """Text as it is."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def warnings_at_the_end() -> Iterator[None]:
    """Warnings are one line each on stderr, once, after all progress; a short search is told by the command.

    Of those about tickets there are three at most: a comparison has many.  Other libraries' are told as Python's
    filters say.
    """
    told: dict[str, None] = {}
    of_tickets: dict[str, None] = {}
    with warnings.catch_warnings():
        for kind in _TOLD:
            warnings.simplefilter("always", kind)

        def keep(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            if not issubclass(category, ShortSearchWarning):
                kept = of_tickets if issubclass(category, SparsityWarning) else told
                kept[_TRIGGERED.sub("", " ".join(str(message).split()))] = None

        warnings.showwarning = keep
        try:
            yield
        finally:
            for line in [*told, *[*of_tickets][:_LINES]]:
                print(f"warning: {line}", file=sys.stderr)
            if len(of_tickets) > _LINES:
                print(
                    f"warning: and {len(of_tickets) - _LINES} more like these; sparsecore info tells of each ticket",
                    file=sys.stderr,
                )
