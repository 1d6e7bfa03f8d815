"""The three streams that a program begins with, there where whoever started this one had closed them (`>&-`).

Otherwise the next file that is opened becomes one of them, and what libraries print goes into it.  This module imports
nothing of the others: it comes first.
"""

import os
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_closed() -> None:
    """Closed ones of the descriptors 0, 1 and 2 lead nowhere (os.devnull), and so do streams of `sys` that are None."""
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
