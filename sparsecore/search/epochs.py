"""The epochs of a search that steps in plain PyTorch: records, a bar, checkpoints."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .. import checkpoints
from ..batches import Batch, DataEnded, EpochBatches
from ..progress import Progress
from .protocol import SearchError, Watch

Records = list[dict[str, Any]]  # of each epoch: "epoch", "objective" and, if watched, "accuracy"


class EpochStep(ABC):
    """A step on a batch, and all that it changes."""

    device: torch.device

    @abstractmethod
    def __call__(self, batch: Batch, index: int) -> Tensor:
        """Step `index` of the search; the objective before it, 0-dim, detached.  No host sync."""

    @abstractmethod
    def measure(self, watch: Watch) -> float:
        """What `watch` says of the network by now; changes nothing that a step reads."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and JSON."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Puts back what `state` gave."""


def run_epochs(
    step: EpochStep,
    batches: EpochBatches,
    epochs: int,
    *,
    run: str,
    progress: Progress,
    checkpoint: Path | None,
    watch: Watch | None,
) -> Records:
    """All epochs, or those that an interrupted search has left.

    Args:
        run: the search's `checkpoints.fingerprint`.
        checkpoint: written after every epoch.

    Errors: SearchError if an epoch's objective is not finite, or for a checkpoint of another search.
    """
    records, length = _load(step, checkpoint, run), len(batches)
    with progress.task("search", total=epochs * length) as advance:
        advance(len(records) * length)
        for epoch in range(len(records), epochs):
            start = perf_counter()
            total = torch.zeros((), device=step.device)
            taken = 0
            for batch in batches.epoch(epoch):
                total += step(batch, epoch * length + taken)
                taken += 1
                advance()
            if taken != length:
                raise DataEnded(epoch, taken, length)
            mean = float(total) / length  # the epoch's only host sync
            if not math.isfinite(mean):
                raise SearchError(
                    f"search epoch {epoch + 1}: the objective is {mean}; check the data and the start "
                    "weights, or lower lr"
                )
            record = {"epoch": epoch + 1, "objective": mean}
            if watch is not None:
                record["accuracy"] = step.measure(watch)
            records.append(record)
            if checkpoint is not None:
                tensors, rest = step.state()
                checkpoints.write(
                    checkpoint, tensors, {"step": rest, "records": records, "run": run}
                )
            advance.describe(objective=mean, seconds=perf_counter() - start)
    return records


def _load(step: EpochStep, path: Path | None, run: str) -> Records:
    """The records of an interrupted search, its step put back."""
    if path is None or not path.exists():
        return []
    tensors, meta = checkpoints.read(path)
    if meta.get("run") != run:
        raise SearchError(
            f"{path} belongs to another search: expected the fingerprint {run[:12]} of this search, its "
            f"data and start weights, got {str(meta.get('run'))[:12]}; remove it or name another"
        )
    step.load(tensors, meta["step"])
    return meta["records"]
