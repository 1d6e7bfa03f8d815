"""The engine suite: a dense training step in every way that the engine can launch it, and what compiling takes."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from . import measure
from .rows import Rows, add_speed_up, add_times, number
from .search_suite import Work, run_all
from .ticket_cases import DENSE, TrainCase
from .ticket_steps import Reference, make
from .ticket_training import tasks_of


def _case(model: str, shape: tuple[int, ...], batch: int, seconds: float = 60.0) -> TrainCase:
    layouts = (False,) if model.startswith("lenet") else (False, True)
    return TrainCase(
        "engine", model, model, shape, batch, (DENSE,), layouts=layouts, seconds=seconds
    )


CASES = (
    _case("lenet-300-100", (1, 28, 28), 128, 10.0),
    _case("resnet-20", (3, 32, 32), 128),
    _case("vit-small", (3, 32, 32), 64),
)
QUICK_CASES = (_case("lenet-300-100", (1, 8, 8), 16, 0.0), _case("resnet-20", (3, 8, 8), 8, 0.0))


def engine_suite(rows: Rows, device: torch.device, *, quick: bool = False) -> int:
    """Measures every case; returns how many failed."""
    cases = QUICK_CASES if quick else CASES
    work = [Work("engine", c.name, lambda rows, c=c: ways_of(c, rows, device)) for c in cases]
    return run_all(work, rows, device)


def ways_of(case: TrainCase, rows: Rows, device: torch.device) -> None:
    """Times of all ways in turn, compiled as if for the first time.

    Errors: WrongResult for one that computes something else.
    """
    from torch._inductor.utils import fresh_cache  # seconds, which other commands need not wait

    torch._dynamo.reset()
    (task,) = tasks_of(case, device, Path()).values()
    task = replace(task, masks={})
    reference = Reference(task)
    with fresh_cache(), ExitStack() as scopes:
        engines = {}
        for way in measure.ways(device, case.layouts):
            step, start = make(DENSE, task), perf_counter()
            engine = scopes.enter_context(step.launched(way))
            reference.require(f"{case.name}, {way}", step, engine)
            if way.compiled:
                seconds = number(perf_counter() - start)
                rows.add(case.name, DENSE, str(way), "compile time", "s", seconds)
            engines[str(way)] = engine
        found = measure.whole_steps(engines, device, case.seconds)
    for mode, spread in found.items():
        add_times(rows, case.name, mode, {DENSE: spread})
        add_speed_up(rows, case.name, DENSE, mode, "eager", found["eager"], spread)
