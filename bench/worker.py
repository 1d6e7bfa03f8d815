"""Runs cases in one process and notes how each goes: `python -m bench.worker MODULE SETTING`, stages by stdin.

`supervise` starts it, and starts another when it dies.  An error after which the GPU cannot be used ends the
process, since every other case would fail of it.
"""

import gc
import importlib
import os
import sys
import traceback
from time import perf_counter

import torch

from .measure import say
from .rows import Rows, path_of
from .search_suite import run_one
from .stages import Journal, Measured, Setting


def usable() -> bool:
    """Whether this process can still use its GPU, if it has begun to."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # an illegal access stays until the process ends
        return False
    return True


def brief(error: BaseException) -> str:
    """The kind of an error and the first lines of what it says."""
    said = "\n".join(str(error).strip().splitlines()[:4])
    return f"{type(error).__name__}: {said}"[:500]


def run(stage: Measured, setting: Setting) -> None:
    journal, device = Journal(setting.out), torch.device(setting.device)
    rows = Rows(path_of(setting.out, device, stage.suite), stage.suite, device, fresh=False)
    done = journal.ended(stage.name)
    for work in stage.work:
        if work.name in done:
            continue
        where = {"stage": stage.name, "case": work.name}
        journal.add("begin", **where, file=rows.path.name, rows=len(rows.rows))
        say(f"== {stage.name}: {work.name}")
        start, problem = perf_counter(), ""
        try:
            run_one(work, rows, device)
        except Exception as error:
            traceback.print_exc()
            problem = brief(error)
        seconds = round(perf_counter() - start, 1)
        if not problem:
            journal.add("passed", **where, seconds=seconds)
            continue
        journal.add("failed", **where, seconds=seconds, reason=problem)
        if not usable():
            say("the GPU cannot be used any more: this process ends")
            os._exit(1)
        gc.collect()


def main(module: str, text: str) -> None:
    setting = Setting.of(text)
    stages = {stage.name: stage for stage in importlib.import_module(module).stages(setting)}
    for line in sys.stdin:
        run(stages[line.strip()], setting)


if __name__ == "__main__":
    main(*sys.argv[1:])
