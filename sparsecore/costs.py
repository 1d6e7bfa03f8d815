"""What a layer's products should cost: bytes and operations over what the machine was seen to do.

A model, to leave out what cannot win and to be compared with what was measured; it chooses nothing alone.
Letters: T tokens or output pixels, N outputs, K inputs times taps, nnz kept weights.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from . import capture
from .kernels import Layer

# Share of the dense product's peak that formats were seen to reach (CPU: two cores with AVX-512).
_BAGS, _SAMPLED = 0.6, 0.3
_CACHE_RATE = 1.4  # on a GPU: level-2 bandwidth over the memory's
_BLOCKED = 0.8  # block products over dense ones, tensor cores busy


class Times(NamedTuple):
    """Milliseconds of forward, dX and dW."""

    forward: float
    dx: float
    dw: float

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class Machine:
    """What a device does in a second: operations of a dense product, bytes, and updates of AdamW."""

    flops: float
    bandwidth: float
    updates: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> "Machine":
        """By a product of 1,024 (on a GPU 8,192) squared, a copy, and a fused AdamW step."""
        big = device.type == "cuda"
        side, size = (8192, 1 << 26) if big else (1024, 1 << 24)
        a = torch.ones(side, side, device=device, dtype=dtype)
        source = torch.ones(size, device=device)
        target = torch.empty_like(source)
        parameter = torch.nn.Parameter(torch.zeros(size, device=device))
        parameter.grad = source
        adam = torch.optim.AdamW([parameter], fused=True)
        return cls(
            2 * side**3 / seconds(lambda: a @ a, device),
            2 * 4 * size / seconds(lambda: target.copy_(source), device),
            size / seconds(adam.step, device),
        )


def seconds(
    step: Callable[[], object],
    device: torch.device,
    budget: float = 0.03,
    *,
    captured: bool = False,
) -> float:
    """The shortest time of a step in 3 to 20 runs, about `budget` seconds of them: other programs only add to it.

    captured: as a CUDA graph, which takes what the kernels take and nothing for launching them.
    """
    step()
    run, steps = step, 1
    turns = 5 if device.type == "cuda" else 1  # the host runs ahead, as in training
    if captured:
        # Some steps in one graph, since launching a graph takes longer than a small product.
        turns, steps = 1, max(1, min(20, int(budget / 3 / _timed(step, 1, device))))
        run = capture.Captured(partial(_repeat, step, steps), device=device)
    found: list[float] = []
    while len(found) < 3 or (len(found) < 20 and sum(found) < budget):
        found.append(_timed(run, turns, device) / steps)
    return min(found)


def _timed(run: Callable[[], object], turns: int, device: torch.device) -> float:
    """Seconds of a run, several in turn."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    _repeat(run, turns)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (perf_counter() - start) / turns


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def rounds(budget: float) -> Iterator[int]:
    """Two to eight rounds of measuring all candidates in turn, about `budget` seconds of them.

    What other programs do for a second should not decide.
    """
    start = perf_counter()
    for number in range(8):
        if number >= 2 and perf_counter() - start > budget:
            return
        yield number


class Facts(NamedTuple):
    """A mask's counts that products depend on."""

    nnz: int
    live_rows: int
    live_columns: int

    @classmethod
    def of(cls, mask: Tensor) -> "Facts":
        plane = mask.flatten(2).any(2) if mask.ndim > 2 else mask
        return cls(int(mask.sum()), int(plane.any(1).sum()), int(plane.any(0).sum()))


def stored(mask: Tensor, h: int, w: int) -> int:
    """Weights that h x w blocks (per tap) store for a mask, their padding included."""
    n, k = mask.shape[:2]
    plane = mask.reshape(n, k, -1).permute(2, 0, 1).float()
    pooled = torch.nn.functional.max_pool2d(plane[:, None], (h, w), ceil_mode=True)
    return int(pooled.sum()) * h * w


def predicted(
    format: str, mask: Tensor, facts: Facts, layer: Layer, tokens: int, size: int, machine: Machine
) -> Times:
    """Milliseconds of a format's products for activations of `size` bytes an element."""
    n, k = layer.shape[0], math.prod(layer.shape[1:])
    inputs = layer.inputs
    traffic = size * tokens * (inputs + n)  # activations in and out, once
    kind, _, option = format.partition(":")

    def time(weights: float, efficiency: float, extra: float = 0.0) -> float:
        work = 2 * tokens * weights / (efficiency * machine.flops)
        return 1e3 * max(work, (traffic + extra) / machine.bandwidth)

    if kind in ("dense", "mask"):
        passes = 9 * n * k if kind == "mask" else 0  # weight, mask, product
        return Times(*(time(n * k, 1.0) + 1e3 * p / machine.bandwidth for p in (passes, 0, passes)))
    if kind == "state":
        moved = 1e3 * facts.nnz * (8 + size) / machine.bandwidth
        return Times(*[time(n * k, 1.0) + moved] * 3)
    if kind == "csr":
        return Times(time(facts.nnz, _BAGS), time(facts.nnz, _BAGS), time(facts.nnz, _SAMPLED))
    if kind == "compact":
        share = facts.live_rows * facts.live_columns / (n * layer.shape[1])
        moved = 2 * size * tokens * (facts.live_rows + facts.live_columns)
        return Times(*[time(share * n * k, 1.0, moved)] * 3)
    h, w = (int(side) for side in option.split("x"))
    kept = stored(mask, h, w)
    # Every stored block reads its part of the activations again, from the level-2 cache.
    again = size * tokens * kept * (1 / h + 1 / max(w, 64)) / _CACHE_RATE
    return Times(*[time(kept, _BLOCKED, again)] * 3)
