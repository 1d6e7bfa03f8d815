"""What a search and a training loop ask of data: minibatches by epoch, and what a batch is made of.

A batch is (inputs, target); a flat tuple of several, whose last is the target; a dict that is a model's keywords, with
the target under one of `TARGETS`; or inputs alone.  Inputs and targets are tensors or nests of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Batch = Any  # most often x [B, ...], y int64 [B], on the model's device
TARGETS = ("labels", "label", "targets", "target", "y")  # where a dict has its target


class EpochBatches(Protocol):
    """The same epoch always yields the same batches (`data.Batches`)."""

    def __len__(self) -> int: ...
    def epoch(self, index: int) -> Iterator[Batch]: ...


class DataEnded(ValueError):
    """An epoch that had fewer batches than its length says."""

    def __init__(self, epoch: int, got: int, expected: int) -> None:
        super().__init__(
            f"epoch {epoch + 1}: expected {expected} batches, as len(batches) says, and the data ended after "
            f"{got}; mend the data or the length (or steps_per_epoch); an iterator can be read once"
        )


@runtime_checkable
class Numbered(Protocol):
    """Batches whose samples have numbers: a search may remember what it knows about each."""

    def order(self, index: int) -> Tensor | None:
        """int64 [N]: the samples of epoch `index` in turn; None if one may look different next time."""


class Several(tuple):
    """The inputs of a flat batch, which had each by itself."""


def parts_of(batch: Batch) -> tuple[Any, Any]:
    """(inputs, target); the target is None where there is none.  The inputs of a dict are the whole dict."""
    if isinstance(batch, Mapping):
        key = target_key(batch)
        return batch, None if key is None else batch[key]
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) > 2:
            return Several(batch[:-1]), batch[-1]
        if batch:
            return batch[0], None
    return batch, None


def target_key(batch: Mapping[str, Any]) -> str | None:
    """Where a dict has its target."""
    return next((key for key in TARGETS if key in batch), None)


def size_of(batch: Batch) -> int:
    """How many samples a batch has: the length of its target, or of its first tensor.

    Errors: ValueError for a batch without tensors.
    """
    for part in (parts_of(batch)[1], batch):
        for t in tree_leaves(part):
            if isinstance(t, Tensor) and t.ndim:
                return len(t)
    raise ValueError(
        f"batches: expected tensors in every batch, (inputs, targets) or a dict, got {kind_of(batch)}; collate "
        "samples into tensors, as torch.utils.data.DataLoader does"
    )


def require_samples(batch: Batch) -> None:
    """Errors: ValueError for a batch that nothing can be learnt from, whose loss would be a mean of nothing."""
    if not size_of(batch):
        raise ValueError(
            f"batches: expected samples in every batch, got none in {kind_of(batch)}; leave empty batches out"
        )


def whole_epoch(batches: EpochBatches, index: int) -> Iterator[Batch]:
    """The batches of an epoch.  Errors: DataEnded, by whoever reads to the end, for fewer than there should be."""
    count = 0
    for batch in batches.epoch(index):
        yield batch
        count += 1
    if count < len(batches):
        raise DataEnded(index, count, len(batches))


def kind_of(value: Any) -> str:
    """A value in an error's words: its type, and a tensor's dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list) and value:
        return f"a {type(value).__name__} of {', '.join(kind_of(v) for v in value[:4])}"
    return f"a {type(value).__name__}"


def on(device: torch.device, batch: Batch) -> Batch:
    """The batch with its tensors there; itself where they are."""
    return tree_map(lambda t: trainable(t).to(device) if isinstance(t, Tensor) else t, batch)


def trainable(t: Tensor) -> Tensor:
    """The tensor, or a copy of one made under `torch.inference_mode`, which no backward takes."""
    return t.clone() if t.is_inference() else t


def of_samples(batch: Batch, rows: Any) -> Batch:
    """The samples `rows` (an index of the first axis) of every tensor that has one for each sample."""
    count = size_of(batch)
    return tree_map(lambda t: t[rows] if _has(t, count) else t, batch)


def cut(batch: Batch, count: int) -> list[Batch]:
    """At most `count` parts of a batch, of even sizes but the last one's, as `Tensor.chunk` cuts."""
    if count == 1:
        return [batch]
    whole = size_of(batch)
    leaves, spec = tree_flatten(batch)
    pieces = [t.chunk(count) if _has(t, whole) else None for t in leaves]
    number = next(len(p) for p in pieces if p is not None)
    return [
        tree_unflatten(
            [t if p is None else p[i] for t, p in zip(leaves, pieces, strict=True)], spec
        )
        for i in range(number)
    ]


def joined(batches: Iterable[Batch]) -> Batch:
    """One batch of all samples; what is not of samples is the first one's."""
    batches = list(batches)
    counts = [size_of(batch) for batch in batches]
    flat = [tree_flatten(batch) for batch in batches]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [torch.cat(ts) if all(map(_has, ts, counts)) else ts[0] for ts in columns]
    return tree_unflatten(leaves, flat[0][1])


def _has(t: Any, count: int) -> bool:
    """Whether t has an entry for each of so many samples."""
    return isinstance(t, Tensor) and t.ndim > 0 and len(t) == count


def flaw_of(batch: Batch) -> str:
    """What makes a loss of the batch NaN or infinite, in words; empty if nothing is seen.  One host sync."""
    if not size_of(batch):
        return "it has no samples"
    inputs, target = parts_of(batch)
    for name, part in (("inputs", inputs), ("targets", target)):
        for t in tree_leaves(part):
            if isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()):
                return f"its {name} hold NaN" if bool(t.isnan().any()) else f"its {name} hold inf"
    if isinstance(target, Tensor) and not target.is_floating_point() and target.numel():
        if bool((target == -100).all()):
            return "all its targets are -100, which are ignored"
    return ""


def first_flaw(batches: EpochBatches, epoch: int, first: int = 0, last: int | None = None) -> str:
    """`flaw_of` the first bad one of an epoch's batches, read again, as the end of a message; empty if none is bad."""
    if getattr(batches, "passing", False):  # what has passed is gone
        return ""
    for i, batch in enumerate(batches.epoch(epoch)):
        if last is not None and i >= last:
            break
        if i >= first and (flaw := flaw_of(batch)):
            return f"; batch {i + 1} of the epoch: {flaw}"
    return ""
