"""What a command or a call may end as, and what it may touch: everything else is a failure."""

import contextlib
import fcntl
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsecore import cli

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_HELD = 1 << 20  # bytes that are said before anybody reads: a command that says more hangs
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)


class Failure(Exception):
    """A broken promise."""


class Said:
    """What a command has written to stdout and stderr."""

    out = err = ""


@contextlib.contextmanager
def listening() -> Iterator[Said]:
    """Keeps all that is written to the two streams, native code included; by pipes, which no full disk limits."""
    said, kept, pipes = Said(), [], []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        kept.append(os.dup(number))
        read, write = os.pipe()
        if _F_SETPIPE_SZ is not None:
            fcntl.fcntl(write, _F_SETPIPE_SZ, _HELD)
        os.dup2(write, number)
        os.close(write)
        pipes.append(read)
    try:
        yield said
    finally:
        told = []
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            os.dup2(kept[number - 1], number)  # the pipe's last writer goes
            os.close(kept[number - 1])
            with os.fdopen(pipes[number - 1], "rb") as pipe:
                told.append(pipe.read().decode(errors="surrogateescape"))
        said.out, said.err = told


def command(argv: list[str]) -> str:
    """Runs `sparsecore ARGV` here: "fine" for exit code 0, "refused" for 2 and one line, without control characters,
    "interrupted" for 130 or 143 and a line that says so.

    What it raises, no command may; a Failure tells of other ends.
    """
    said = Said()
    try:
        with listening() as said:
            code = cli.main(argv)
    except BaseException:
        print("sparsecore", *argv, "\n" + said.out + said.err)
        raise
    return judged(code, said, argv)


def judged(code: int, said: Said, argv: list[str]) -> str:
    """ "fine", "refused" or "interrupted".  Errors: Failure, with what was said."""
    how, lines = "", [x for x in said.err.split("\n") if x and not x.startswith("warning: ")]
    if code == 0:
        how = "fine" if not any(x.startswith(("error", "Traceback")) for x in lines) else ""
    elif code == 2:
        how = "refused" if len(lines) == 1 and lines[0].startswith("error: ") else ""
    elif code in (130, 143):
        word = "interrupted" if code == 130 else "terminated"
        how = "interrupted" if len(lines) == 1 and lines[0].startswith(word) else ""
    if not how:
        told = "\n".join([" ".join(["sparsecore", *argv])[:2000], said.out, said.err])
        raise Failure(f"expected 0, or 2 and one line, got {code} and {len(lines)} lines: {told}")
    if found := _CONTROL.search(said.out + said.err):
        raise Failure(f"{found.group()!r} was printed: {said.out[-500:]!r} {said.err[-500:]!r}")
    print(said.err)
    return how


def call(function: Callable[[], Any], allowed: tuple[type[Exception], ...] = (ValueError,)) -> str:
    """ "fine", or "refused" by an exception that the documentation names and that says something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except allowed as error:
            if not str(error):
                raise Failure(f"{type(error).__name__} without a word") from error
            print(f"refused: {type(error).__name__}: {error}")
            return "refused"
    return "fine"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pattern_of(name: str) -> str:
    """A file's name without the fingerprint in it, which differs from run to run."""
    return re.sub("[0-9a-f]{12,}", "#", name)


def check_names(folder: Path, known: set[str]) -> None:
    """Errors: Failure for files that are none of the known (`pattern_of`): leftovers of writing."""
    if more := sorted({pattern_of(name) for name in contents(folder)} - known):
        raise Failure(f"left behind: {', '.join(more)}")


class Guard:
    """Sees what the process does to the world beside its folder.  One for a process's whole life."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self.strict = (
            False  # whether a file alone decides what is done: no network then, and no walks
        )
        known = (str(folder), sys.prefix, sys.base_prefix, str(_ROOT))
        self.known = tuple(os.path.realpath(path) for path in known)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
            if self.strict:
                self.seen.append(f"asked the network: {event} {args[-1]!r}")
            raise OSError("no network here")
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            self.seen.append(f"started a program: {args!r}")
        elif event == "pickle.find_class":
            self.seen.append(f"unpickled {args!r}")
        elif event in ("os.listdir", "os.scandir") and self.strict:
            path = args[0] if isinstance(args[0], (str, bytes, os.PathLike)) else "."
            real = os.path.realpath(os.fsdecode(path or "."))
            if not real.startswith(self.known):
                self.seen.append(f"looked into {real}")

    def check(self) -> None:
        """Errors: Failure for what should not have been done."""
        if self.seen:
            raise Failure("; ".join(self.seen[:3]))


_ROOT = Path(__file__).resolve().parents[2]
