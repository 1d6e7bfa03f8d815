"""Files of a user's are read as plain files alone: a pipe would be waited for, and a device may never end."""

import os
import stat
from pathlib import Path

from .writing import FileError

_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def read_plain(path: Path) -> bytes:
    """All bytes of a plain file, or of one that links lead to.

    Errors: FileError for a folder, a pipe or a device, and for a file that is not there or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
        try:
            _check(path, os.fstat(descriptor).st_mode)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from None


def require_plain(path: Path) -> None:
    """Before a library opens it by its name.  Errors: as `read_plain`."""
    try:
        _check(path, path.stat().st_mode)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> FileError:
    return FileError(f"{path}: expected a file that can be read, got none ({error.strerror})")


def _check(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise FileError(f"{path}: expected a file, got {found}; name another, or put a file there")
