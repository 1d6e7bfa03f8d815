"""Full disks: the command ends by one line, and the same command again, with room, loses nothing."""

import contextlib
import ctypes
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from .faults import Changes, full
from .judge import Failure, contents
from .sandbox import Run
from .works import WORKS, Passes, check_again, drawn, reference_of

_NEWNS, _REMOUNT, _PRIVATE = 0x20000, 32, 1 << 18 | 1 << 14


_NEEDS_ROOM = ("open", "os.rename", "os.mkdir", "fsync")  # to remove a file does not


def filling(cache: Path) -> Run:
    """One of the works on a disk that gets full."""

    def run(seed: int, folder: Path) -> str:
        rng = Random(seed)
        name = drawn(rng)
        known = reference_of(name, cache)
        print(name)
        way = rng.choice(["refused once", "refused from then on", "small files", "small disk"])
        with contextlib.ExitStack() as stack:
            disk = stack.enter_context(small_disk(folder)) if way == "small disk" else None
            if way == "small disk" and disk is None:  # not ours to mount
                way = "small files"
            shutil.copytree(cache / "inputs" / name, folder, dirs_exist_ok=True)
            before, passes, changes = contents(folder), Passes(), Changes(folder)
            print(way)
            if disk is not None:
                disk.limit(sum(map(len, before.values())) + rng.randrange(2 * known.total))
                how = WORKS[name].run()
                disk.limit(1 << 28)
            elif way == "small files":
                with small_files(rng.choice([0, 1, 512, 4096, rng.randrange(known.largest)])):
                    how = WORKS[name].run()
            else:
                at, lasts = 1 + rng.randrange(known.changes), way == "refused from then on"
                with changes.fault(full, at, only=_NEEDS_ROOM, lasts=lasts):
                    how = WORKS[name].run()
            now = contents(folder)
            if lost := [n for n in before if now.get(n) != before[n] and n not in known.names]:
                raise Failure(f"changed or lost: {lost}")
            if how == "fine" or WORKS[name].saved():  # what could not be written was not needed
                passes.forget()
            check_again(name, cache, passes, faults=1)
            return how

    return run


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file can get larger than so many bytes (Python ignores the signal of it)."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


class Disk:
    """A file system in memory at a folder."""

    def __init__(self, libc: ctypes.CDLL, folder: Path) -> None:
        self.libc, self.folder = libc, os.fsencode(folder)

    def mount(self, flags: int, options: str) -> bool:
        return self.libc.mount(b"none", self.folder, b"tmpfs", flags, options.encode()) == 0

    def limit(self, size: int) -> None:
        if not self.mount(_REMOUNT, f"size={max(size, 4096)}"):
            raise Failure("the disk could not be made smaller")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk | None]:
    """A disk of the process's own at the folder; None where that needs rights that are not there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNS) != 0 or libc.mount(b"none", b"/", None, _PRIVATE, None) != 0:
        yield None
        return
    disk = Disk(libc, folder)
    if not disk.mount(0, "size=256m"):
        yield None
        return
    os.chdir(folder)  # which was what lies below
    yield disk
    os.chdir("/")
    libc.umount2(disk.folder, 2)
