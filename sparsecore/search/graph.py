"""The batches of a search, and its steps as one CUDA graph each: captured once, replayed ever after.

On a GPU, with data that lies there, a step is one launch: which samples come next, their pixels, the
gated weights, both networks, the backward, balance and Adam are all in the graph.  Elsewhere the same
functions run one by one, with the same numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import capture
from ..batches import Batch, DataEnded, EpochBatches, Numbered
from ..data import Batches
from .steps import FusedStep, SearchStep


class Feed:
    """Gives a step its batches, one call a step.

    Args:
        graph: whether steps may be captured; it takes a fused step, a GPU and `data.Batches` there.
    """

    def __init__(self, step: SearchStep, batches: EpochBatches, graph: bool) -> None:
        self.step, self.batches = step, batches
        self.resident: Resident | None = None
        if isinstance(batches, Batches) and isinstance(batches.images, Tensor):
            self.resident = Resident(batches) if isinstance(step, FusedStep) else None
        self.graph = graph and self.resident is not None and capture.possible_on(step.device)
        self.captured: dict[
            bool, capture.Captured
        ] = {}  # by whether the teacher is remembered by now

    def begin(self, epoch: int) -> None:
        """Epoch `epoch` from its first batch."""
        order = self.batches.order(epoch) if isinstance(self.batches, Numbered) else None
        self.step.begin_epoch(None if order is None else len(order))
        self.epoch, self.done = epoch, 0
        if self.resident is not None:
            self.resident.begin(epoch)
        else:
            self.iterator = self._numbered(epoch, order)

    def _numbered(self, epoch: int, order: Tensor | None) -> Iterator[tuple[Batch, Tensor | None]]:
        start = 0
        for batch in self.batches.epoch(epoch):
            stop = start + len(batch[1])
            yield batch, None if order is None else order[start:stop].to(self.step.device)
            start = stop

    def __call__(self) -> None:
        """One step on the next batch."""
        resident = self.resident
        if resident is None:
            following = next(self.iterator, None)
            if following is None:
                raise DataEnded(self.epoch, self.done, len(self.batches))
            self.step(*following)
        elif self.done == resident.full:
            self.step(*resident.rest())
        elif self.graph:
            self._replay(resident)
        else:
            self.step(*resident.next_())
        self.done += 1

    def _replay(self, resident: "Resident") -> None:
        step = self.step
        memory = step.net.memory
        known = memory is not None and memory.complete
        if known not in self.captured:
            step.net.side = capture.side_stream(step.device)
            state = [*step.tensors().values(), step.total, resident.cursor]
            # A graph that held this object, which holds it, would stay until memory is looked through.
            run = lambda: step(*resident.next_())  # noqa: E731
            self.captured[known] = capture.Captured(run, state, keep=memory, device=step.device)
        self.captured[known]()


class Resident:
    """An epoch whose batches the device makes alone: the order lies there, and a cursor moves over it."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        count, device = len(batches.labels), batches.device
        self.full = count // batches.batch_size  # batches of full size
        self.order = torch.zeros(count, dtype=torch.int64, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.lanes = torch.arange(batches.batch_size, device=device)
        self.moves: list[Tensor] | None = None

    def begin(self, epoch: int) -> None:
        """The epoch's order and augmentation, into the same memory as the last one's."""
        order, moves = self.batches.plan(epoch)
        self.order.copy_(order)
        self.cursor.zero_()
        if moves is None:
            return
        if self.moves is None:
            self.moves = [m.to(self.order.device).clone() for m in moves]
        for mine, m in zip(self.moves, moves, strict=True):
            mine.copy_(m)

    def next_(self) -> tuple[Batch, Tensor]:
        """The next full batch and its samples' numbers; moves the cursor."""
        # Modulo: a graph is tried out a few times before it is captured.
        at = (self.cursor + self.lanes) % len(self.order)
        rows = self.order.index_select(0, at)
        self.cursor += len(self.lanes)
        moves = None if self.moves is None else [m.index_select(0, at) for m in self.moves]
        return self.batches.take(rows, moves), rows

    def rest(self) -> tuple[Batch, Tensor]:
        """The last, smaller batch."""
        start = self.full * self.batches.batch_size
        rows = self.order[start:]
        moves = None if self.moves is None else [m[start:] for m in self.moves]
        return self.batches.take(rows, moves), rows
