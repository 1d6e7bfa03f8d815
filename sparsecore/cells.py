"""The cells of a comparison: what each trained, and the file of their rows."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .plain import read_plain
from .schema import Count, Fraction, Percent, Seconds, facts
from .writing import FileError, put

Row = dict[str, str]
FIELDS: tuple[str, ...] = (
    "method",
    "sparsity",
    "seed",
    "accuracy",
    "kept_weights",
    "search_seconds",
    "train_seconds",
    "device",
    "torch",
)
_NUMBERS = {
    "sparsity": (float, Fraction),
    "seed": (int, int),
    "accuracy": (float, Percent),
    "kept_weights": (int, Count),
    "search_seconds": (float, Seconds),
    "train_seconds": (float, Seconds),
}


@dataclass(frozen=True)
class Cell:
    """One training run: a method (`cts`, or a control of it such as `cts+shuffle`), a sparsity, a seed."""

    method: str
    sparsity: float
    seed: int

    @classmethod
    def of(cls, row: Row) -> "Cell":
        return cls(row["method"], float(row["sparsity"]), int(row["seed"]))

    @property
    def base(self) -> str:
        """The method without its control."""
        return self.method.partition("+")[0]

    @property
    def key(self) -> str:
        return f"{self.method}-{short(self.sparsity)}-{self.seed}"


def short(sparsity: float) -> str:
    """A sparsity in as few digits as tell it from others."""
    text = f"{sparsity:g}"
    return text if float(text) == sparsity else repr(sparsity)


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of finished cells by their keys, none if there is no file; half a line at the end is none.

    A file that a spreadsheet or an editor has saved is read too: other ends of lines, a mark of its encoding, quotes,
    and lines without a value.

    Errors: FileError for a file of anything else.
    """
    if not path.exists():
        return {}
    text = read_plain(path).decode("utf-8-sig", errors="replace")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    if lines and _values(lines[0]) != [*FIELDS]:
        raise FileError(
            f"{path}: expected the results of a comparison, with commas between the columns {', '.join(FIELDS)}, got "
            "something else; save it so again, or give another --out"
        )
    found = {}
    for number, line in enumerate(lines[1:], 2):
        values = _values(line)
        if not any(value.strip() for value in values):
            continue
        try:
            row = dict(zip(FIELDS, values, strict=True))
            for name, (kind, hint) in _NUMBERS.items():
                facts(kind(row[name]), hint, name)
        except ValueError:
            raise FileError(
                f"{path}: expected a row of a comparison in line {number}, got something else; remove the line"
            ) from None
        found[Cell.of(row).key] = row
    return found


def _values(line: str) -> list[str]:
    """Of a line of CSV; the line itself where it is none."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return [line]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Errors: FileError if it cannot be written, with the rows that were there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    put(path, text.getvalue().encode())
