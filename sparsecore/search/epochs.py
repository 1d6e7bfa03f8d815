"""The epochs of a search: a bar, a checkpoint after each, and going on from there."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from .. import checkpoints
from ..batches import EpochBatches, first_flaw
from ..engine import Engine, Timeline
from ..progress import Advance, Progress
from .protocol import SearchError, Watch

Record = dict[str, Any]  # what an epoch has to tell, as JSON


class Epochs(ABC):
    """What a search does in an epoch, and all that an epoch changes."""

    length = 1  # steps in an epoch

    @abstractmethod
    def epoch(self, index: int, advance: Advance) -> Record:
        """Epoch `index`, a call of `advance` for each step."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and JSON."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        """Puts back what `state` gave."""


def run_epochs(
    search: Epochs, epochs: int, *, run: str, progress: Progress, checkpoint: Path | None
) -> list[Record]:
    """The records of all epochs; runs those that an interrupted search has left.

    Args:
        run: the search's `checkpoints.fingerprint`.
        checkpoint: written after every epoch.

    Errors: SearchError for a checkpoint of another search, and what an epoch raises.
    """
    began = perf_counter()
    records, before = _resume(search, checkpoint, run)
    with progress.task("search", total=epochs * search.length) as advance:
        advance(len(records) * search.length)
        for index in range(len(records), epochs):
            start = perf_counter()
            record = search.epoch(index, advance)
            records.append(record)
            if checkpoint is not None:
                tensors, rest = search.state()
                meta = {"search": rest, "records": records, "run": run}
                meta["seconds"] = before + perf_counter() - began
                checkpoints.write(checkpoint, tensors, meta)
            told = {name: value for name, value in record.items() if isinstance(value, float)}
            advance.describe(**told, seconds=perf_counter() - start)
    return records


def _resume(search: Epochs, path: Path | None, run: str) -> tuple[list[Record], float]:
    """The records of an interrupted search, whose state is put back, and the seconds it had taken."""
    if path is None or not path.exists():
        return [], 0.0
    tensors, meta = read_own(path, run)
    search.load(tensors, meta["search"])
    return meta["records"], meta["seconds"]


def read_own(path: Path, run: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A search's own checkpoint.  Errors: SearchError for another's, safefile.FileError."""
    tensors, meta = checkpoints.read(path)
    if not checkpoints.same_run(meta.get("run"), run):
        raise SearchError(
            f"{path} belongs to another search: expected the fingerprint {run[:12]} of this search, its "
            f"data and start weights, got {str(meta.get('run'))[:12]}; remove it or name another"
        )
    return tensors, meta


def way_of(path: Path | None, run: str) -> str | None:
    """How the interrupted search launched its steps; None where there is none."""
    if path is None or not path.exists():
        return None
    return read_own(path, run)[1]["search"].get("engine")


def check_finite(mean: float, index: int, objective: str, batches: EpochBatches) -> float:
    """The mean objective of epoch `index`.  Errors: SearchError if it is not finite."""
    if not math.isfinite(mean):
        flaw = first_flaw(batches, index)
        raise SearchError(
            f"search epoch {index + 1}: the objective {objective} is not finite ({mean}{flaw}); check the data and "
            "the start weights, or lower lr"
        )
    return mean


class StepEpochs(Epochs):
    """Epochs of an engine's steps, one on each batch.

    A record holds "epoch", "objective" (the mean over samples) and, if `watch` is given, "accuracy".
    """

    engine: Engine
    timeline: Timeline  # of the whole search

    def __init__(self, batches: EpochBatches, watch: Watch | None) -> None:
        self.batches, self.watch, self.length = batches, watch, len(batches)

    @abstractmethod
    def measure(self, watch: Watch) -> float:
        """What `watch` says of the network by now; changes nothing that a step reads."""

    def mean(self, samples: int) -> float:
        """The mean loss of an epoch's steps on so many samples."""
        return float(self.engine.step.total) / max(samples, 1)

    def epoch(self, index: int, advance: Advance) -> Record:
        engine, samples = self.engine, 0
        engine.step.clear()
        engine.begin(index)
        self.timeline.to(index * self.length)
        for _ in range(self.length):
            engine()
            samples += engine.feed.size
            advance()
        # The epoch's only host sync.
        mean = check_finite(self.mean(samples), index, "task", self.batches)
        record = {"epoch": index + 1, "objective": mean}
        return record if self.watch is None else record | {"accuracy": self.measure(self.watch)}
