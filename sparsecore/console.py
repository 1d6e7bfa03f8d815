"""How commands end: lines on the screen, warnings, JSON files, one line and an exit code for an error."""

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
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
    """Told in a line of its own where it cannot be written: what the command found is on the screen by then."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--json {path} could not be written: {error.strerror or error}") from None


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


def _mend(error: RuntimeError | MemoryError) -> str | None:
    """What helps against an error of PyTorch's that lies in what was asked for; None: it is a bug."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "take a smaller batch, --search-batch, --image-size or model"
    if text.startswith("derivative for") and "not implemented" in text:
        return "the model cannot be differentiated twice, take another --method or --objective"
    return None


def run(app: Callable[..., Any], argv: list[str] | None) -> int:
    """Runs a typer app.  Exit code 2 and one line for bad input, 130 when interrupted."""
    try:
        code = app(argv, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (ValueError, OSError) as error:
        # A user's mistake or a full disk; anything else is a bug and keeps its traceback.
        message = str(error) or type(error).__name__
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if (mend := _mend(error)) is None:
            raise
        message = f"{str(error) or 'out of memory'}; {mend}"
    except Exception as error:
        # typer's usage errors share no public base class across its versions, only this method.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    return 0
