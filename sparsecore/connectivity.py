"""Linear mode connectivity: from when on training is stable.

Frankle, Dziugaite, Roy & Carbin 2020 (arXiv 1912.05671).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .batches import EpochBatches
from .copies import copied
from .engine.evaluation import Evaluation
from .kinds import checked
from .linear_path import NO_CLASSES, STABLE, Of, State, check_points, threshold_of
from .linear_path import LinearPath as LinearPath
from .linear_path import barrier as barrier
from .linear_path import is_stable as is_stable
from .linear_path import path_errors as path_errors
from .loaders import batches_of
from .losses import Loss, LossLike, loss_of
from .progress import QUIET, Progress
from .recipe import Recipe
from .tickets import dense_state
from .training import train


class Instability(NamedTuple):
    """Two trainings from one start: the path between them, and what each came to (dense states)."""

    path: LinearPath
    first: dict[str, Tensor]
    second: dict[str, Tensor]


@checked
def instability(
    model: nn.Module,
    recipe: Recipe,
    batches_for: Callable[[int], Any],
    test_batches: Any,
    *,
    loss: LossLike = None,
    steps_per_epoch: int | None = None,
    seeds: tuple[int, int] = (1, 2),
    start_epoch: float = 0,
    points: int = 30,
    folder: Path | None = None,
    progress: Progress = QUIET,
) -> Instability:
    """Trains copies of a model under two seeds; `barrier(result.path)` is its instability.

    Args:
        model: holds the start: weights, and masks if it has any.  It is left as it is.
        recipe: its schedule is absolute: training goes on from `start_epoch`, to its end.
        batches_for: training batches of a seed, which decides their order and augmentation, as
            `loaders.batches_of` takes them.  BatchNorm's statistics on the path are measured on the first seed's.
        loss, steps_per_epoch: as `train` takes them.
        seeds: of the two runs, dropout included.  Equal ones give an instability of exactly 0.
        folder: keeps both trainings and the path; what is there already is not done again.

    Errors: as `train` and `path_errors`; ValueError if the folder belongs to another run.
    """
    check_points(points)
    _check_seeds(seeds)
    ends = []
    for name, seed in zip(("first", "second"), seeds, strict=True):
        trained = copied(model)
        train(
            trained, batches_for(seed), None, recipe, loss=loss, steps_per_epoch=steps_per_epoch,
            start_epoch=start_epoch, seed=seed, checkpoint=_in(folder, f"{name}.checkpoint"), progress=progress,
        )  # fmt: skip
        ends.append(dense_state(trained))
    path = path_errors(
        model, ends[0], ends[1], test_batches, loss=loss, points=points,
        train_batches=batches_of(batches_for(seeds[0]), model, steps_per_epoch),
        checkpoint=_in(folder, "path.checkpoint"), progress=progress,
    )  # fmt: skip
    return Instability(path, ends[0], ends[1])


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(seeds) != 2:
        raise ValueError(f"seeds: expected two, one for each run, got {tuple(seeds)}")


def _in(folder: Path | None, name: str) -> Path | None:
    """A file in a folder, which is made if need be."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@dataclass(frozen=True)
class RewindScan:
    """Instability at several rewind points.

    Args:
        paths: by rewind epoch, ascending: the path between two trainings from there.
        starts: by the same epochs: the state_dict there, to rewind to.
        threshold: percentage points, or in the loss's unit.
        of: what instability is measured in, as `barrier` takes it.
    """

    paths: Mapping[float, LinearPath]
    starts: Mapping[float, State]
    threshold: float = STABLE
    of: Of = "error"

    @property
    def instabilities(self) -> dict[float, float]:
        """By rewind epoch, in the threshold's unit."""
        return {epoch: barrier(path, self.of) for epoch, path in self.paths.items()}

    @property
    def earliest(self) -> float | None:
        """The first stable rewind epoch; None if there is none."""
        stable = (e for e, path in self.paths.items() if is_stable(path, self.threshold, self.of))
        return next(stable, None)


@checked
def rewind_by_instability(
    model: nn.Module,
    recipe: Recipe,
    batches_for: Callable[[int], Any],
    test_batches: Any,
    candidates: Sequence[float],
    *,
    loss: LossLike = None,
    steps_per_epoch: int | None = None,
    of: Of = "error",
    seed: int = 0,
    seeds: tuple[int, int] = (1, 2),
    points: int = 30,
    threshold: float | None = None,
    exhaustive: bool = True,
    folder: Path | None = None,
    progress: Progress = QUIET,
) -> RewindScan:
    """Trains once to the last candidate, and from each candidate twice to the end, to see where it is stable.

    Args:
        model: untrained; left as it is.
        candidates: rewind epochs, fractions too, in [0, recipe.epochs).
        of: "loss" measures barriers of the loss, which needs no classes, but a threshold of its unit.
        seed: of the training that leads to the candidates.
        threshold: as `is_stable` takes it.
        loss, steps_per_epoch, seeds, points: as `instability` takes them.
        exhaustive: False stops at the first stable candidate.
        folder: keeps everything; what is there already is not done again.

    Errors: as `instability`; ValueError for candidates outside of the run, of="loss" without a threshold, and
    of="error" for a model without classes, before anything is trained.
    """
    check_points(points)
    _check_seeds(seeds)
    limit, test_batches = threshold_of(threshold, of), batches_of(test_batches)
    epochs = sorted({float(epoch) for epoch in candidates})
    if not epochs or not all(0 <= epoch < recipe.epochs for epoch in epochs):
        raise ValueError(
            f"candidates: expected rewind epochs from 0 to below {recipe.epochs}, got {list(candidates)}"
        )
    if of == "error":
        _check_classes(model, loss_of(loss), test_batches)
    start = copied(model)
    history = train(
        start, batches_for(seed), None, recipe, loss=loss, steps_per_epoch=steps_per_epoch,
        stop_epoch=epochs[-1], seed=seed, snapshots=epochs, checkpoint=_in(folder, "dense.checkpoint"),
        progress=progress,
    )  # fmt: skip
    paths: dict[float, LinearPath] = {}
    for epoch in epochs:
        start.load_state_dict(history.snapshots[epoch])
        paths[epoch] = instability(
            start, recipe, batches_for, test_batches, loss=loss, steps_per_epoch=steps_per_epoch,
            seeds=seeds, start_epoch=epoch, points=points,
            folder=None if folder is None else folder / f"epoch-{epoch:g}", progress=progress,
        ).path  # fmt: skip
        if is_stable(paths[epoch], limit, of) and not exhaustive:
            break
    return RewindScan(paths, {epoch: history.snapshots[epoch] for epoch in paths}, limit, of)


def _check_classes(model: nn.Module, by: Loss, batches: EpochBatches) -> None:
    """Errors: ValueError where the first batch shows that there are no errors to count."""
    first = list(islice(batches.epoch(0), 1))
    found = Evaluation(model, batches_of(first), by=by).measure()
    if math.isnan(found.accuracy):
        raise ValueError(f"rewind_by_instability: {NO_CLASSES}")
