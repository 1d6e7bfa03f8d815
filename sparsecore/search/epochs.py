"""The epochs of a search: a bar, a checkpoint after each, and going on from there."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from .. import checkpoints, schema
from ..batches import EpochBatches, first_flaw
from ..engine import Engine, Timeline
from ..losses import Loss
from ..process import between_steps, seeded
from ..progress import Advance, Progress
from ..writing import FileError
from .protocol import SearchError, Watch

Record = dict[str, Any]  # what an epoch has to tell, as JSON


class EpochRecord(TypedDict):
    """What an epoch of most searches tells."""

    epoch: schema.Count
    objective: NotRequired[float]
    sparsity: NotRequired[schema.Fraction]
    accuracy: NotRequired[schema.Number]


class Rest(TypedDict):
    """What most searches keep beside tensors."""

    engine: NotRequired[str]


class Epochs(ABC):
    """What a search does in an epoch, and all that an epoch changes.

    Attributes:
        loss: of its steps.
        rest_kind, record_kind: what files hold of `state` and of records, as `schema.facts` takes it.
    """

    loss: Loss

    length = 1  # steps in an epoch
    rest_kind: Any = Rest
    record_kind: Any = EpochRecord

    @property
    def device(self) -> torch.device:
        """Whose generator a step may draw from."""
        return torch.device("cpu")

    @abstractmethod
    def epoch(self, index: int, advance: Advance) -> Record:
        """Epoch `index`, a call of `advance` for each step."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and JSON."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor], rest: dict[str, Any], epochs: int) -> None:
        """Puts back what `state` gave after so many epochs.

        Errors: FileError, before anything is changed, for what it could not have given then.
        """

    def told(self, index: int, record: Record) -> bool:
        """Whether a file's record may be that of epoch `index`."""
        return record["epoch"] == index + 1


def run_epochs(
    search: Epochs,
    epochs: int,
    *,
    run: str,
    progress: Progress,
    checkpoint: Path | None,
) -> list[Record]:
    """The records of all epochs; runs those that an interrupted search has left.

    Args:
        run: the search's `checkpoints.fingerprint`.
        checkpoint: written after every epoch.

    Errors: SearchError for a checkpoint of another search, FileError for one that is none, and what an epoch raises.
    """
    began = perf_counter()
    records, before = _resume(search, checkpoint, run, epochs)
    with progress.task("search", total=epochs * search.length) as advance:
        advance(len(records) * search.length)
        for index in range(len(records), epochs):
            start = perf_counter()
            # A loss of the user's may draw: each epoch has its own seed, so that a search that goes on draws the same.
            with seeded(index, [search.device]) if search.loss.facts else nullcontext():
                record = search.epoch(index, advance)
            records.append(record)
            if checkpoint is not None:
                tensors, rest = search.state()
                require_finite(tensors)  # which nothing could go on from
                meta = {"search": rest, "records": records, "run": run}
                meta["seconds"] = before + perf_counter() - began
                checkpoints.write(checkpoint, tensors, meta)
            told = {name: value for name, value in record.items() if isinstance(value, float)}
            advance.describe(**told, seconds=perf_counter() - start)
    return records


def _resume(search: Epochs, path: Path | None, run: str, epochs: int) -> tuple[list[Record], float]:
    """The records of an interrupted search, whose state is put back, and the seconds it had taken."""
    if path is None or not path.exists():
        return [], 0.0
    tensors, meta = read_own(path, run, _Saved)
    records = schema.facts(meta["records"], list[search.record_kind], f"{path}: records")
    if not 0 < len(records) <= epochs or not all(search.told(i, r) for i, r in enumerate(records)):
        raise FileError(
            f"{path}: expected records of 1 to {epochs} epochs in turn, got others; remove it, and the search begins "
            "anew"
        )
    try:
        search.load(tensors, schema.facts(meta["search"], search.rest_kind, "search"), len(records))
    except FileError as error:
        raise FileError(f"{path}: {error}; remove it, and the search begins anew") from None
    return records, meta["seconds"]


class Owned(TypedDict):
    """What checkpoints of all searches hold."""

    run: str
    seconds: schema.Seconds


class _Saved(Owned):
    search: schema.Facts
    records: list[Any]


def read_own(path: Path, run: str, hint: Any = Owned) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A search's own checkpoint, with facts as the hint has them.

    Errors: SearchError for another's, FileError for one that is none.
    """
    tensors, meta = checkpoints.read(path, hint)
    if not checkpoints.same_run(meta["run"], run):
        raise SearchError(
            f"{path} belongs to another search ({checkpoints.told_apart_by(meta['run'], run)}), by its options, model, "
            "data or start weights; name another, or remove it if nobody wants that search's ticket any more (saving "
            "the ticket does so)"
        )
    return tensors, meta


def way_of(path: Path | None, run: str) -> str | None:
    """How the interrupted search launched its steps; None where there is none."""
    if path is None or not path.exists():
        return None
    return schema.facts(read_own(path, run, _Saved)[1]["search"], Rest, str(path)).get("engine")


def check_finite(mean: float, index: int, objective: str, batches: EpochBatches) -> float:
    """The mean objective of epoch `index`.  Errors: SearchError if it is not finite."""
    if not math.isfinite(mean):
        flaw = first_flaw(batches, index)
        raise SearchError(
            f"search epoch {index + 1}: the objective {objective} is not finite ({mean}{flaw}); check the data and "
            "the start weights, or lower lr"
        )
    return mean


def require_finite(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a search has come to, or its scores.  Errors: SearchError for numbers that are not finite."""
    for name, values in found.items():
        if not schema.all_finite(values):
            raise SearchError(
                f"search: expected finite numbers, got others in {name}: lower lr, check the data, or remove a "
                "checkpoint of others"
            )
    return dict(found)


class StepEpochs(Epochs):
    """Epochs of an engine's steps, one on each batch.

    A record holds "epoch", "objective" (the mean over samples) and, if `watch` is given, "accuracy".
    """

    engine: Engine
    timeline: Timeline  # of the whole search

    @property
    def device(self) -> torch.device:
        return self.engine.feed.device

    def __init__(self, batches: EpochBatches, watch: Watch | None, loss: Loss) -> None:
        self.batches, self.watch, self.loss, self.length = batches, watch, loss, len(batches)

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
            between_steps()
        # The epoch's only host sync.
        mean = check_finite(self.mean(samples), index, "task", self.batches)
        record = {"epoch": index + 1, "objective": mean}
        return record if self.watch is None else record | {"accuracy": self.measure(self.watch)}
