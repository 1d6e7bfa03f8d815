"""Batches as users have them, by epoch: a DataLoader, a list, a function that makes an iterator, a stream."""

import copy
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .batches import Batch, EpochBatches, kind_of, size_of
from .calls import has_batchnorm
from .data import Batches

_NONE = "expected at least one, got none; look at the data's size, the batch size and drop_last"
_TAKEN = "a DataLoader, a list of batches, a function that makes an iterator, or an object with len() and epoch(i)"


def batches_of(
    batches: Any,
    model: nn.Module | None = None,
    steps_per_epoch: int | None = None,
    *,
    empty: bool = False,
    role: str = "batches",
) -> EpochBatches:
    """What everything inside reads, made of what users give as `batches`.

    - An object with `len()` and `epoch(i)` (`data.Batches`) is taken as it is.
    - A DataLoader or another sized iterable is iterated anew in every epoch.  What it draws from torch, in its workers
      too, follows from `torch.manual_seed` and the epoch's number alone, and leaves torch's own generator as it was: a
      run that was killed goes on with the same data.  A sampler's `set_epoch` is called.
    - A function without arguments makes each epoch's iterator.  Without `steps_per_epoch` a first one is counted.
    - A stream (an iterator, or an iterable without a length) needs `steps_per_epoch`, and goes on from epoch to epoch;
      what can be iterated again begins again at its end.  It cannot be read twice: no checkpoint.

    Args:
        model: one that trains.  If it has BatchNorm, a last batch of one sample is left out of `data.Batches`,
            DataLoaders and lists, unless they say otherwise (`drop_last`).
        empty: whether there may be no batches.
        role: what errors call them; others than "batches" have no steps_per_epoch.

    Errors: ValueError for what holds no batches.
    """
    found = _adapted(batches, steps_per_epoch, role)
    if model is not None and has_batchnorm(model):
        found = _without_single(found)
    if not empty and not getattr(found, "endless", False) and len(found) < 1:
        raise ValueError(f"{role}: {_NONE}")
    return found


def _adapted(batches: Any, steps: int | None, role: str) -> EpochBatches:
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps_per_epoch: expected a whole number of at least 1, got {steps!r}")
    if isinstance(batches, _Adapter) or callable(getattr(batches, "epoch", None)):
        if steps is not None and not (isinstance(batches, _Adapter) and len(batches) == steps):
            raise ValueError(
                f"steps_per_epoch: expected None for batches whose length is known, got {steps}; give data of that "
                "length"
            )
        return batches
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise _refused(batches, "wrap a data set in torch.utils.data.DataLoader")
    if (
        isinstance(batches, (str, bytes, Mapping, Tensor, np.ndarray, nn.Module, type))
        or batches is None
    ):
        raise _refused(batches)
    if isinstance(batches, tuple) and batches and all(isinstance(b, Tensor) for b in batches):
        raise _refused(batches, "put a single batch in a list: [(inputs, targets)]")
    if isinstance(batches, Iterable):
        sized = _length(batches)
        if steps is None and sized is not None:
            return _Iterated(batches, sized)
        if steps is None:
            raise ValueError(
                f"{role}: expected {_TAKEN}, got {kind_of(batches)} without a length; "
                + ("say steps_per_epoch=, or " if role == "batches" else "")
                + "give a list, or a function that makes an iterator"
            )
        return _Stream(batches, steps)
    if callable(batches):
        return _Made(batches, steps)  # type: ignore[arg-type]
    raise _refused(batches, "wrap a sparsecore data set in sc.Batches(data, 'train', 64)")


def _refused(batches: Any, mend: str = "give one of these") -> ValueError:
    return ValueError(f"batches: expected {_TAKEN}, got {kind_of(batches)}; {mend}")


def _length(batches: Any) -> int | None:
    """None where it has none (a DataLoader of an IterableDataset says so when asked)."""
    if not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError:
        return None


class _Adapter(ABC):
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


class _Iterated(_Adapter):
    """What can be iterated again and again, and tells how long it is."""

    def __init__(self, batches: Any, length: int) -> None:
        self.batches, self.length = batches, length
        # Of what torch draws while batches are made; as the user has seeded it.
        self.seed = torch.initial_seed()

    def __len__(self) -> int:
        return self.length

    def epoch(self, index: int) -> Iterator[Batch]:
        drawing = _Drawing(f"{self.seed}/{index}")
        if getattr(self.batches, "persistent_workers", False):
            # Workers that live on draw on from where they are, and the first epoch draws a seed more than others.
            self.batches._iterator = None
        for generator in _begin(self.batches, index):
            drawing.add(generator, f"{generator.initial_seed()}/{index}")
        iterator = drawing(lambda: iter(self.batches))
        for _ in range(self.length):
            batch = drawing(partial(next, iterator, _Adapter))
            if batch is _Adapter:  # whoever reads says that data ended
                return
            yield _tidy(batch)


class _Made(_Adapter):
    """A function that makes an iterator for every epoch."""

    def __init__(self, make: Callable[[], Any], steps: int | None) -> None:
        self.make, self.steps = make, steps
        self.last: Any = None  # the iterator made last, to see that it is not made twice
        self.endless = steps is None

    def __len__(self) -> int:
        if self.steps is None:
            made = self._new()
            length = _length(made)
            self.steps = sum(1 for _ in made) if length is None else length
        if not self.steps:
            raise ValueError(f"batches: {_NONE}")
        return self.steps

    def _new(self) -> Iterable[Batch]:
        made = self.make()
        if not isinstance(made, Iterable) or isinstance(made, (str, Mapping, Tensor)):
            raise ValueError(
                f"batches: expected a function that gives an iterator of batches, got {kind_of(made)} from it"
            )
        if made is self.last and iter(made) is made:
            raise ValueError(
                "batches: expected a function that makes a new iterator at every call, got the same one again"
            )
        self.last = made
        return made

    def epoch(self, index: int) -> Iterator[Batch]:
        for i, batch in enumerate(self._new()):
            if self.steps is not None and i >= self.steps:
                return
            yield _tidy(batch)


class _Stream(_Adapter):
    """Batches without an end, so many to an epoch."""

    passing = True

    def __init__(self, batches: Iterable[Batch], steps: int) -> None:
        self.batches, self.steps = batches, steps
        self.iterator: Iterator[Batch] | None = None
        self.drawing = _Drawing(f"{torch.initial_seed()}/stream")
        self.held: list[Batch] = []  # the first of an epoch, as long as no other has been asked for

    def __len__(self) -> int:
        return self.steps

    def epoch(self, index: int) -> Iterator[Batch]:
        for i in range(self.steps):
            batch = self.held.pop() if self.held else self._following()
            if batch is _Adapter:
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
            batch = self.drawing(partial(next, iterator, _Adapter))
            if batch is not _Adapter:
                return _tidy(batch)
            if self.iterator is self.batches:
                break
        return _Adapter


def _begin(batches: Any, index: int) -> list[torch.Generator]:
    """Tells samplers the epoch; the generators that they draw from by themselves."""
    samplers = [getattr(batches, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(s, "sampler", None) for s in samplers]
    generators = {}
    for part in (batches, *samplers):
        if callable(tell := getattr(part, "set_epoch", None)):
            tell(index)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generators[id(generator)] = generator
    return list(generators.values())


class _Drawing:
    """Generators in states that follow from texts while batches are made, and as they were in between: what a user has
    seeded is neither used up nor seeded anew, so an epoch draws the same however often others were read before it.

    Of Python and numpy those of the whole process, which data sets augment by where there are no workers.
    """

    def __init__(self, text: str) -> None:
        self.states: dict[torch.Generator, Tensor] = {}
        self.add(torch.default_generator, text)
        seed = _seed(text)
        self.others: list[Any] = [
            random.Random(seed).getstate(),
            np.random.RandomState(seed & 0xFFFFFFFF).get_state(),
        ]

    def add(self, generator: torch.Generator, text: str) -> None:
        own = torch.Generator(generator.device).manual_seed(_seed(text))
        self.states.setdefault(generator, own.get_state())

    def __call__(self, run: Callable[[], Any]) -> Any:
        before = {generator: generator.get_state() for generator in self.states}
        others = _others()
        try:
            for generator, state in self.states.items():
                generator.set_state(state)
            _set_others(self.others)
            made = run()
            self.states = {generator: generator.get_state() for generator in self.states}
            self.others = _others()
            return made
        finally:
            for generator, state in before.items():
                generator.set_state(state)
            _set_others(others)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _others() -> list[Any]:
    """The states of Python's generator and of numpy's."""
    return [random.getstate(), np.random.get_state()]


def _set_others(states: list[Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])


def _tidy(batch: Any) -> Batch:
    """A batch in the containers that torch knows, arrays as tensors.  Errors: ValueError for one without tensors."""
    if isinstance(batch, Mapping) and type(batch) is not dict:
        batch = dict(batch)
    batch = tree_map(lambda t: torch.as_tensor(t) if isinstance(t, np.ndarray) else t, batch)
    size_of(batch)
    return batch


def _without_single(batches: EpochBatches) -> EpochBatches:
    """The same without a last batch of one sample, where that can be known and is left to us."""
    if isinstance(batches, Batches):
        full, rest = divmod(len(batches.labels), batches.batch_size)
        if batches.drop_last is None and rest == 1 and full:
            batches = copy.copy(batches)
            batches.drop_last = True
        return batches
    if isinstance(batches, _Iterated) and batches.length > 1 and _ends_in_one(batches.batches):
        batches = copy.copy(batches)
        batches.length -= 1
    return batches


def _ends_in_one(batches: Any) -> bool:
    if isinstance(batches, (list, tuple)):
        return size_of(_tidy(batches[-1])) == 1 < size_of(_tidy(batches[0]))
    if not isinstance(batches, DataLoader):
        return False
    by = batches if batches.batch_size else batches.batch_sampler
    size, sampler = getattr(by, "batch_size", None), getattr(by, "sampler", None)
    if not isinstance(size, int) or size < 2 or getattr(by, "drop_last", True):
        return False
    samples = _length(batches.dataset if isinstance(batches.dataset, IterableDataset) else sampler)
    return samples is not None and samples % size == 1
