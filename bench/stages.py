"""What a run in slices consists of, as values, and the journal that says how far it has come.

A stage has cases; a case passes or fails once, and what was cut short runs again.  `supervise` runs stages,
`evidence` and `comparison` are modules that name some: each has `stages(setting)`.

Events of the journal: `run` (of what), `call`, `turn` (a stage's seconds), and of a case `begin`, `passed`,
`failed` (`again`: in the next call), `cut` (by the clock), `killed` (with the whole call, found by the next).
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # kernels are imported by who runs them, in the interpreter or not
    from .search_suite import Work


@dataclass(frozen=True)
class Setting:
    """Where a run writes, and on what it runs.

    Args:
        out: an absolute folder.
        quick: tiny, to try every path out.
        data_dir: where data sets lie; otherwise they are downloaded.
    """

    out: Path
    device: str
    quick: bool = False
    data_dir: str | None = None

    @property
    def runs(self) -> Path:
        """Folder of what searches and trainings go on from."""
        return self.out / "runs"

    @property
    def data_options(self) -> tuple[str, ...]:
        return ("--data-dir", self.data_dir) if self.data_dir else ()

    def text(self) -> str:
        return json.dumps(asdict(self) | {"out": str(self.out)})

    @classmethod
    def of(cls, text: str) -> "Setting":
        values = json.loads(text)
        return cls(**values | {"out": Path(values["out"])})


WHOLE = "the stage itself"  # the case that fails when a stage cannot go on


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        share: of the budget, for the first turn; what is not done by then gets another behind the others.
        limit: seconds without an end after which a case hangs.
        note: asked for a line of the summary.
    """

    name: str
    share: float
    limit: float
    note: Callable[[], str] = str

    @property
    def cases(self) -> list[str]:
        return [WHOLE]


@dataclass(frozen=True)
class Measured(Stage):
    """Cases of a suite, one after another in a worker that lives as long as it is healthy."""

    suite: str = ""
    work: "Sequence[Work]" = ()

    @property
    def cases(self) -> list[str]:
        return [one.name for one in self.work]


@dataclass(frozen=True)
class Command:
    """A process of its own; exit code 0 passes, and 2 is bad input: it runs again in the next call."""

    name: str
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Commands(Stage):
    """Processes, one after another; those without a limit go on where they were killed, in `Setting.runs`."""

    work: Sequence[Command] = ()

    @property
    def cases(self) -> list[str]:
        return [one.name for one in self.work]


@dataclass(frozen=True)
class Tests(Stage):
    """pytest with arguments, as one case that goes on; `limit` is for one test."""

    arguments: tuple[str, ...] = ()


Event = dict[str, Any]
ENDS = ("passed", "failed")


def lines_of(path: Path) -> list[Event]:
    """The objects of a file of JSON lines; half a line, from a kill, is none."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def add_line(path: Path, event: Event) -> None:
    """Appends in one write, on a line of its own whatever was cut before it."""
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        half = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(b"\n" * half + json.dumps(event).encode() + b"\n")


class Journal:
    """`progress.jsonl` of a folder, which the supervisor and its workers append to."""

    def __init__(self, out: Path) -> None:
        self.path = out / "progress.jsonl"

    def events(self) -> list[Event]:
        return lines_of(self.path)

    def add(self, event: str, **values: Any) -> None:
        add_line(self.path, {"event": event} | values)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the folder is ours; the system ends that with the process.  Errors: ValueError if it is another's."""
        with self.path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another call is at work in {self.path.parent}: wait for it or name another OUT"
                ) from None
            yield

    def ended(self, stage: str) -> dict[str, Event]:
        """How a stage's cases ended; those that failed to run `again` have in their call alone."""
        events = self.events()
        call = max((i for i, e in enumerate(events) if e["event"] == "call"), default=0)
        last = [e for i, e in enumerate(events) if i > call or "again" not in e]
        found = (e for e in last if e["event"] in ENDS and e["stage"] == stage)
        return {event["case"]: event for event in found}

    def running(self) -> Event | None:
        """The case that began last, unless it has ended, was cut or killed."""
        told = [e for e in self.events() if e["event"] in ("begin", "cut", "killed", *ENDS)]
        return told[-1] if told and told[-1]["event"] == "begin" else None
