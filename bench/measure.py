"""Time and memory of a step, after it has been shown to compute the right thing."""

import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsecore import capture
from sparsecore.engine import Way
from sparsecore.engine.auto import COMPILES

from .rows import Rows, number

_FLUSHED = 256 << 20  # bytes written to empty a GPU's level-2 cache, several times its size
_AHEAD = 500_000  # clock cycles


class Spread(NamedTuple):
    """Seconds: the median and the 20 % and 80 % quantiles."""

    median: float
    q20: float
    q80: float


class WrongResult(AssertionError):
    """What was to be timed computes something else."""


# --- Is it right? -----------------------------------------------------------------------------------


def error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, in float64."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def require_as_exact(
    what: str, ours: Tensor, theirs: Tensor, exact: Tensor, *, slack: float = 2.0
) -> None:
    """Our error is at most `slack` times PyTorch's in the same dtype.  Errors: WrongResult."""
    mine, plain = error(ours, exact), error(theirs, exact)
    if not mine <= slack * plain + 1e-6:  # NaN is not
        raise WrongResult(
            f"{what}: expected an error of at most {slack} x {plain:.2e} (PyTorch's in the same "
            f"dtype) + 1e-6, got {mine:.2e}; nothing was timed"
        )


def require_close(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """A relative difference of at most `tolerance`.  Errors: WrongResult."""
    found = error(ours, theirs)
    if not found <= tolerance:
        raise WrongResult(
            f"{what}: expected a difference of at most {tolerance:.0e}, got {found:.2e}; nothing was timed"
        )


# --- How long does it take? -------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Something to time.

    Args:
        prepare: runs before each call and outside the measured time.
        cold: on a GPU, begin with an empty level-2 cache; otherwise several steps run back to back, as
            in a training loop, where the host runs ahead if it can.
        ahead: on a GPU, let the host run ahead of the clock by about 0.3 ms: the time of the kernels alone,
            for what takes the host longer to launch than the device to do.
    """

    step: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    cold: bool = False
    ahead: bool = False


def times(
    steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3
) -> dict[str, Spread]:
    """Host-clock times of the steps in turn, A B C A B C ..., so that a drifting machine slows all alike."""
    jobs = {name: Job(step) for name, step in steps.items()}
    return _in_turn(jobs, _host_seconds, dict.fromkeys(jobs, 1), rounds, warmup)


def times_within(
    steps: Mapping[str, Callable[[], Any]], budget: float, *, least: int = 3, most: int = 60
) -> dict[str, Spread]:
    """`times` of as many rounds as fit into about `budget` seconds, but at least `least`; no warm-up.

    A step that takes four times as long as the median one leaves after `least` rounds; the others go on.
    """
    seen: dict[str, list[float]] = {name: [] for name in steps}
    left, begin = dict(steps), perf_counter()
    for done in range(1, most + 1):
        for name, step in left.items():
            seen[name].append(_host_seconds(Job(step), 1))
        if done >= least and perf_counter() - begin > budget:
            break
        if done == least:
            longest = 4 * statistics.median(min(values) for values in seen.values())
            left = {name: step for name, step in left.items() if min(seen[name]) <= longest}
    return {name: spread_of(values) for name, values in seen.items()}


def timed(
    jobs: Mapping[str, Job], device: torch.device, *, rounds: int = 0, budget: float = 0.25
) -> dict[str, Spread]:
    """Times jobs in turn: by device events on a GPU, by the host's clock elsewhere.

    Args:
        rounds: measurements of each job; 0 takes about `budget` seconds for each, 10 to 100 measurements.
    """
    if device.type != "cuda":
        return _in_turn(jobs, _host_seconds, dict.fromkeys(jobs, 1), rounds or 10, warmup=1)
    scratch = torch.empty(_FLUSHED, dtype=torch.int8, device=device)
    clock = lambda job, repeats: _event_seconds(job, repeats, scratch)  # noqa: E731
    longest, repeats = 0.0, {}
    for name, job in jobs.items():
        for _ in range(3):  # compiles, chooses algorithms, allocates
            _call(job)
        torch.cuda.synchronize()
        once = min(clock(job, 1) for _ in range(3))
        repeats[name] = 1 if job.cold or job.prepare else max(1, min(10, round(2e-3 / once)))
        longest = max(longest, once * repeats[name])
    found = rounds or max(10, min(100, int(budget / longest)))
    return _in_turn(jobs, clock, repeats, found, warmup=0)


def whole_steps(
    steps: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float
) -> Mapping[str, Spread]:
    """Times in turn of steps that have been taken: on a GPU half a second for each, else about `seconds` for all."""
    if device.type == "cuda":
        return timed({name: Job(step) for name, step in steps.items()}, device, budget=0.5)
    return times_within(steps, seconds, least=3 if seconds else 2)


def _in_turn(
    jobs: Mapping[str, Job], clock: Callable[[Job, int], float], repeats: Mapping[str, int],
    rounds: int, warmup: int,
) -> dict[str, Spread]:  # fmt: skip
    for job in jobs.values():
        for _ in range(warmup):
            _call(job)
    seen: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seen[name].append(clock(job, repeats[name]))
    return {name: spread_of(values) for name, values in seen.items()}


def _call(job: Job) -> None:
    if job.prepare is not None:
        job.prepare()
    job.step()


def _host_seconds(job: Job, repeats: int) -> float:
    if job.prepare is not None:
        job.prepare()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(repeats):
        job.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (perf_counter() - start) / repeats


def _event_seconds(job: Job, repeats: int, scratch: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if job.prepare is not None:
        job.prepare()
    if job.cold:
        scratch.zero_()
    if job.ahead:
        torch.cuda._sleep(_AHEAD)
    start.record()
    for _ in range(repeats):
        job.step()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats


def spread_of(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")  # never beyond what was seen
    return Spread(statistics.median(values), cuts[0], cuts[3])


def modes(device: torch.device) -> tuple[str, ...]:
    """How a step is launched: operation by operation, and on a GPU also as one CUDA graph."""
    return ("eager", "graph") if capture.possible_on(device) else ("eager",)


def ways(
    device: torch.device, layouts: Sequence[bool] = (False,), *, compiled: bool = True
) -> list[Way]:
    """In which the engine can launch a step on a device: what is compiled comes last in each layout."""
    graphs = (False, True) if capture.possible_on(device) else (False,)
    compilers = (False, True) if compiled else (False,)
    return [Way(g, c, last) for last in layouts for c in compilers for g in graphs]


class Compiling:
    """The time that a case has for compiling: what may not end in it is left out, so that all else is measured.

    With what it times besides, a case is to fit a turn of a run in slices: what that cuts begins anew in the next.
    """

    def __init__(self, seconds: float = 120.0) -> None:
        self.left, self.longest = seconds, COMPILES

    def refused(self) -> str:
        """Why nothing more is compiled; empty while there is time."""
        if self.left >= self.longest:
            return ""
        left = max(self.left, 0)
        return f"compiling takes up to {self.longest:.0f} s, of which {left:.0f} s are left"

    def took(self, seconds: float) -> float:
        self.left -= seconds
        self.longest = max(self.longest, seconds)
        return seconds


def say(text: str) -> None:
    """How it goes."""
    print(text, file=sys.stderr, flush=True)


# --- How much memory does it take? ------------------------------------------------------------------


def peak_memory(
    build: Callable[[], Callable[[], Any]], device: torch.device
) -> tuple[Callable[[], Any], int | None]:
    """(the step that `build` makes, the most bytes that it and its state held); None without a GPU."""
    if device.type != "cuda":
        return build(), None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build()
    for _ in range(2):  # state that the first call makes is state, not a peak
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def add_peaks(
    rows: Rows, case: str, mode: str, steps: Mapping[str, Callable[[], Any]], device: torch.device
) -> None:
    """A row a provider: what a step holds at most beyond its state, which is there before."""
    for provider, step in steps.items():
        step()  # makes what is left of its state
        _, held = peak_memory(lambda step=step: step, device)
        if held is not None:
            size = number(held / 2**20)
            rows.add(case, provider, mode, "peak memory beyond state", "MiB", size)


def large_allocations(step: Callable[[], Any], numel: int) -> int:
    """How many tensors of at least `numel` elements a step allocates."""
    with _Allocations(numel) as seen:
        step()
    return seen.count


class _Allocations(TorchDispatchMode):
    """Counts results whose storage is none of the operation's arguments'."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.numel() >= self.numel and _storage(t) not in given:
                self.count += 1
        return result


def _storage(t: Tensor) -> Any:
    return t.untyped_storage()._cdata
