"""A process for each input: forked from a warm one, watched, and told apart by how it ended."""

import contextlib
import ctypes
import gc
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import gt
from pathlib import Path

SECONDS = 12.0
# Beyond what a try begins with, of memory that no file backs, which is what a machine runs out of. A limit of addresses
# (RLIMIT_AS) would turn a request for too much into an error that a machine with that much to promise does not raise,
# and so hide the fault. What is shared has a limit of its own: where files lie in memory (tmpfs), libraries are.
BYTES = 1 << 30
_KINDS = (("RssAnon", "VmSwap"), ("RssShmem",))

Run = Callable[[int, Path], str]  # (seed, an empty folder) -> "fine" or "refused"


@dataclass(frozen=True)
class Input:
    """One try: `run(seed, folder)` of a kind, which may take so many seconds."""

    kind: str
    seed: int
    run: Run
    seconds: float = SECONDS


@dataclass(frozen=True)
class Outcome:
    """How a try ended: "fine", "refused" or "failed", and why it failed, with what it said."""

    input: Input
    how: str
    why: str = ""
    said: str = ""


def trims() -> bool:
    """Gives free memory of the C library's heap back, which would hide as much; whether there is such a call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


class _Try:
    """A running child."""

    def __init__(self, given: Input) -> None:
        self.input = given
        self.folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        self.read, said = os.pipe()  # which no limit of files' sizes stops
        os.set_blocking(self.read, False)
        self.said, self.killed = b"", ""
        sys.stdout.flush()
        sys.stderr.flush()
        trims()
        mine, its = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            mine.close()
            gc.freeze()  # what the parent has not collected yet would hide as much of what is taken here
            its.send(b".")
            its.recv(1)
            its.close()
            _child(given, self.folder, said)
        its.close()
        os.close(said)
        # What it begins with, not what its parent holds, who has more: pages of files, what is shared, other children.
        mine.recv(1)
        self.most = [begun + BYTES for begun in _held(self.pid)]
        with contextlib.suppress(OSError):  # it has died already
            mine.send(b".")
        mine.close()
        self.end = time.monotonic() + given.seconds

    def outcome(self) -> Outcome | None:
        """How it ended; None while it goes on."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.read, 1 << 16):
                self.said += piece
        if pid == 0:
            if not self.killed and time.monotonic() > self.end:
                self._kill(f"took more than {self.input.seconds:g} s")
            elif not self.killed and any(map(gt, _held(self.pid), self.most)):
                self._kill("took more than 1 GB of memory")
            return None
        _end_group(self.pid)  # what it has started itself
        said = self.said.decode(errors="replace")
        os.close(self.read)
        shutil.rmtree(self.folder, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        if self.killed:
            return Outcome(self.input, "failed", self.killed, said)
        if code in _CODES.values():
            how = next(how for how, c in _CODES.items() if c == code)
            return Outcome(self.input, how, "", said)
        if code < 0:
            return Outcome(self.input, "failed", f"killed by {signal.Signals(-code).name}", said)
        lines = said.strip().splitlines()
        return Outcome(self.input, "failed", lines[-1] if lines else f"exit code {code}", said)

    def _kill(self, why: str) -> None:
        self.killed = why
        _end_group(self.pid)


_CODES = {"fine": 80, "refused": 81}  # which nothing else ends with


def _child(given: Input, folder: Path, said: int) -> None:
    """Runs the input and never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # whatever reads it is at its end
        os.dup2(said, 1)
        os.dup2(said, 2)
        # Python's own streams may be somebody else's by now (pytest's).
        sys.stdin = open(0)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(n, "w", errors="backslashreplace") for n in (1, 2))  # noqa: PTH123, SIM115
        os.chdir(folder)
        code = _CODES[given.run(given.seed, folder)]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_group(pid: int) -> None:
    for end in (os.killpg, os.kill):  # it may not have a group of its own yet
        try:
            end(pid, signal.SIGKILL)
            return
        except (ProcessLookupError, PermissionError):
            continue


def _held(pid: int) -> list[int]:
    """Bytes of each kind that the greatest of a process and its children holds; 0 for one that has ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return [0 for _ in _KINDS]
    sizes = {line[0].rstrip(":"): int(line[1]) << 10 for line in lines if line[2:] == ["kB"]}
    sizes.setdefault("RssAnon", sizes.get("VmRSS", 0))  # of kernels that do not tell them apart
    own = [sum(sizes.get(name, 0) for name in names) for names in _KINDS]
    children = list[str]()
    with contextlib.suppress(OSError):  # not every kernel tells
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [max(held) for held in zip(own, *(_held(int(child)) for child in children), strict=True)]


def outcomes(inputs: Iterable[Input], *, at_once: int = 2) -> Iterator[Outcome]:
    """How each input ended, in the order in which they end."""
    waiting, running = iter(inputs), list[_Try]()
    try:
        while True:
            while len(running) < at_once and (given := next(waiting, None)) is not None:
                running.append(_Try(given))
            if not running:
                return
            ended = [(t, found) for t in running if (found := t.outcome()) is not None]
            for t, found in ended:
                running.remove(t)
                yield found
            if not ended:
                time.sleep(0.005)
    finally:
        for t in running:
            _end_group(t.pid)
            shutil.rmtree(t.folder, ignore_errors=True)
