"""The stages of `make gpu` and one that goes wrong in every way: `python -m tests.gpu_stages OUT CACHE`."""

import ctypes
import functools
import sys
from pathlib import Path
from time import sleep

import torch

from bench import evidence, supervise
from bench.rows import Rows
from bench.search_suite import Work
from bench.stages import Measured, Setting, Stage

COMMIT = "0123abc"


def _row(rows: Rows, name: str) -> None:
    rows.add("injected", name, "eager", "time", "ms", "1")


def _well(rows: Rows) -> None:
    _row(rows, "well")


def _fails(rows: Rows) -> None:
    """And leaves its process as an illegal access leaves the GPU."""
    _row(rows, "fails")
    vars(sys.modules["__main__"]).update(usable=lambda: False)
    raise AssertionError("expected 1\ngot 2")


def _crashes(rows: Rows) -> None:
    _row(rows, "crashes")
    ctypes.string_at(0)


def _hangs(rows: Rows) -> None:
    _row(rows, "hangs")
    sleep(1000)


def stages(setting: Setting) -> list[Stage]:
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # no machine code
    names = {"crashes": _crashes, "hangs": _hangs, "well": _well, "fails": _fails}
    work = [Work("injected", name, run) for name, run in names.items()]
    injected = Measured("injected", 0.5, 5.0, suite="injected", work=work)
    *first, layers, last = evidence.stages(setting)
    return [*first, injected, layers, last]


if __name__ == "__main__":
    out, cache = map(Path, sys.argv[1:])
    setting = Setting(out, "cpu", quick=True)
    budget = 600.0
    sys.exit(supervise.run("tests.gpu_stages", setting, budget=budget, commit=COMMIT, cache=cache))
