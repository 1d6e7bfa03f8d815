"""The file of --metrics: one JSON object a line, an epoch each, whatever runs write into it one after another."""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plain import read_plain
from .safefile import finite
from .streams import append, is_stream
from .writing import FileError, put


def line(record: dict[str, Any]) -> str:
    """A record as a line; numbers that are none become null."""
    return json.dumps(finite(record)) + "\n"


def lines_of(path: Path) -> list[str]:
    """The lines of the file, none where there is no file, or a stream.

    Left out are empty ones at the end, and half a line that a kill left.

    Errors: FileError for a file of anything but JSON objects.
    """
    if is_stream(path) or not path.exists():
        return []
    lines = read_plain(path).removeprefix(codecs.BOM_UTF8).splitlines(keepends=True)
    while lines and not lines[-1].strip():
        lines.pop()
    if lines and not lines[-1].endswith(b"\n") and lines[-1].startswith(b"{"):
        if not _is_object(lines[-1]):
            lines.pop()
        else:
            lines[-1] += b"\n"
    for number, text in enumerate(lines, 1):
        if not _is_object(text):
            raise FileError(
                f"metrics {path}: expected a new file or one JSON object a line, got something else in line {number}; "
                "name another file"
            )
    return [text.decode() for text in lines]


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def catch_up(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Lines of the epochs behind a checkpoint that are not there yet, a kill being always in between.

    Errors: as `lines_of`, with the file as it was.
    """
    lines = lines_of(path)
    if lines or (path.is_file() and not is_stream(path)):
        whole = "".join(lines).encode()
        if read_plain(path) != whole:
            put(path, whole)
    known = {_canonical(json.loads(text)) for text in lines}
    if missed := [line(record) for record in records if _canonical(record) not in known]:
        append(path, "".join(missed))


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(finite(record), sort_keys=True)
