"""How commands end: lines on the screen, warnings, JSON files, one line and an exit code for an error."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from PIL import Image

from .data import DataWarning
from .interrupts import Stop
from .printable import Screen, one_line, shell_word, tell
from .start_weights import WeightsWarning
from .streams import append, is_stream
from .telling import ShortSearchWarning, SparsityWarning
from .writing import put

console = Screen()
_TOLD = (SparsityWarning, DataWarning, WeightsWarning)
_LINES = 3
_TRIGGERED = re.compile(
    r" \(Triggered internally at [^)]*\)\.?"
)  # PyTorch's, with a path of its own build


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Told in a line of its own where it cannot be written: what the command found is on the screen by then."""
    if path is None:
        return
    text = json.dumps(result, indent=2) + "\n"
    try:
        if is_stream(path):
            append(path, text)
        else:
            put(path, text.encode())
    except ValueError as error:
        raise ValueError(f"--json {error}") from None


def show(lines: Iterable[str]) -> None:
    """Text as it is, each in a line of its own."""
    for line in lines:
        console.line(line)


def command(name: str, ticket: Path, *options: str) -> str:
    """A command on a ticket, to be copied into a shell."""
    file = f"./{ticket}" if str(ticket).startswith("-") else str(ticket)
    return " ".join(map(shell_word, ["sparsecore", name, file, *options]))


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
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by its own line

        def keep(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            if not issubclass(category, ShortSearchWarning):
                kept = of_tickets if issubclass(category, SparsityWarning) else told
                kept[_TRIGGERED.sub("", one_line(str(message)))] = None

        warnings.showwarning = keep
        try:
            yield
        finally:
            for line in [*told, *[*of_tickets][:_LINES]]:
                tell(f"warning: {line}")
            if len(of_tickets) > _LINES:
                tell(
                    f"warning: and {len(of_tickets) - _LINES} more like these; sparsecore info tells of each ticket"
                )


def _mend(error: RuntimeError | MemoryError) -> str | None:
    """What helps against an error of PyTorch's that lies in what was asked for; None: it is a bug."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "take a smaller batch, --search-batch, --image-size or model"
    if text.startswith("derivative for") and "not implemented" in text:
        return "the model cannot be differentiated twice, take another --method or --objective"
    return None


def _said(error: ValueError | OSError) -> str:
    """An error in words; a system's without its number, and with what it was about."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None or isinstance(error.filename, int):
            return error.strerror
        place = os.fsdecode(error.filename)
        return (
            f"{place}: expected a file or folder that can be used ({error.strerror}); name another"
        )
    return str(error) or type(error).__name__


def run(app: Callable[..., Any], argv: list[str] | None) -> int:
    """Runs a typer app.  Exit code 2 and one line for bad input or output that was lost, 130 and 143 after Ctrl-C and
    SIGTERM, with one line."""
    console.begin()
    code, message = _outcome(app, argv)
    console.end()
    if not message and not code and console.failure is not None:
        code, message = 2, f"standard output could not be written: {console.failure}"
    if message:
        tell(f"error: {message}" if code == 2 else message)
    return code


def _outcome(app: Callable[..., Any], argv: list[str] | None) -> tuple[int, str]:
    """The exit code, and what is wrong."""
    try:
        code = app(argv, standalone_mode=False)
        if code == 130:  # how some versions of typer answer to Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0, ""
    except (ValueError, OSError) as error:
        # A user's mistake or a full disk; anything else is a bug and keeps its traceback.
        message = _said(error)
    except Stop as stop:
        return stop.code, str(stop)
    except (KeyboardInterrupt, typer.Abort):
        return 130, "interrupted"
    except (RuntimeError, MemoryError) as error:
        if (mend := _mend(error)) is None:
            raise
        message = f"{str(error) or 'out of memory'}; {mend}"
    except Exception as error:
        # typer's usage errors share no public base class across its versions, only this method.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
    return (2 if message else 0), message
