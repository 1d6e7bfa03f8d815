"""The one way to write a file: as a whole or not at all, and over files alone."""

import contextlib
import hashlib
import os
import secrets
import stat
from pathlib import Path

from .descriptors import descriptor_of
from .interrupts import signals_later

try:
    import fcntl
except ImportError:  # not POSIX: nothing is locked, and open files cannot be removed anyway
    fcntl = None

_PART = ".sparsecore-part"  # how the names of files end that are still being written
_LONGEST = 200  # bytes of a name, to which ours is added; file systems take 255


class FileError(ValueError):
    """A file that cannot be read, written or used: which, what was expected and got, how to mend it."""


def put(path: Path, data: bytes) -> None:
    """A whole file at once: a reader sees the old one or the new one, also after a power cut or on a full disk.

    It lies on the disk when this returns.  An older file keeps its permissions, a new one has the user's umask; what a
    symbolic link leads to is written, and the link stays.

    Errors: FileError if it cannot be written, or for anything but a file that may be written; an older one is intact.
    """
    with signals_later():  # or a part may be left, held as long as this process lives
        _put(path, data)


def _put(path: Path, data: bytes) -> None:
    part = None
    try:
        target, mode = _target(path)
        sweep(target.parent)
        part, descriptor = _new_part(target)
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                part.chmod(mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows replaces no open files
                file.close()
            part.replace(target)
            part = None
        _sync_folder(target.parent)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}") from None
    finally:  # after an interrupt too
        if part is not None:
            with contextlib.suppress(OSError):  # a sweep will do it
                part.unlink()


def target_of(path: Path) -> Path:
    """The file that is written: where symbolic links lead.

    Errors: FileError for anything but a file that may be written, or a place for one.
    """
    try:
        return _target(path)[0]
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}") from None


def _target(path: Path) -> tuple[Path, int | None]:
    """Where links lead, and the permissions of the file there."""
    if "\0" in str(path):
        raise FileError(f"{str(path)!r}: expected a name without NUL, got one")
    if descriptor_of(path) is not None:
        raise FileError(f"{path}: expected the name of a file, got a pipe or device")
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target, None
    if not stat.S_ISREG(mode):
        got = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise FileError(f"{path}: expected the name of a file, got {got}")
    if not mode & 0o222:
        raise FileError(f"{path}: expected a file that can be written, got a protected one")
    return target, stat.S_IMODE(mode)


CLOSED = getattr(os, "O_CLOEXEC", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def _new_part(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, held as long as it is open: a sweep leaves it alone."""
    while True:
        part = beside(target, f".{secrets.token_hex(4)}{_PART}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(part, flags | CLOSED | NO_LINK, 0o666)
        try:
            if _hold(descriptor) and is_at(descriptor, part):
                return part, descriptor
        except OSError:  # a file system without locks
            return part, descriptor
        os.close(descriptor)  # swept between the two


def beside(target: Path, end: str) -> Path:
    """A hidden file of ours that belongs to another."""
    stem = target.name
    if len(os.fsencode(stem)) > _LONGEST:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()
    return target.with_name(f".{stem}{end}")


def _hold(descriptor: int) -> bool:
    """Whether the open file is this one's alone now; of a flock, which ends with its process.

    Errors: OSError where there are no locks.
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still is what lies at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk, too; some systems cannot open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | CLOSED)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(folder: Path) -> None:
    """Removes what killed writes have left in a folder; what somebody still writes stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        parts = [e for e in entries if e.name.startswith(".") and e.name.endswith(_PART)]
        for entry in parts:
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    _remove_unheld(Path(entry.path))


def _remove_unheld(part: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY | NO_LINK | CLOSED)
    try:
        if _hold(descriptor):
            part.unlink()
    finally:
        os.close(descriptor)
