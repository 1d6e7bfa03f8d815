"""Linear mode connectivity: errors between two optima, and from when on training is stable.

Frankle, Dziugaite, Roy & Carbin 2020 (arXiv 1912.05671).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoints
from .batches import EpochBatches
from .batchnorm import recompute_statistics_, running_norms
from .convert import plain_state
from .engine.evaluation import Evaluation
from .progress import QUIET, Progress
from .recipe import Recipe
from .tickets import dense_state
from .training import train

STABLE = 2.0  # percent: Frankle et al. call a smaller instability stable
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class LinearPath:
    """Measurements along (1 - alpha) a + alpha b, from a to b.

    Args:
        alphas: evenly spaced from 0 to 1.
        errors: test error, percent.
        losses: mean cross-entropy, nats.
    """

    alphas: tuple[float, ...]
    errors: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def rows(self) -> list[dict[str, float]]:
        """A record a point: alpha, error, loss."""
        names = ("alpha", "error", "loss")
        points = zip(self.alphas, self.errors, self.losses, strict=True)
        return [dict(zip(names, point, strict=True)) for point in points]


def barrier(path: LinearPath) -> float:
    """The highest error on the path minus the mean of its ends, percentage points; at least 0."""
    return max(path.errors) - (path.errors[0] + path.errors[-1]) / 2


def is_stable(path: LinearPath, threshold: float = STABLE) -> bool:
    """Whether the barrier is below `threshold` percentage points."""
    return barrier(path) < threshold


def path_errors(
    model: nn.Module,
    a: State,
    b: State,
    batches: EpochBatches,
    *,
    points: int = 30,
    train_batches: EpochBatches | None = None,
    limit: int = 20,
    checkpoint: Path | None = None,
    progress: Progress = QUIET,
) -> LinearPath:
    """Errors and losses on the straight line between two dense states; the model is left as it is.

    Every floating tensor is interpolated, counters are those of the nearer end.  Masks of the model apply
    at all points.  BatchNorm's running statistics, which do not interpolate, are measured anew at all
    points, the ends included.

    Args:
        model: in which the states are evaluated.
        a, b: by the dense model's keys (`tickets.dense_state`), of any device and dtype.
        batches: of test data; epoch 0 is used.
        train_batches: what statistics are measured on; needed if the model has any.
        limit: at most so many of `train_batches` at each point.
        checkpoint: written after every point; if it exists, only the missing points are measured.

    Errors: ValueError for states of another model, fewer than 2 points, BatchNorm without `train_batches`, a
    checkpoint of another path.
    """
    _check_points(points)
    _check_states(model, {"a": a, "b": b})
    norms = bool(running_norms(model))
    if norms and train_batches is None:
        raise ValueError(
            f"{type(model).__name__} has BatchNorm, whose statistics hold at the ends alone: expected "
            "train_batches to measure them on at every point, got None"
        )
    own = plain_state(model)
    a, b = ({k: v.to(own[k]) for k, v in state.items()} for state in (a, b))
    probe = copy.deepcopy(model).eval()
    run, rows = "", []
    if checkpoint is not None:
        run = _fingerprint(probe, [a, b], [batches, train_batches or batches], points, limit)
        rows = _measured(checkpoint, run)
    evaluation = Evaluation(probe, batches, engine="auto", times=points - len(rows), loss=True)
    with progress.task("path", total=points) as advance:
        advance(len(rows))
        for i in range(len(rows), points):
            alpha = i / (points - 1)
            probe.load_state_dict(_between(a, b, alpha), strict=False)
            if norms and train_batches is not None:
                recompute_statistics_(probe, train_batches, limit=limit)
            accuracy, loss = evaluation.measure()
            if math.isnan(accuracy):
                raise ValueError(
                    "path: expected labels whose errors can be counted, got an output without classes; barriers are "
                    "measured of classifiers"
                )
            error = 100 - accuracy
            rows.append((alpha, error, loss))
            if checkpoint is not None:
                checkpoints.write(checkpoint, {}, {"run": run, "rows": rows})
            advance(alpha=alpha, error=error)
    alphas, errors, losses = zip(*rows, strict=True)
    return LinearPath(alphas, errors, losses)


def _check_points(points: int) -> None:
    if points < 2:
        raise ValueError(f"points: expected at least 2, the ends, got {points}")


def _check_states(model: nn.Module, states: Mapping[str, State]) -> None:
    own = plain_state(model)
    for name, state in states.items():
        common = own.keys() & state.keys()
        wrong = (own.keys() ^ state.keys()) | {k for k in common if own[k].shape != state[k].shape}
        if wrong:
            raise ValueError(
                f"state {name}: expected the keys and shapes of the dense model, as "
                f"tickets.dense_state(model) gives them, got others at {', '.join(sorted(wrong)[:4])}"
            )


def _between(a: State, b: State, alpha: float) -> dict[str, Tensor]:
    nearer = a if alpha < 0.5 else b
    return {
        # lerp gives the ends exactly, and every point of a line from a state to itself
        k: torch.lerp(a[k], b[k], alpha) if a[k].is_floating_point() else nearer[k]
        for k in a
    }


def _fingerprint(
    probe: nn.Module, ends: Sequence[State], data: Sequence[EpochBatches], *facts: Any
) -> str:
    """Tells paths apart by their ends and the data they are measured on."""
    parts = []
    for state, batches in zip(ends, data, strict=True):
        probe.load_state_dict(state, strict=False)
        parts.append(checkpoints.fingerprint(probe, batches, *facts))
    return "".join(parts)


def _measured(path: Path, run: str) -> list[tuple[float, float, float]]:
    """The points that an interrupted measurement has behind it."""
    if not path.exists():
        return []
    _, meta = checkpoints.read(path)
    if meta["run"] != run:
        raise ValueError(
            f"{path} belongs to another path: expected one between these states on this data, with as "
            "many points; remove it or name another"
        )
    return [tuple(row) for row in meta["rows"]]


class Instability(NamedTuple):
    """Two trainings from one start: the path between them, and what each came to (dense states)."""

    path: LinearPath
    first: dict[str, Tensor]
    second: dict[str, Tensor]


def instability(
    model: nn.Module,
    recipe: Recipe,
    batches_for: Callable[[int], EpochBatches],
    test_batches: EpochBatches,
    *,
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
        batches_for: training batches of a seed, which decides their order and augmentation.  BatchNorm's
            statistics on the path are measured on the first seed's.
        seeds: of the two runs, dropout included.  Equal ones give an instability of exactly 0.
        folder: keeps both trainings and the path; what is there already is not done again.

    Errors: as `train` and `path_errors`; ValueError if the folder belongs to another run.
    """
    _check_points(points)
    _check_seeds(seeds)
    ends = []
    for name, seed in zip(("first", "second"), seeds, strict=True):
        trained = copy.deepcopy(model)
        train(
            trained, batches_for(seed), None, recipe, start_epoch=start_epoch, seed=seed,
            checkpoint=_in(folder, f"{name}.checkpoint"), progress=progress,
        )  # fmt: skip
        ends.append(dense_state(trained))
    path = path_errors(
        model, ends[0], ends[1], test_batches, points=points, train_batches=batches_for(seeds[0]),
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
        threshold: percentage points.
    """

    paths: Mapping[float, LinearPath]
    starts: Mapping[float, State]
    threshold: float = STABLE

    @property
    def instabilities(self) -> dict[float, float]:
        """By rewind epoch, percentage points."""
        return {epoch: barrier(path) for epoch, path in self.paths.items()}

    @property
    def earliest(self) -> float | None:
        """The first stable rewind epoch; None if there is none."""
        stable = (e for e, path in self.paths.items() if is_stable(path, self.threshold))
        return next(stable, None)


def rewind_by_instability(
    model: nn.Module,
    recipe: Recipe,
    batches_for: Callable[[int], EpochBatches],
    test_batches: EpochBatches,
    candidates: Sequence[float],
    *,
    seed: int = 0,
    seeds: tuple[int, int] = (1, 2),
    points: int = 30,
    threshold: float = STABLE,
    exhaustive: bool = True,
    folder: Path | None = None,
    progress: Progress = QUIET,
) -> RewindScan:
    """Trains once to the last candidate, and from each candidate twice to the end, to see where it is stable.

    Args:
        model: untrained; left as it is.
        candidates: rewind epochs, fractions too, in [0, recipe.epochs).
        seed: of the training that leads to the candidates.
        seeds, points: as `instability` takes them.
        exhaustive: False stops at the first stable candidate.
        folder: keeps everything; what is there already is not done again.

    Errors: as `instability`; ValueError for candidates outside of the run.
    """
    _check_points(points)
    _check_seeds(seeds)
    epochs = sorted({float(epoch) for epoch in candidates})
    if not epochs or not all(0 <= epoch < recipe.epochs for epoch in epochs):
        raise ValueError(
            f"candidates: expected rewind epochs from 0 to below {recipe.epochs}, got {list(candidates)}"
        )
    start = copy.deepcopy(model)
    history = train(
        start, batches_for(seed), None, recipe, stop_epoch=epochs[-1], seed=seed, snapshots=epochs,
        checkpoint=_in(folder, "dense.checkpoint"), progress=progress,
    )  # fmt: skip
    paths: dict[float, LinearPath] = {}
    for epoch in epochs:
        start.load_state_dict(history.snapshots[epoch])
        paths[epoch] = instability(
            start, recipe, batches_for, test_batches, seeds=seeds, start_epoch=epoch, points=points,
            folder=None if folder is None else folder / f"epoch-{epoch:g}", progress=progress,
        ).path  # fmt: skip
        if is_stable(paths[epoch], threshold) and not exhaustive:
            break
    return RewindScan(paths, {epoch: history.snapshots[epoch] for epoch in paths}, threshold)
