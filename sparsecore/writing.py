"""The one way to write a file: as a whole or not at all, over files alone, and by one process at a time."""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from .interrupts import signals_later

try:
    import fcntl
except ImportError:  # not POSIX: nothing is locked, and open files cannot be removed anyway
    fcntl = None

P = ParamSpec("P")
R = TypeVar("R")

_PART = ".sparsecore-part"  # how the names of files end that are still being written
_LOCK = ".sparsecore-lock"
_LONGEST = 200  # bytes of a name, to which ours is added; file systems take 255
# What a process has open, by name.
_FDS = ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")
_STREAMS = {"stdin": "0", "stdout": "1", "stderr": "2"}


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


def append(path: Path, text: str) -> None:
    """Text at the end of a file, all of it or nothing; into a stream (a pipe, /dev/stdout), too.

    Of what this process has open itself, such as /dev/stdout, nobody need read all (`| head -1`), as of what it prints.

    Errors: FileError if it cannot be written.
    """
    try:
        with os.fdopen(_open(path), "wb", buffering=0) as file:
            end = os.fstat(file.fileno())
            plain = stat.S_ISREG(end.st_mode) and _own(path) is None
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
        if isinstance(error, BrokenPipeError) and _own(path) is not None:
            return
        raise FileError(f"{path} could not be written: {error.strerror or error}") from None


def _open(path: Path) -> int:
    """To write at the end.  What this process has open already is used where it has come to: a file behind /dev/stdout
    that is opened again would be written over by what is printed next.
    """
    own = _own(path)
    if own is not None:
        with contextlib.suppress(BrokenPipeError):  # another stream than this, maybe
            sys.stdout.flush()
        return os.dup(own)
    real = os.path.realpath(path)
    if real in _pipes and _is_at(_pipes[real], Path(real)):
        return os.dup(_pipes[real])
    found = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CLOSED, 0o666)
    if stat.S_ISFIFO(os.fstat(found).st_mode):
        _pipes[real] = os.dup(found)
    return found


# Named pipes, open as long as this process: whoever reads one ends when it is closed, and the next write would wait.
_pipes: dict[str, int] = {}


def is_stream(path: Path) -> bool:
    """Whether there is a pipe or device, which takes text and is not replaced; /dev/stdout is one wherever it leads."""
    return _own(path) is not None or (path.exists() and not path.is_file() and not path.is_dir())


def check_stream(path: Path) -> None:
    """Errors: FileError for a pipe or device that takes nothing, such as a descriptor that is not open."""
    own = _own(path)
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


def _own(path: Path) -> int | None:
    """The descriptor that it is or links to, of what this process has open (behind it may lie a file of others); -1 for
    a name that is none.
    """
    for _ in range(40):  # as many links as Linux follows
        folder, _, name = str(path.absolute()).rpartition("/")
        if folder in (*_FDS, f"/proc/{os.getpid()}/fd") or (folder == "/dev" and name in _STREAMS):
            name = _STREAMS.get(name, name)
            return int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


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
    if _own(path) is not None:
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


_CLOSED = getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def _new_part(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, held as long as it is open: a sweep leaves it alone."""
    while True:
        part = _beside(target, f".{secrets.token_hex(4)}{_PART}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(part, flags | _CLOSED | _NO_LINK, 0o666)
        try:
            if _hold(descriptor) and _is_at(descriptor, part):
                return part, descriptor
        except OSError:  # a file system without locks
            return part, descriptor
        os.close(descriptor)  # swept between the two


def _beside(target: Path, end: str) -> Path:
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


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still is what lies at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk, too; some systems cannot open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | _CLOSED)
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
    descriptor = os.open(part, os.O_RDONLY | _NO_LINK | _CLOSED)
    try:
        if _hold(descriptor):
            part.unlink()
    finally:
        os.close(descriptor)


_held: dict[Path, tuple[int, int]] = {}  # by lock: the thread that has it here, and how often
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
    lock = _beside(real, _LOCK)
    with _guard:
        owner, count = _held.get(lock, (threading.get_ident(), 0))
        if owner != threading.get_ident():
            raise FileError(f"{path}: in use by another thread of this program; {_MEND}")
        descriptor = None if count else _locked(path, lock)
        _held[lock] = owner, count + 1
    try:
        yield
    finally:
        with _guard:
            _held[lock] = owner, count
            if not count:
                del _held[lock]
                _unlock(lock, descriptor)


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
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | _CLOSED | _NO_LINK, 0o666)
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
        if _is_at(descriptor, lock):
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
