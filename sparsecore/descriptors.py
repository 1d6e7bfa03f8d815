"""What a process has open: by which names, and the three streams that a program begins with.

This module imports nothing of the others: it comes first.
"""

import os
import sys
from pathlib import Path

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_FDS = ("/dev/fd", "/proc/self/fd", "/proc/thread-self/fd")


def open_closed() -> None:
    """Closed ones of the descriptors 0, 1 and 2 (`>&-`) lead nowhere (os.devnull), and so do streams of `sys` that are
    None.  Otherwise the next file that is opened becomes one of them, and what libraries print goes into it.
    """
    for descriptor in range(3):  # all of them, before a stream takes the place of the next
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
            os.set_inheritable(descriptor, True)  # as those of any program
    for name, mode in _STREAMS:
        if (
            getattr(sys, name) is None
        ):  # one of its own: by now the descriptor may be somebody's file
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  for as long as the process


def descriptor_of(path: Path) -> int | None:
    """The descriptor that it is or links to, of what this process has open (behind it may lie a file of others); -1 for
    a name that is none.
    """
    numbers = {name: str(number) for number, (name, _) in enumerate(_STREAMS)}
    for _ in range(40):  # as many links as Linux follows
        folder, _, name = str(path.absolute()).rpartition("/")
        if folder in (*_FDS, f"/proc/{os.getpid()}/fd") or (folder == "/dev" and name in numbers):
            name = numbers.get(name, name)
            return int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None
