"""Processes that end with those that started them: a run that is killed leaves nothing at work behind it."""

import contextlib
import ctypes
import os
import signal
import subprocess
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl  # found here: between fork and exec nothing may be loaded


def end_with_parent() -> None:
    """In a new process (as `preexec_fn`): it is killed when its parent is, however that ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session, and those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def age() -> float:
    """Seconds since this process began: it imports torch before it comes to read a clock."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks, frequency = int(fields[19]), os.sysconf("SC_CLK_TCK")
    return max(0.0, clock_gettime(CLOCK_BOOTTIME) - ticks / frequency)
