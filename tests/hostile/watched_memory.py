"""That a try which takes too much memory is seen, whatever its parent holds or has let go.

Not collected with the others: `tests/test_hostile.py` runs it in a process of its own.
"""

import ctypes
import gc
import mmap
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.hostile import sandbox
from tests.hostile.sandbox import Input, Outcome, outcomes


def ended(run) -> Outcome:
    (found,) = outcomes([Input("k", 0, run)])
    return found


def told(found: Outcome) -> str:
    """What a machine of another kind says of memory."""
    return f"{found}\n{os.uname()}\n{Path('/proc/self/status').read_text()}"


def grows(seed: int, folder: Path) -> str:
    held = [torch.ones(1 << 26) for _ in range(8)]  # 2 GB
    time.sleep(8)
    return "fine" if held else ""


def collects_and_grows(seed: int, folder: Path) -> str:
    gc.collect()
    held = torch.ones(1 << 26)  # 256 MB
    time.sleep(8)
    return "fine" if held.numel() else ""


def test_two_gigabytes_are_too_much() -> None:
    found = ended(grows)
    assert found.how == "failed" and "1 GB of memory" in found.why, told(found)


def test_what_others_hold_hides_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "BYTES", 128 << 20)
    held = torch.ones(1 << 27)  # 512 MB
    # As pages of libraries on a tmpfs count, of which a child has none yet.
    shared = mmap.mmap(-1, 1 << 29)
    shared.write(bytes(1 << 29))
    other = os.fork()
    if other == 0:
        time.sleep(60)
        os._exit(0)
    gc.disable()
    garbage = [held]
    garbage.append(garbage)  # pyright: ignore
    del held, garbage
    try:
        found = ended(collects_and_grows)
        assert "of memory" in found.why, told(found)
    finally:
        gc.enable()
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        shared.close()


def shares(seed: int, folder: Path) -> str:
    held = mmap.mmap(-1, 1 << 28)
    held.write(bytes(1 << 28))
    time.sleep(8)
    return "fine"


def test_shared_memory_counts(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "BYTES", 192 << 20)
    found = ended(shares)
    assert "of memory" in found.why, told(found)


def frees_and_grows(seed: int, folder: Path) -> str:
    piece = bytearray(100_000)
    del piece  # so much at once makes glibc give back what lay free before
    held = torch.ones(1 << 26)  # 256 MB
    time.sleep(8)
    return "fine" if held.numel() else ""


@pytest.mark.skipif(not sandbox.trims(), reason="another C library")
def test_what_the_heap_gives_back_hides_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "BYTES", 128 << 20)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    # Small ones, which glibc keeps when they are freed.
    pieces = [libc.malloc(100) for _ in range(1_600_000)]
    for piece in pieces:
        libc.free(piece)
    found = ended(frees_and_grows)
    assert "of memory" in found.why, told(found)
