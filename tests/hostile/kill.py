"""Kills and interrupts: the same command again goes on, comes to the same, and leaves nothing of the killed one."""

import contextlib
import os
import shutil
import signal
import time
import traceback
from pathlib import Path
from random import Random

from .faults import Changes, interrupt, kill, terminate
from .judge import Failure
from .sandbox import Run
from .works import WORKS, Passes, check_again, drawn, reference_of


def killing(cache: Path) -> Run:
    """One of the works, killed once or twice."""

    def run(seed: int, folder: Path) -> str:
        rng = Random(seed)
        name, passes = drawn(rng), Passes()
        known = reference_of(name, cache)
        shutil.copytree(cache / "inputs" / name, folder, dirs_exist_ok=True)
        times = rng.choice([1, 1, 2])
        for _ in range(times):
            by_change = rng.random() < 0.8
            at = 1 + rng.randrange(known.changes) if by_change else -1
            seconds = 60.0 if by_change else rng.uniform(0.05, known.seconds)
            print(f"{name}: killed at change {at}" if by_change else f"{name}: after {seconds:g} s")
            _killed(name, folder, at, seconds)
            if WORKS[name].saved():
                passes.forget()
        return check_again(name, cache, passes, times)

    return run


def interrupting(cache: Path) -> Run:
    """One of the works, which Ctrl-C or (a command) SIGTERM ends."""

    def run(seed: int, folder: Path) -> str:
        rng = Random(seed)
        name, passes = drawn(rng), Passes()
        shutil.copytree(cache / "inputs" / name, folder, dirs_exist_ok=True)
        at = 1 + rng.randrange(reference_of(name, cache).changes)
        act = interrupt if "." in name else rng.choice([interrupt, terminate])
        print(f"{name}: {act.__name__} at change {at}")
        with contextlib.suppress(KeyboardInterrupt), Changes(folder).fault(act, at):
            WORKS[name].run()
        if WORKS[name].saved():
            passes.forget()
        return check_again(name, cache, passes, faults=1)

    return run


def _killed(name: str, folder: Path, at: int, seconds: float) -> None:
    """Does the work in a process that is killed on its way, or is done before."""
    pid = os.fork()
    if pid == 0:
        try:
            with Changes(folder).fault(kill, at):
                WORKS[name].run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    else:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise Failure(f"exit code {code}")
