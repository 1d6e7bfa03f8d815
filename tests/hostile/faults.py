"""A disk that is full, or a process that is killed, at the n-th change of the files in a folder."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Stopped(BaseException):
    """An interrupt, as a user's Ctrl-C is."""


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    raise Stopped


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Changes:
    """Counts how often a file in the folder is opened to be written, made safe (fsync), renamed or removed.

    One for a process's whole life: hooks of the interpreter, which see C code too, cannot be taken back.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.at, self.lasts = os.path.realpath(folder), 0, -1, False
        self.act: Callable[[], None] = stop
        self.only: tuple[str, ...] = ()
        self._sync = os.fsync
        os.fsync = self._synced
        sys.addaudithook(self._hook)

    def _synced(self, file: Any) -> None:
        self._changed("fsync")
        self._sync(file)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & _WRITES and self._inside(path):
                self._changed(event)
        elif event in ("os.rename", "os.remove", "os.mkdir") and self._inside(args[0]):
            self._changed(event)

    def _inside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        whole = os.path.join(os.getcwd(), os.fsdecode(path))  # noqa: PTH109, PTH118  in a hook: quick, nothing opened
        return os.path.normpath(whole).startswith(self.folder)

    def _changed(self, event: str) -> None:
        if self.only and event not in self.only:
            return
        self.count += 1
        if self.count == self.at or (self.lasts and 0 <= self.at < self.count):
            self.act()

    @contextlib.contextmanager
    def fault(
        self, act: Callable[[], None], at: int, *, only: tuple[str, ...] = (), lasts: bool = False
    ) -> Iterator[None]:
        """Acts at the `at`-th change from now on, of the events `only` if there are some, and if it lasts after it."""
        self.act, self.at, self.only, self.lasts, self.count = act, at, only, lasts, 0
        try:
            yield
        finally:
            self.at = -1
