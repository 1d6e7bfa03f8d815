"""Text at the end of files, and of streams: pipes, devices, what this process has open."""

import contextlib
import os
import stat
import sys
from pathlib import Path

from .descriptors import descriptor_of
from .writing import CLOSED, FileError, fcntl, is_at


def append(path: Path, text: str) -> None:
    """Text at the end of a file, all of it or nothing; into a stream (a pipe, /dev/stdout), too.

    Of what this process has open itself, such as /dev/stdout, nobody need read all (`| head -1`), as of what it prints.

    Errors: FileError if it cannot be written.
    """
    try:
        with os.fdopen(_open(path), "wb", buffering=0) as file:
            end = os.fstat(file.fileno())
            plain = stat.S_ISREG(end.st_mode) and descriptor_of(path) is None
            data = memoryview(text.encode())
            try:
                while data:
                    data = data[file.write(data) :]
                if plain:
                    os.fsync(file.fileno())
            except OSError:
                if plain:
                    os.ftruncate(file.fileno(), end.st_size)
                raise
    except OSError as error:
        if isinstance(error, BrokenPipeError) and descriptor_of(path) is not None:
            return
        raise FileError(f"{path} could not be written: {error.strerror or error}") from None


def _open(path: Path) -> int:
    """To write at the end.  What this process has open already is used where it has come to: a file behind /dev/stdout
    that is opened again would be written over by what is printed next.
    """
    own = descriptor_of(path)
    if own is not None:
        with contextlib.suppress(BrokenPipeError):  # another stream than this, maybe
            sys.stdout.flush()
        return os.dup(own)
    real = os.path.realpath(path)
    if real in _pipes and is_at(_pipes[real], Path(real)):
        return os.dup(_pipes[real])
    found = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | CLOSED, 0o666)
    if stat.S_ISFIFO(os.fstat(found).st_mode):
        _pipes[real] = os.dup(found)
    return found


# Named pipes, open as long as this process: whoever reads one ends when it is closed, and the next write would wait.
_pipes: dict[str, int] = {}


def is_stream(path: Path) -> bool:
    """Whether there is a pipe or device, which takes text and is not replaced; /dev/stdout is one wherever it leads."""
    return descriptor_of(path) is not None or (
        path.exists() and not path.is_file() and not path.is_dir()
    )


def check_stream(path: Path) -> None:
    """Errors: FileError for a pipe or device that takes nothing, such as a descriptor that is not open."""
    own = descriptor_of(path)
    try:
        if own is None:
            open_to_write = os.access(path, os.W_OK)
        else:
            os.fstat(own)
            open_to_write = fcntl is None or bool(
                fcntl.fcntl(own, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
            )
    except OSError:
        open_to_write = False
    if not open_to_write:
        raise FileError(f"{path}: expected what is open to be written to, got what is not")


def is_printed_to(path: Path) -> bool:
    """Whether a file is where this process prints to: both would write over each other."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if path.is_file() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return True
    return False
