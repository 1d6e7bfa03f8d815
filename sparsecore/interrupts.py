"""Ctrl-C and the like: what they must not tear, and on the command line one line that says what is true, no traceback,
nothing left behind.

This module imports nothing of the others: it comes first, since they take seconds.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

GOES_ON = "run the same command again to go on"
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
# Whose handlers may raise: of users, of timeouts, of schedulers that warn before they take a machine away.
_RAISED = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
           if n in signal.Signals.__members__]  # fmt: skip


class Stop(BaseException):
    """A signal asks the command to end.  It is no KeyboardInterrupt, of which typer makes an error of its own.

    Args:
        code: of the exit, 128 and the signal's number.
        advice: what the same command will do next time.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.code, self.word, self.advice = 128 + signum, _WORDS[signal.Signals(signum)], ""

    def __str__(self) -> str:
        return f"{self.word}; {self.advice}" if self.advice else self.word


@contextmanager
def goes_on(advice: Callable[[], str]) -> Iterator[None]:
    """Work of which a signal leaves what `advice` says by then."""
    try:
        yield
    except (KeyboardInterrupt, Stop) as error:
        stop = error if isinstance(error, Stop) else Stop(signal.SIGINT)
        stop.advice = advice()
        raise stop from None


def kept_in(*places: Path) -> Callable[[], str]:
    """The advice of commands that go on from files, or from whatever lies in folders."""

    def advice() -> str:
        if any(place.is_file() or (place.is_dir() and any(place.iterdir())) for place in places):
            return GOES_ON
        return f"{GOES_ON}, from the beginning: nothing was kept yet"

    return advice


def kept_by_training(checkpoint: Path | None) -> Callable[[], str]:
    """The same of a training, which keeps nothing without a checkpoint."""
    if checkpoint is None:
        return lambda: f"nothing is kept without --checkpoint FILE; with it, {GOES_ON}"
    return kept_in(checkpoint)


@contextmanager
def signals_later() -> Iterator[None]:
    """Ctrl-C and the like come when the block has ended: what puts a model back does it whole, and a file that native
    code reads is not called damaged for their sake.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before: dict[int, Any] = {}
    try:
        for signum in _RAISED:
            if callable(handler := signal.getsignal(signum)):
                before[signum] = handler
                signal.signal(signum, lambda *signalled: came.append(signalled))
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum, frame in came:
            before[signum](signum, frame)


@contextmanager
def ending_with(put_back: Callable[[], None]) -> Iterator[None]:
    """A block after which this has been done to its end, whatever ends the block: once more where a signal came in its
    midst, so that doing it twice has to be as good.
    """
    try:
        yield
    finally:
        try:
            put_back()
        except BaseException:
            put_back()
            raise


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Signals raise `Stop` inside; a second one, while the first is dealt with, ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone
        return
    owner = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked process has nobody to tell
            os._exit(128 + signum)
        for other in before:
            signal.signal(other, _end)
        raise Stop(signum)

    before: dict[signal.Signals, Any] = {}
    try:
        for signum in _WORDS:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):  # nohup, and a host's own
                before[signum] = signal.signal(signum, stop)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_quietly_while_importing() -> None:
    """Signals end a process of the command line in one line, until it runs a command.  Others' processes are theirs."""
    if is_command_line() and threading.current_thread() is threading.main_thread():
        for signum in _WORDS:
            if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(signum, _end)


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, f"{_WORDS[signal.Signals(signum)]}\n".encode())
    os._exit(128 + signum)


def is_command_line() -> bool:
    """Whether this process is `sparsecore`, or `python -m sparsecore`, which is "-m" until its modules are found."""
    name = sys.argv[0] if getattr(sys, "argv", None) else ""
    if name != "-m":
        return Path(name).stem == "sparsecore"
    words = sys.orig_argv
    return "-m" in words and words[words.index("-m") + 1 :][:1] == ["sparsecore"]
