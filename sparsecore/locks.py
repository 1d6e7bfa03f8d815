"""Files and folders that one thread of one process has for itself, and a line that says who has them."""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from .interrupts import ending_with, signals_later
from .streams import is_stream
from .writing import CLOSED, NO_LINK, FileError, beside, fcntl, is_at

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = ".sparsecore-lock"

_held: dict[Path, int] = {}  # by lock: the thread that has it here
_guard = threading.Lock()


@contextlib.contextmanager
def held(path: Path | None) -> Iterator[None]:
    """A file, or a folder and all that is in it, for this thread alone; within the block it may ask again.

    Other processes are kept out where the file system has locks.  None and streams are nobody's.

    Errors: FileError, which says who holds it.
    """
    if path is None or _is_nobodys(path):
        yield
        return
    real = Path(os.path.realpath(path))
    lock = beside(real, _LOCK)
    me, taken = threading.get_ident(), list[int | None]()

    def give_back() -> None:
        with signals_later(), _guard:
            if taken:
                _unlock(lock, taken.pop())
                del _held[lock]

    with ending_with(give_back):
        with signals_later(), _guard:
            owner = _held.get(lock, me)
            if owner != me:
                raise FileError(f"{path}: in use by another thread of this program; {_MEND}")
            if lock not in _held:
                taken.append(_locked(path, lock))
                _held[lock] = me
        yield


def _is_nobodys(path: Path) -> bool:
    try:
        return is_stream(path)
    except OSError as error:  # a name that is too long, a folder that nobody may look into
        raise FileError(f"{path}: expected a file or a place for one ({error.strerror})") from None


def alone(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that has the files of these keyword arguments for itself while it runs.  Errors: as `held`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def holding(*args: P.args, **kwargs: P.kwargs) -> R:
            with contextlib.ExitStack() as stack:
                for name in names:
                    path = kwargs.get(name)
                    if isinstance(path, (str, os.PathLike)):  # others the function refuses
                        stack.enter_context(held(Path(path)))
                return function(*args, **kwargs)

        return holding

    return decorate


_MEND = "wait until that has ended, or name another"


def _locked(path: Path, lock: Path) -> int | None:
    """The open lock; None where there can be none: a folder that is only read, no locks, a full disk.

    A record lock, since processes that are forked off, as a DataLoader's, do not inherit it.
    """
    while fcntl is not None:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | CLOSED | NO_LINK, 0o666)
        except OSError:
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _told(os.read(descriptor, 2000))
            os.close(descriptor)
            raise FileError(f"{path}: in use by {holder}; {_MEND}") from None
        except OSError:
            os.close(descriptor)
            return None
        if is_at(descriptor, lock):
            facts = [os.getpid(), socket.gethostname(), time.strftime("%F %T"), sys.argv[:4]]
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(facts).encode()[:2000])
            return descriptor
        os.close(descriptor)  # whoever had it has just removed it
    return None


def _unlock(lock: Path, descriptor: int | None) -> None:
    """Removed while it is still held: nobody else can have this very file then."""
    if descriptor is not None:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _told(note: bytes) -> str:
    """Who holds a lock, as it says of itself."""
    try:
        pid, host, since, command = json.loads(note)
        words = " ".join(str(word) for word in command)[:80]
        return f"process {int(pid)} on {host}, {words!r} since {since}"
    except (ValueError, TypeError, RecursionError):
        return "another process"
