"""Batches as users have them, by epoch: a DataLoader, a list, a function that makes an iterator, a stream."""

import copy
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .batches import EpochBatches, kind_of
from .calls import has_batchnorm
from .data import Batches
from .reading import NO_BATCHES, Adapter, Iterated, Made, Stream, ends_in_one, length_of
from .recipe import MOST_STEPS

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
    - A DataLoader or another sized iterable is iterated anew in every epoch, and a function without arguments makes
      each epoch's iterator; without `steps_per_epoch` a first one is counted.  What they draw while batches are made
      follows from the epoch's number, and leaves generators as they were: a run that was killed goes on with the same
      data (Python's and numpy's own if an epoch's first batch draws from them).  Torch's, Python's and numpy's own (in
      workers too) follow from `torch.manual_seed`, and so does the order;
      a generator that a loader, sampler, data set or function holds follows from its own seed or state.  Workers start
      anew in every epoch, as those that live on (`persistent_workers`) draw on.  A sampler's `set_epoch` is called.
    - A stream (an iterator, or an iterable without a length) needs `steps_per_epoch`, and goes on from epoch to epoch;
      what can be iterated again begins again at its end.  It cannot be read twice: no checkpoint.

    Args:
        model: one that trains.  If it has BatchNorm, a last batch of one sample is left out of `data.Batches`,
            DataLoaders, lists and functions, unless they say otherwise (`drop_last`).
        empty: whether there may be no batches.
        role: what errors call them; others than "batches" have no steps_per_epoch.

    Batches past the length that data tells, or that a function's first iterator had, are left out in training, with a
    DataWarning; without a `model` they are an error, since what is measured would be of a part.

    Errors: ValueError for what holds no batches.
    """
    found = _adapted(batches, steps_per_epoch, role, model is None)
    if model is not None and has_batchnorm(model):
        found = _without_single(found)
    if not empty and not getattr(found, "endless", False) and len(found) < 1:
        raise ValueError(f"{role}: {NO_BATCHES}")
    return found


def _adapted(batches: Any, steps: int | None, role: str, whole: bool) -> EpochBatches:
    if steps is not None and (not isinstance(steps, Integral) or not 1 <= steps <= MOST_STEPS):
        raise ValueError(
            f"steps_per_epoch: expected a whole number from 1 to {MOST_STEPS:,}, got {steps!r}"
        )
    if isinstance(batches, Adapter) or callable(getattr(batches, "epoch", None)):
        if steps is not None and not (isinstance(batches, Adapter) and len(batches) == steps):
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
        sized = length_of(batches)
        if steps is None and sized is not None:
            return Iterated(batches, sized, whole)
        if steps is None:
            raise ValueError(
                f"{role}: expected {_TAKEN}, got {kind_of(batches)} without a length; "
                + ("say steps_per_epoch=, or " if role == "batches" else "")
                + "give a list, or a function that makes an iterator"
            )
        return Stream(batches, int(steps))
    if callable(batches):
        return Made(batches, steps and int(steps), role, whole)  # type: ignore[arg-type]
    raise _refused(batches, "wrap a sparsecore data set in sc.Batches(data, 'train', 64)")


def _refused(batches: Any, mend: str = "give one of these") -> ValueError:
    return ValueError(f"batches: expected {_TAKEN}, got {kind_of(batches)}; {mend}")


def _without_single(batches: EpochBatches) -> EpochBatches:
    """The same without a last batch of one sample, where that can be known and is left to us."""
    if isinstance(batches, Batches):
        full, rest = divmod(len(batches.labels), batches.batch_size)
        if batches.drop_last is None and rest == 1 and full:
            batches = copy.copy(batches)
            batches.drop_last = True
        return batches
    if isinstance(batches, Iterated) and batches.length > 1 and ends_in_one(batches.batches):
        batches = copy.copy(batches)
        batches.left_out = True
    if isinstance(batches, Stream) or (isinstance(batches, Made) and batches.endless):
        if not batches.single_out:
            batches = copy.copy(batches)
            batches.single_out = True
    return batches
