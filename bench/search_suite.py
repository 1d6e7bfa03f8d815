"""The search suite: what a step of the search costs, from single launches to a whole network."""

import sys
import traceback
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .measure import say
from .rows import Rows
from .search_cases import FULL, QUICK
from .search_layers import layer_step
from .search_networks import network
from .search_ops import ceilings, op
from .search_strategies import strategy

# What matters most comes first, so that a run that is cut short has it.
PARTS = ("layers", "networks", "ops", "strategies")


class Work(NamedTuple):
    """One case of a suite: the part it belongs to, its name, and what measures it into rows."""

    part: str
    name: str
    measure: Callable[[Rows], Any]


def search_work(device: torch.device, *, quick: bool = False) -> list[Work]:
    """Every case of the suite, behind the ceilings that ops are measured against."""
    cases = QUICK if quick else FULL
    work = [Work("ceilings", "ceilings", lambda rows: ceilings(cases, rows, device))]
    for layer in cases.layers:
        run = lambda rows, c=layer: layer_step(c, cases, rows, device)  # noqa: E731
        work.append(Work("layers", layer.name, run))
    for net in cases.networks:
        run = lambda rows, c=net: network(c, cases, rows, device)  # noqa: E731
        work.append(Work("networks", f"network/{net[0].name}", run))
    for one in cases.ops:
        run = lambda rows, c=one: op(c, cases, rows, device, ceilings(cases, rows, device))  # noqa: E731
        work.append(Work("ops", f"{one.name}, {one.provider}", run))
    for way in cases.strategies:
        run = lambda rows, c=way: strategy(c, cases, rows, device)  # noqa: E731
        work.append(Work("strategies", way.name, run))
    return work


def search_suite(
    rows: Rows, device: torch.device, *, quick: bool = False, parts: Sequence[str] = PARTS
) -> int:
    """Measures every case of the named parts; returns how many failed.

    A case that computes something else than autograd does is not timed; the others are all the same.
    """
    wanted = ("ceilings", *parts)
    work = [one for one in search_work(device, quick=quick) if one.part in wanted]
    return run_all(work, rows, device)


def run_one(work: Work, rows: Rows, device: torch.device) -> None:
    """Measures one case, and gives back the memory it took."""
    try:
        # Baselines draw from the global generator, as published code does; it is put back.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            work.measure(rows)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_all(work: Sequence[Work], rows: Rows, device: torch.device) -> int:
    """Runs one thing after another and says how it goes; returns how many failed."""
    failed, start = 0, perf_counter()
    for done, one in enumerate(work, 1):
        say(f"[{perf_counter() - start:4.0f} s, {done}/{len(work)}] {one.name}")
        try:
            run_one(one, rows, device)
        except Exception as error:  # what breaks one case leaves the others
            failed += 1
            say(f"FAILED {one.name}: {type(error).__name__}: {error}")
            traceback.print_exc(file=sys.stderr)
    return failed
