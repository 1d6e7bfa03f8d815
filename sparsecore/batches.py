"""What a search and a training loop ask of data: minibatches by epoch."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

Batch = tuple[Tensor, Tensor]  # x [B, ...], y int64 [B], on the model's device


class EpochBatches(Protocol):
    """The same epoch always yields the same batches (`data.Batches`)."""

    def __len__(self) -> int: ...
    def epoch(self, index: int) -> Iterator[Batch]: ...


class DataEnded(ValueError):
    """An epoch that had fewer batches than its length says."""

    def __init__(self, epoch: int, got: int, expected: int) -> None:
        super().__init__(
            f"epoch {epoch + 1}: expected {expected} batches, as len(batches) says, and the data ended after "
            f"{got}; mend the data or the length"
        )


@runtime_checkable
class Numbered(Protocol):
    """Batches whose samples have numbers: a search may remember what it knows about each."""

    def order(self, index: int) -> Tensor | None:
        """int64 [N]: the samples of epoch `index` in turn; None if one may look different next time."""
