"""Text of files and users on a screen: what a terminal would obey is shown instead, here and nowhere else.

A layer's name, a path or a library's message may hold anything: escape sequences that clear the screen or set its
title, carriage returns that write over a line, marks that turn the direction of what follows, bytes that are no text.
All that a command prints goes through `Screen`.
"""

import contextlib
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

MOST = 4_000  # characters of one line: a name may have as many as a file has room for
# Control characters, what has no width or turns the direction (Cf), lines of its own (Zl, Zp), surrogates, and code
# points that are none or somebody's own.
_OBEYED = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # words of some scripts, and emoji, are written with them
_PLAIN = {"×": "x", "±": "+-", "…": "...", "·": "*", "–": "-", "—": "-", "α": "alpha"}
_BREAK = re.compile(r"[ \t]*\r?\n[ \t\r\n]*")


def printable(text: str, most: int = MOST) -> str:
    """One line that shows every character of `text`, those that a terminal would obey as escapes: `\\x1b`, `\\n`,
    `\\u202e`.  A byte that is no text (a lone surrogate of a file's name) is `\\xff`.  Of more than `most` characters
    the middle is left out."""
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-(most // 2) :]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_shown(c) else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """A message as one printable line; where it had several, there is a space."""
    return printable(_BREAK.sub(" ", text.strip()))


def shell_word(text: str) -> str:
    """What a shell reads as `text`, whatever is in it, and a terminal shows as it is."""
    if all(map(_is_shown, text)):
        return shlex.quote(text)
    return f"$'{''.join(map(_quoted, text))}'"  # of bash, zsh, ksh


def _is_shown(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) not in _OBEYED


def _has(encoding: str, c: str) -> bool:
    return bool(c.encode(encoding, "ignore"))


def _escaped(c: str) -> str:
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds an undecodable byte
        return f"\\x{code - 0xDC00:02x}"
    return c.encode("unicode_escape").decode("ascii")


def _quoted(c: str) -> str:
    if c in "\\'":
        return f"\\{c}"
    return c if _is_shown(c) else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))


class Screen(Console):
    """A console on which every text is a text: no markup, no emoji codes, nothing that a terminal obeys.

    Where characters cannot be encoded they are escapes too.  Output that nobody reads any more (`| head -1`) ends
    quietly, and what a command writes into files is written all the same; any other failure is told at its end, by
    `failure`.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)
        self.failure: OSError | None = None
        self._strict: str | None = None

    def begin(self) -> None:
        """A new command: what became of another one's output is forgotten."""
        self.quiet, self.failure = False, None
        self._strict = self._on_letters_it_lacks("backslashreplace")

    def end(self) -> None:
        """All of it is written, what others have printed too."""
        try:
            self.file.flush()
            self._on_letters_it_lacks(self._strict)
        except OSError as error:
            self._lost(None if isinstance(error, BrokenPipeError) else error)

    def _on_letters_it_lacks(self, errors: str | None) -> str | None:
        """What the stream does for others, who write help: typer; returns what it did."""
        before = getattr(self.file, "errors", None)
        if errors is not None and not self.encoding.startswith("utf"):
            with contextlib.suppress(AttributeError):
                self.file.reconfigure(errors=errors)  # pyright: ignore[reportAttributeAccessIssue]
        return before

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        options |= {"markup": False, "emoji": False}
        return super().render_str(self._encodable(printable(text)), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What rich made of texts that were no plain strings."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control is None and not (text.isascii() and text.isprintable()):
                lines = (self._encodable(printable(part, len(part))) for part in text.split("\n"))
                segment = Segment("\n".join(lines), style)
            yield segment

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            self._lost(error)

    def line(self, text: str) -> None:
        """One line, never folded."""
        self.print(text, soft_wrap=True, highlight=False)

    def on_broken_pipe(self) -> None:
        self._lost(None)

    def _lost(self, error: OSError | None) -> None:
        """Nothing is written from now on; what a stream still holds would fail again when Python ends."""
        self.quiet, self.failure = True, error
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)

    def _encodable(self, text: str) -> str:
        encoding = self.encoding
        if text.isascii() or encoding.startswith("utf"):
            return text
        lacking = {c: _PLAIN.get(c, c) for c in set(text) if not _has(encoding, c)}
        text = text.translate(str.maketrans(lacking))
        return text.encode(encoding, "backslashreplace").decode(encoding)


def tell(line: str) -> None:
    """A message as one line on stderr, if somebody reads it."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a closed one
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        print(one_line(line).encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)
