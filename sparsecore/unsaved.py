"""The checkpoint of a search stays until its ticket lies on a disk."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Unsaved:
    """What a ticket's search can be ended from again, for as long as nobody has saved the ticket.

    Args:
        paths: its files as they are now, and folders, which go if they are empty by then; in the order of going.
        waiting: the tickets of the search that are not saved yet, one set for all of them.
        ticket: which of them this one is.
        seen: by path, which file it was.
        masks: of the first ticket that had this: a variant with others is not what the search found.
    """

    paths: tuple[Path, ...]
    waiting: set[int]
    ticket: int
    seen: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    masks: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, paths: Iterable[Path | None], tickets: int = 1) -> "list[Unsaved]":
        """One for each ticket of a search."""
        places = (path.absolute() for path in paths if path is not None)
        known = tuple(path for path in places if path.exists())
        waiting, seen = set(range(tickets)), {path: _identity(path) for path in known}
        return [cls(known, waiting, i, seen) for i in range(tickets)]

    def belongs_to(self, masks: Any) -> None:
        """Notes the masks of the search's own ticket."""
        if not self.masks:
            self.masks.append(masks)

    def saved(self, masks: Any = None) -> None:
        """Removes the files once all tickets are safe; those that another run has written since stay.

        masks: of the ticket that was saved, if it may be a variant.
        """
        if masks is not None and self.masks and masks is not self.masks[0]:
            return
        self.waiting.discard(self.ticket)
        for path in () if self.waiting else self.paths:
            with contextlib.suppress(OSError):  # a file too many is no harm
                if path.is_dir():
                    path.rmdir()
                elif _identity(path) == self.seen[path]:
                    path.unlink()


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
