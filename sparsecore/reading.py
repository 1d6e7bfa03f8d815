"""Epochs read from what users have: something to iterate again, a function that makes an iterator, a stream."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any
from warnings import warn

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from .batches import Batch, kind_of, size_of
from .drawing import Drawing, sources_of
from .folders import DataWarning

NO_BATCHES = (
    "expected at least one, got none; look at the data's size, the batch size and drop_last"
)


def length_of(batches: Any) -> int | None:
    """None where it has none (a DataLoader of an IterableDataset says so when asked)."""
    if not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError:
        return None


class Adapter(ABC):
    """Batches by epoch of another kind of data.

    passing: whether what has been read is gone.
    endless: whether asking for the length would read.
    """

    passing = False
    endless = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def epoch(self, index: int) -> Iterator[Batch]: ...


class _Again(Adapter):
    """What can be read again and again, by an iterator of its own for each epoch.

    whole: whether batches past the length are an error.
    left_out: whether the last batch is not given.
    """

    told = False  # of batches past the length
    _says = "len(batches) says"
    _mend = "mend the length (an IterableDataset in several workers gives all that it has, and a last batch, in each)"

    def __init__(self, held: Any, whole: bool) -> None:
        self.whole, self.left_out = whole, False
        drawing = type(held) not in (list, tuple)  # which are data by themselves
        self.sources = sources_of(held) if drawing else []

    def _drawing(self, index: int) -> Any:
        return Drawing(self.sources, str(index))

    def _given(
        self, made: Iterable[Batch], index: int, length: int, drawing: Any
    ) -> Iterator[Batch]:
        """The first `length` batches, but the last where that is left out; whoever reads says that data ended."""
        if type(made) in (list, tuple):  # which draw nothing
            if len(made) > length:  # type: ignore[arg-type]
                self._tell_longer(index, length)
            yield from map(tidy, made[: length - self.left_out])  # type: ignore[index]
            return
        iterator = drawing(lambda: iter(made))
        following = partial(next, iterator, Adapter)
        for i in range(length - self.left_out):
            batch = drawing(following)
            if batch is Adapter:
                return
            if i == length - self.left_out - 1:
                # Before the last is given, since nobody asks for another after it.
                rest = [drawing(following) is not Adapter for _ in range(1 + self.left_out)]
                if all(rest):
                    self._tell_longer(index, length)
            yield tidy(batch)

    def _tell_longer(self, index: int, length: int) -> None:
        """Errors: ValueError where the rest would be missed."""
        text = f"epoch {index + 1}: expected {length} batches, as {self._says}, got more"
        if self.whole:
            raise ValueError(f"{text}; {self._mend}")
        if not self.told:
            self.told = True
            warn(f"{text}, which are left out; {self._mend}", DataWarning, stacklevel=2)


class Iterated(_Again):
    """What can be iterated again and again, and tells how long it is."""

    told_contents: tuple[Any, str] = (
        None,
        "",
    )  # what a checkpoint tells of them, and of which tensors

    def __init__(self, batches: Any, length: int, whole: bool) -> None:
        super().__init__(batches, whole)
        self.batches, self.length = _repeatable(batches), length

    def __len__(self) -> int:
        return self.length - self.left_out

    @property
    def contents(self) -> Any:
        """All data that lies in memory, whatever order it is read in; None where it does not."""
        data = self.batches.dataset if isinstance(self.batches, DataLoader) else self.batches
        if type(data) is TensorDataset:
            return data.tensors
        return data if type(data) in (list, tuple) else None

    def epoch(self, index: int) -> Iterator[Batch]:
        _tell_epoch(self.batches, index)
        yield from self._given(self.batches, index, self.length, self._drawing(index))


class Made(_Again):
    """A function that makes an iterator for every epoch."""

    _says = "the first epoch had"
    _mend = "make epochs of one length, or say steps_per_epoch="

    def __init__(self, make: Callable[[], Any], steps: int | None, role: str, whole: bool) -> None:
        super().__init__(make, whole)
        self.make, self.steps, self.role = make, steps, role
        self.last: Any = None  # the iterator made last, to see that it is not made twice
        self.endless = steps is None
        self.single_out = False  # whether a last batch of one is to be left out

    def __len__(self) -> int:
        if self.steps is None:
            self.steps = self._counted()
        return self.steps - self.left_out

    def _counted(self) -> int:
        """How long a first iterator is.  Errors: ValueError for an empty one."""
        drawing = self._drawing(0)
        made = drawing(self._new)
        count, sizes = length_of(made), list[int]()
        if count is None:
            iterator = drawing(lambda: iter(made))
            while (batch := drawing(partial(next, iterator, Adapter))) is not Adapter:
                sizes = [*sizes[:1], size_of(tidy(batch))]
                count = (count or 0) + 1
        if not count:
            raise ValueError(f"{self.role}: {NO_BATCHES}")
        if self.single_out and count > 1:
            self.left_out = sizes[-1] == 1 < sizes[0] if sizes else ends_in_one(made)
        return count

    def _new(self) -> Iterable[Batch]:
        made = self.make()
        if not isinstance(made, Iterable) or isinstance(made, (str, Mapping, Tensor)):
            raise ValueError(
                f"{self.role}: expected a function that gives an iterator of batches, got {kind_of(made)} from it"
            )
        if made is self.last and isinstance(made, Iterator):
            raise ValueError(
                f"{self.role}: expected a function that makes a new iterator at every call, got the same one again"
            )
        self.last = made
        return _repeatable(made)

    def epoch(self, index: int) -> Iterator[Batch]:
        drawing = self._drawing(index)
        made = drawing(self._new)
        if self.endless:
            yield from self._given(made, index, len(self) + self.left_out, drawing)
            return
        iterator = drawing(lambda: iter(made))
        for _ in range(self.steps or 0):
            batch = drawing(partial(next, iterator, Adapter))
            if batch is Adapter:
                return
            yield tidy(batch)


class Stream(Adapter):
    """Batches without an end, so many to an epoch."""

    passing = True

    def __init__(self, batches: Iterable[Batch], steps: int) -> None:
        self.batches, self.steps = batches, steps
        self.iterator: Iterator[Batch] | None = None
        self.single_out = False  # whether a batch of one is left out; it has no last one
        self.usual = 0  # samples in the first batch
        self.drawing = Drawing(sources_of(), "stream")
        self.held: list[Batch] = []  # the first of an epoch, as long as no other has been asked for

    def __len__(self) -> int:
        return self.steps

    def epoch(self, index: int) -> Iterator[Batch]:
        for i in range(self.steps):
            batch = self.held.pop() if self.held else self._following()
            if self.single_out and batch is not Adapter:
                self.usual = self.usual or size_of(batch)
                if size_of(batch) == 1 < self.usual:
                    batch = self._following()
            if batch is Adapter:
                return
            if i == 0:
                self.held.append(batch)
            yield batch
            if i == 0:  # an epoch that is begun and left has read nothing
                self.held.clear()

    def _following(self) -> Any:
        """The next batch, from the beginning again where there is one."""
        for again in (False, True):
            if self.iterator is None or again:
                self.iterator = self.drawing(lambda: iter(self.batches))
            iterator: Any = self.iterator
            batch = self.drawing(partial(next, iterator, Adapter))
            if batch is not Adapter:
                return tidy(batch)
            if self.iterator is self.batches:
                break
        return Adapter


def _repeatable(batches: Any) -> Any:
    """The same with workers that start anew in every epoch, since those that live on draw on from where they are, and
    whose batches come in order.
    """
    if isinstance(batches, DataLoader) and batches.num_workers:
        kept = {"persistent_workers": False, "in_order": True, "_iterator": None}
        if any(getattr(batches, name, value) != value for name, value in kept.items()):
            batches = copy.copy(batches)
            vars(batches).update(kept)  # past the loader's own guard
    return batches


def _tell_epoch(batches: Any, index: int) -> None:
    """Tells the epoch to samplers that ask for it."""
    samplers = [getattr(batches, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(s, "sampler", None) for s in samplers]
    for part in (batches, *samplers):
        if callable(tell := getattr(part, "set_epoch", None)):
            tell(index)


def tidy(batch: Any) -> Batch:
    """A batch in the containers that torch knows, arrays as tensors.  Errors: ValueError for one without tensors."""
    if isinstance(batch, Mapping) and type(batch) is not dict:
        batch = dict(batch)
    batch = tree_map(lambda t: torch.as_tensor(t) if isinstance(t, np.ndarray) else t, batch)
    size_of(batch)
    return batch


def ends_in_one(batches: Any) -> bool:
    """Whether that is known of the last batch, and not of the first."""
    if isinstance(batches, (list, tuple)):
        return size_of(tidy(batches[-1])) == 1 < size_of(tidy(batches[0]))
    if not isinstance(batches, DataLoader):
        return False
    data, by = batches.dataset, batches.batch_sampler
    if isinstance(data, IterableDataset):
        if batches.drop_last or batches.num_workers > 1:  # of which each has a last one
            return False
        samples, size = length_of(data), batches.batch_size
    elif isinstance(by, (list, tuple)):
        return len(by[-1]) == 1 < len(by[0])
    elif isinstance(by, BatchSampler) and type(by).__iter__ is BatchSampler.__iter__:
        samples, size = (None if by.drop_last else length_of(by.sampler)), by.batch_size
    else:
        return False
    return samples is not None and size is not None and size > 1 and samples % size == 1
