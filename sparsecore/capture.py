"""A step as one CUDA graph: recorded once, replayed ever after.

A graph remembers launches and addresses.  No Python runs in a replay, and no tensor is looked up: what is
allocated during the recording lies in the graph's own memory, where kernels of the same graph write over each
other, and everything else must be where it was.  So a step that is captured reads nothing that it has
allocated before it writes it, keeps its state in tensors that stay, and never asks for a value.
`tests/replay.py` proves that of a step without a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .process import seeded


class Captured:
    """`run` as a graph: calling it replays.

    `run` is called three times before, so that all that it needs is compiled, chosen and allocated.

    Args:
        state: what those calls change; put back afterwards.
        keep: what must live as long as the graph, beside what `run` itself refers to.
        generators: random generators that `run` draws from, beside the default one.
        device: where `run` launches, the present one by default.
    """

    def __init__(
        self,
        run: Callable[[], Any],
        state: Sequence[Tensor] = (),
        *,
        keep: Any = None,
        generators: Sequence[torch.Generator] = (),
        device: torch.device | None = None,
    ) -> None:
        self.kept = run, keep
        before = [t.clone() for t in state]
        with aside(device):
            for _ in range(3):
                run()
        with torch.no_grad():
            for t, value in zip(state, before, strict=True):
                t.copy_(value)
        self.replay = record(run, generators, device)

    def __call__(self) -> None:
        self.replay()


@contextmanager
def aside(device: torch.device | None) -> Iterator[None]:
    """On a stream of its own, as what is to be captured has to be tried out; random numbers are drawn again."""
    with torch.cuda.device(device), seeded(devices=[_current()]):
        stream, main = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            yield
        main.wait_stream(stream)


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def record(
    run: Callable[[], Any], generators: Sequence[torch.Generator], device: torch.device | None
) -> Callable[[], Any]:
    """The replay of what one call of `run` launches; nothing is computed yet."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # A stream of its own, since the default one is one device's; threads of loaders go on with their own work.
        stream = torch.cuda.Stream()
        with (
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            kernels.one_graph(),
        ):
            run()
    return graph.replay


def possible_on(device: torch.device) -> bool:
    """Whether there are graphs: what stands in for kernels without Triton reads numbers on the host."""
    return device.type == "cuda" and kernels.MISSING is None


def side_stream(device: torch.device) -> Any:
    """A stream for work beside the main one's; None where there are none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
