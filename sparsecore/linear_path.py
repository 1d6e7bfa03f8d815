"""Errors and losses on the straight line between two optima.

Frankle, Dziugaite, Roy & Carbin 2020 (arXiv 1912.05671).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from . import checkpoints, schema
from .batches import EpochBatches
from .batchnorm import recompute_statistics_, running_norms
from .convert import plain_state
from .copies import copied
from .engine.evaluation import Evaluation
from .kinds import checked
from .loaders import batches_of
from .locks import alone
from .losses import Loss, LossLike, loss_of
from .progress import QUIET, Progress
from .writing import FileError

STABLE = 2.0  # percent: Frankle et al. call a smaller instability stable
State = Mapping[str, Tensor]
Of = Literal["error", "loss"]  # what a barrier is measured in
NO_CLASSES = (
    "expected labels whose errors can be counted, got an output without classes for sure; measure it by of='loss', or "
    "say loss=sc.Loss(function, class_axis=1) if the highest output is the prediction"
)


@dataclass(frozen=True)
class LinearPath:
    """Measurements along (1 - alpha) a + alpha b, from a to b.

    Args:
        alphas: evenly spaced from 0 to 1.
        errors: test error, percent; NaN of a model without classes.
        losses: mean loss (of cross-entropy: nats).
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


def barrier(path: LinearPath, of: Of = "error") -> float:
    """The highest error on the path minus the mean of its ends, percentage points; at least 0.

    of: "loss" measures the loss instead, in its own unit, which needs no classes.

    Errors: ValueError for errors of a model without classes.
    """
    if of not in ("error", "loss"):
        raise ValueError(f"barrier: expected of 'error' or 'loss', got {of!r}")
    values = path.errors if of == "error" else path.losses
    if of == "error" and any(map(math.isnan, values)):
        raise ValueError(f"barrier: {NO_CLASSES}")
    return max(values) - (values[0] + values[-1]) / 2


def is_stable(path: LinearPath, threshold: float | None = None, of: Of = "error") -> bool:
    """Whether the barrier is below `threshold`: 2 percentage points by default; of losses it has to be named.

    Errors: as `barrier`; ValueError for of="loss" without a threshold.
    """
    return barrier(path, of) < threshold_of(threshold, of)


def threshold_of(threshold: float | None, of: Of) -> float:
    if threshold is None and of != "error":
        raise ValueError(
            "threshold: expected a number in the loss's own unit, below which a barrier counts as none, got None"
        )
    return STABLE if threshold is None else threshold


@checked
@alone("checkpoint")
def path_errors(
    model: nn.Module,
    a: State,
    b: State,
    batches: Any,
    *,
    loss: LossLike = None,
    points: int = 30,
    train_batches: Any = None,
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
        batches: of test data, as `loaders.batches_of` takes them; epoch 0 is used.
        loss: as `losses.Loss` takes it, and as the states were trained by.
        train_batches: likewise; what statistics are measured on; needed if the model has any.
        limit: at most so many of `train_batches` at each point.
        checkpoint: written after every point; if it exists, only the missing points are measured.

    Errors: ValueError for states of another model, fewer than 2 points, BatchNorm without `train_batches`, a
    checkpoint of another path, a loss that does not fit; KindError for arguments of other kinds.
    """
    check_points(points)
    _check_states(model, {"a": a, "b": b})
    by, batches = loss_of(loss).unsmoothed, batches_of(batches)
    norms = bool(running_norms(model))
    if norms and train_batches is None:
        raise ValueError(
            f"{type(model).__name__} has BatchNorm, whose statistics hold at the ends alone: expected "
            "train_batches to measure them on at every point, got None"
        )
    train_batches = None if train_batches is None else batches_of(train_batches, model)
    own = plain_state(model)
    a, b = ({k: v.to(own[k]) for k, v in state.items()} for state in (a, b))
    probe = copied(model).eval()
    run, rows = "", []
    if checkpoint is not None:
        data = [batches, batches if train_batches is None else train_batches]
        run = _fingerprint(probe, [a, b], data, points, limit, loss=by)
        rows = _measured(checkpoint, run, points)
    evaluation = Evaluation(
        probe, batches, engine="auto", times=points - len(rows), loss=True, by=by
    )
    with progress.task("path", total=points) as advance:
        advance(len(rows))
        for i in range(len(rows), points):
            alpha = i / (points - 1)
            probe.load_state_dict(_between(a, b, alpha), strict=False)
            if norms and train_batches is not None:
                recompute_statistics_(probe, train_batches, limit=limit)
            accuracy, value = evaluation.measure()
            error = 100 - accuracy
            rows.append((alpha, error, value))
            if checkpoint is not None:
                checkpoints.write(checkpoint, {}, {"run": run, "rows": rows})
            shown = ("loss", value) if math.isnan(error) else ("error", error)
            advance(1, alpha=alpha, **dict([shown]))
    alphas, errors, losses = zip(*rows, strict=True)
    return LinearPath(alphas, errors, losses)


def check_points(points: int) -> None:
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
    probe: nn.Module, ends: Sequence[State], data: Sequence[EpochBatches], *facts: Any, loss: Loss
) -> str:
    """Tells paths apart by their ends and the data they are measured on."""
    parts = []
    for state, batches in zip(ends, data, strict=True):
        probe.load_state_dict(state, strict=False)
        parts.append(checkpoints.fingerprint(probe, batches, *facts, loss=loss))
    return "".join(parts)


class _Saved(TypedDict):
    run: str
    rows: list[tuple[schema.Fraction, schema.Number, schema.Number]]  # alpha, error, loss


def _measured(path: Path, run: str, points: int) -> list[tuple[float, float, float]]:
    """The points that an interrupted measurement has behind it."""
    if not path.exists():
        return []
    _, meta = checkpoints.read(path, _Saved)
    if not checkpoints.same_run(meta["run"], run):
        raise checkpoints.OtherRunError(
            f"{path} belongs to another path: expected one between these states on this data, with as "
            "many points; remove it or name another"
        )
    rows = meta["rows"]
    if not all(math.isnan(error) or 0 <= error <= 100 for _, error, _ in rows):
        raise FileError(f"{path}: expected errors of 0 to 100 %, got others; remove it")
    if [alpha for alpha, *_ in rows] != [i / (points - 1) for i in range(len(rows))][:points]:
        raise FileError(f"{path}: expected the points of this path in turn, got others; remove it")
    return rows
