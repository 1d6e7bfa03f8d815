"""Time and memory of a step, after it has been shown to compute the right thing."""

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Spread(NamedTuple):
    """Seconds: the median and the 20 % and 80 % quantiles."""

    median: float
    q20: float
    q80: float


def times(
    steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3
) -> dict[str, Spread]:
    """Times the steps in turn, A B C A B C ..., so that a drifting machine slows all alike."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seen[name].append(perf_counter() - start)
    return {name: _spread(values) for name, values in seen.items()}


def _spread(values: list[float]) -> Spread:
    cuts = statistics.quantiles(values, n=5)
    return Spread(statistics.median(values), cuts[0], cuts[3])


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
