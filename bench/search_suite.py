"""The search suite: what a step of the search costs, from single launches to a whole network."""

import sys
import traceback
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

from .rows import Rows
from .search_cases import FULL, QUICK
from .search_layers import layer_step
from .search_networks import network
from .search_ops import ceilings, op
from .search_strategies import strategy

# What matters most comes first, so that a run that is cut short has it.
PARTS = ("layers", "networks", "ops", "strategies")


def search_suite(
    rows: Rows, device: torch.device, *, quick: bool = False, parts: Sequence[str] = PARTS
) -> int:
    """Measures every case of the named parts; returns how many failed.

    A case that computes something else than autograd does is not timed; the others are all the same.
    """
    cases = QUICK if quick else FULL
    work: list[tuple[str, Callable[[], Any]]] = []
    # Baselines draw from the global generator, as published code does; it is put back.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bandwidth = ceilings(cases, rows, device)
        if "layers" in parts:
            for layer in cases.layers:
                work.append((layer.name, lambda c=layer: layer_step(c, cases, rows, device)))
        if "networks" in parts:
            work.append(("networks", lambda: network(cases, rows, device)))
        if "ops" in parts:
            for one in cases.ops:
                name = f"{one.name}, {one.provider}"
                work.append((name, lambda c=one: op(c, cases, rows, device, bandwidth)))
        if "strategies" in parts:
            for way in cases.strategies:
                work.append((way.name, lambda c=way: strategy(c, cases, rows, device)))
        return run_all(work, device)


def run_all(work: Sequence[tuple[str, Callable[[], Any]]], device: torch.device) -> int:
    """Runs one thing after another and says how it goes; returns how many failed."""
    failed, start = 0, perf_counter()
    for done, (name, measure) in enumerate(work, 1):
        say(f"[{perf_counter() - start:4.0f} s, {done}/{len(work)}] {name}")
        try:
            measure()
        except Exception as error:  # what breaks one case leaves the others
            failed += 1
            say(f"FAILED {name}: {type(error).__name__}: {error}")
            traceback.print_exc(file=sys.stderr)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
