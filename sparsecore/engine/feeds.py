"""The batches of a run, one a step: made by the device itself where the data lies there, else brought to it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..batches import Batch, DataEnded, EpochBatches, Numbered, size_of, trainable
from ..data import Batches

Fed = tuple[Batch, Tensor | None]  # a batch, and the numbers of its samples where they have some


class Feed(ABC):
    """Where a step finds its batch.

    `move_on` is the host's part, between steps; `batch` belongs to the step, and is on the device alone as long
    as `move_on` says so: a graph may hold it.
    """

    device: torch.device
    epoch = 0
    done = 0  # batches of the epoch that have been asked for

    @abstractmethod
    def begin(self, epoch: int, first: int = 0) -> None:
        """Epoch `epoch`, from its batch `first` on."""

    @abstractmethod
    def move_on(self) -> bool:
        """To the next batch; whether it is one of the usual shape.  Errors: DataEnded."""

    @abstractmethod
    def batch(self) -> Fed:
        """The present batch."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Samples in the present batch."""

    @abstractmethod
    def present(self) -> Batch:
        """The present batch once more, in memory that no graph writes to."""

    def tensors(self) -> list[Tensor]:
        """What `batch` changes."""
        return []

    held = False  # whether batches of the usual shape come in the same memory

    def hold(self) -> None:
        """They do from here on."""
        self.held = True


def feed_of(batches: EpochBatches, device: torch.device) -> Feed:
    """The feed that suits the batches: resident where all pixels lie on the device that computes."""
    if isinstance(batches, Batches) and isinstance(batches.images, Tensor):
        if batches.images.device == device:
            return Resident(batches)
    return Loaded(batches, device)


class Resident(Feed):
    """An epoch whose batches the device makes alone: the order lies there, and a cursor moves over it."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.device = batches, batches.images.device  # type: ignore[union-attr]
        count, size = len(batches.labels), batches.batch_size
        self.full = count // size  # batches of full size
        self.order = torch.zeros(count, dtype=torch.int64, device=batches.device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=batches.device)
        self.moves: list[Tensor] | None = None

    def begin(self, epoch: int, first: int = 0) -> None:
        """The epoch's order and augmentation, into the same memory as the last one's."""
        self.epoch, self.done = epoch, first
        order, moves = self.batches.plan(epoch)
        self.order.copy_(order)
        self.cursor.fill_(first)
        if moves is None:
            return
        if self.moves is None:
            self.moves = [m.to(self.order.device).clone() for m in moves]
        for mine, m in zip(self.moves, moves, strict=True):
            mine.copy_(m)

    def move_on(self) -> bool:
        if self.done >= len(self.batches):
            raise DataEnded(self.epoch, self.done, len(self.batches))
        self.done += 1
        return self.done <= self.full

    def batch(self) -> Fed:
        if self.done > self.full:
            return self._at(self.done - 1)
        rows, *moves = (self._under_cursor(t) for t in (self.order, *(self.moves or ())))
        # Around its end: a graph is tried out a few times before it is captured.
        self.cursor.add_(1).remainder_(self.full)
        return self.batches.take(rows, moves or None), rows

    def _under_cursor(self, t: Tensor) -> Tensor:
        size = self.batches.batch_size
        return t[: self.full * size].view(self.full, size).index_select(0, self.cursor)[0]

    def _at(self, index: int) -> Fed:
        size = self.batches.batch_size
        part = slice(index * size, (index + 1) * size)
        rows = self.order[part]
        moves = None if self.moves is None else [m[part] for m in self.moves]
        return self.batches.take(rows, moves), rows

    @property
    def size(self) -> int:
        batch = self.batches.batch_size
        return batch if self.done <= self.full else len(self.order) - self.full * batch

    def present(self) -> Batch:
        return self._at(self.done - 1)[0]

    def tensors(self) -> list[Tensor]:
        return [self.cursor]


class Given(Feed):
    """Batches that somebody else brings, one by one, into the same memory where a graph wants that."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.now: Fed | None = None
        self.memory: list[Any] | None = None  # tensors, and what a batch has beside them
        self.spec: TreeSpec | None = None

    def put(self, fed: Fed) -> bool:
        """Makes a batch the present one; whether it is of the usual shape, which is the first one's."""
        given, spec = tree_flatten(fed)
        if self.memory is None:  # strides too: it is what a graph will read
            self.memory = [
                torch.empty_like(t, device=self.device) if isinstance(t, Tensor) else t
                for t in given
            ]
            self.spec = spec
        usual = spec == self.spec and all(map(_alike, given, self.memory))
        if usual and self.held:
            for t, mine in zip(given, self.memory, strict=True):
                if isinstance(t, Tensor) and t is not mine:
                    mine.copy_(t, non_blocking=True)
            given = self.memory
        else:
            given = [
                trainable(t).to(self.device, non_blocking=True) if isinstance(t, Tensor) else t
                for t in given
            ]
        self.now = tree_unflatten(given, spec)
        return usual

    def begin(self, epoch: int, first: int = 0) -> None:
        self.epoch, self.done = epoch, first

    def move_on(self) -> bool:
        assert self.now is not None
        return self.put(self.now)

    def batch(self) -> Fed:
        assert self.now is not None
        return self.now

    @property
    def size(self) -> int:
        return size_of(self.present())

    def present(self) -> Batch:
        return self.batch()[0]


class Loaded(Given):
    """Batches of any kind, as they come."""

    def __init__(self, batches: EpochBatches, device: torch.device) -> None:
        super().__init__(device)
        self.batches = batches

    def begin(self, epoch: int, first: int = 0) -> None:
        super().begin(epoch, first)
        order = self.batches.order(epoch) if isinstance(self.batches, Numbered) else None
        self.iterator = self._numbered(epoch, order)
        for skipped in islice(self.iterator, first):
            if (
                self.memory is None
            ):  # an epoch's first batch is of the usual shape, its last may not be
                self.put(skipped)

    def _numbered(self, epoch: int, order: Tensor | None) -> Iterator[Fed]:
        start = 0
        for batch in self.batches.epoch(epoch):
            stop = start + size_of(batch)
            yield batch, None if order is None else order[start:stop]
            start = stop

    def move_on(self) -> bool:
        following = next(self.iterator, None)
        if following is None:
            raise DataEnded(self.epoch, self.done, len(self.batches))
        self.done += 1
        return self.put(following)


def _alike(t: Any, memory: Any) -> bool:
    if not isinstance(t, Tensor) or not isinstance(memory, Tensor):
        return type(t) is type(memory) and t == memory
    return t.shape == memory.shape and t.dtype == memory.dtype
