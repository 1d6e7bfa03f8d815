"""The step suite: a search step against the dense step of the same model and batch, and plain autograd."""

import torch

from .cases import QUICK_STEP_CASES, STEP_CASES, StepBench, StepCase
from .measure import large_allocations, times
from .rows import Rows
from .search_suite import Work, run_all


def step_suite(rows: Rows, device: torch.device, *, quick: bool = False) -> int:
    """Measures every case; returns how many failed."""
    cases = QUICK_STEP_CASES if quick else STEP_CASES
    work = [Work("step", c.name, lambda rows, c=c: step(c, rows, device)) for c in cases]
    return run_all(work, rows, device)


def step(case: StepCase, rows: Rows, device: torch.device) -> None:
    """Times of all providers, over the dense step's and plain autograd's, and what they allocate."""
    bench = StepBench(case, device)
    bench.check()
    bench.prepare_plain()
    mode = "full step"
    spreads = times(bench.providers(), case.rounds)
    dense, plain = (
        spreads[name].median for name in ("dense forward-backward", "plain autograd search step")
    )
    for provider, spread in spreads.items():
        found = (f"{1e3 * seconds:.3f}" for seconds in spread)
        rows.add(case.name, provider, mode, "time", "ms", *found)
        ratio = f"{spread.median / dense:.2f}"
        rows.add(case.name, provider, mode, "time over dense", "x", ratio)
        ratio = f"{plain / spread.median:.2f}"
        rows.add(case.name, provider, mode, "speed-up over eager", "x", ratio)
    if "search step, later epochs" in spreads:
        parts = [("search step", 1), ("search step, later epochs", 9)]
        mean = sum(spreads[name].median * n for name, n in parts) / 10
        provider = "search step, mean of 10 epochs"
        rows.add(case.name, provider, mode, "time over dense", "x", f"{mean / dense:.2f}")
        rows.add(case.name, provider, mode, "speed-up over eager", "x", f"{plain / mean:.2f}")
    largest = max(w.numel() for w in bench.weights)
    layers = sum(w.numel() == largest for w in bench.weights)
    for provider, run in bench.providers().items():
        count = large_allocations(run, largest) / layers
        metric = "allocations of the largest weight's size"
        rows.add(case.name, provider, mode, metric, "a layer", f"{count:g}")
    bench.close()
