"""One plain training loop: schedules by absolute epoch, exact resume, metrics as JSON lines."""

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from . import checkpoints, metrics_file
from .batches import first_flaw
from .claims import sole
from .engine import (
    Way,
    check_engine,
)
from .engine.training_step import Penalty
from .evaluating import evaluate as evaluate
from .evaluating import metric_of
from .loaders import batches_of
from .locks import alone
from .losses import LossLike, loss_of
from .process import seeded
from .progress import QUIET, Progress
from .recipe import MOST_EPOCHS, require_trainable
from .recipe import Recipe as Recipe
from .streams import append
from .telling import tell_loss
from .training_run import AfterStep, Facts, History, Run, Saved, epoch_of, parts_between
from .training_run import Step as Step
from .watching import looking, number_in
from .writing import FileError


class TrainingError(ValueError):
    """A run that cannot go on; the message says what to change."""


@sole("training", differentiates=True)
@alone("metrics", "checkpoint")
def train(
    model: nn.Module,
    train_batches: Any,
    test_batches: Any,
    recipe: Recipe,
    *,
    loss: LossLike = None,
    metric: LossLike = None,
    steps_per_epoch: int | None = None,
    start_epoch: float = 0,
    stop_epoch: float | None = None,
    total_epochs: float | None = None,
    seed: int = 0,
    snapshots: Collection[float] = (),
    penalty: Penalty | None = None,
    after_step: AfterStep | None = None,
    watch: Callable[[nn.Module], float] | None = None,
    facts: Sequence[Any] = (),
    metrics: Path | None = None,
    checkpoint: Path | None = None,
    progress: Progress = QUIET,
    engine: str = "auto",
    repeats: int = 1,
) -> History:
    """Trains from `start_epoch` to `stop_epoch` with a fresh optimiser; the schedule is absolute.

    Epochs may be fractions: 1.5 is the middle of the second epoch, to the nearest batch.

    Args:
        train_batches: as `loaders.batches_of` takes them: an object with len() and epoch(i), a DataLoader, a list, ...
        test_batches: likewise, with a length; None leaves accuracies out.
        loss: as `losses.Loss` takes it; None: cross-entropy where shapes leave no doubt, or the model's own.
        metric: measured on the test data in place of accuracy or the loss, as `evaluate` takes it.
        steps_per_epoch: of training batches without a length.
        total_epochs: the schedule's length, `recipe.epochs` by default.
        seed: of dropout and the like; data order belongs to the batches.
        snapshots: epochs after which the state_dict is kept (rewind points); start_epoch counts.
        penalty: added to the loss of every step.  One that counts or draws in Python is not for graphs: "auto"
            takes none with a penalty, unless it has `capturable = True`.
        after_step: called after every step; what it changes has to be in the model's or optimiser's state,
            so that a run that was killed goes on with it.
        watch: asked after every epoch; the number that it gives stands in the records as "watched".
        facts: what tells this run from others beside the recipe, the data and the weights, by its repr: a
            checkpoint cannot see what `penalty` and `after_step` do.
        metrics: one JSON line per epoch is appended here, after the checkpoint is written.
        checkpoint: written after every epoch, snapshots included; if it exists the run goes on from there,
            on the CPU to exactly the same numbers.
        engine: how steps are launched: "eager", "graph" (one CUDA graph), "compile", "compile-graph", or the one of
            these that a few steps find fastest; a run that goes on keeps what it began with.
        repeats: how many such runs there are, which share what is compiled.

    Errors: ValueError for a model without parameters that train or that another thread works with, a start after the
    end, fp16 on the CPU, or a checkpoint that belongs to another run or went too far for this one; TrainingError if the
    loss is not finite; EngineError for an engine that is not possible here; FileError for files that are damaged, that
    somebody else writes by now, or that cannot be written, with the epochs before kept.
    """
    require_trainable(model)
    check_engine(engine, next(model.parameters()).device)
    given = loss_of(loss)
    tell_loss(given, model, stacklevel=5)
    by = given.smoothed(recipe.label_smoothing)
    train_batches = batches_of(train_batches, model, steps_per_epoch)
    if test_batches is not None:
        test_batches = batches_of(test_batches, role="test_batches")
    asked = metric_of(metric, by)
    checkpoints.check_resumable(checkpoint, train_batches)
    stop = recipe.epochs if stop_epoch is None else stop_epoch
    if not 0 <= start_epoch <= stop:
        raise ValueError(f"start_epoch: expected 0 to {stop:g}, the end, got {start_epoch}")
    if not stop <= MOST_EPOCHS:
        raise ValueError(f"stop_epoch: expected at most {MOST_EPOCHS:,}, got {stop}")
    if total_epochs is not None and not 0 <= total_epochs <= MOST_EPOCHS:
        raise ValueError(f"total_epochs: expected 0 to {MOST_EPOCHS:,}, got {total_epochs}")
    history = History()
    fingerprint, saved = "", None
    if checkpoint is not None:
        known = (asdict(recipe), start_epoch, total_epochs or recipe.epochs, seed)
        fingerprint = checkpoints.fingerprint(model, train_batches, *known, *facts, loss=given)
        saved = _read(checkpoint, fingerprint) if checkpoint.exists() else None
    total = total_epochs or recipe.epochs
    run = Run(model, recipe, total, stop, train_batches, test_batches, penalty, by, asked)
    run.after_step = after_step
    if start_epoch in snapshots:
        history.snapshots[start_epoch] = run.snapshot()
    if checkpoint is not None and saved is not None:
        _check_reach(checkpoint, saved, start_epoch, stop, snapshots)
        try:
            run.load(saved, history)
        except ValueError as error:
            raise FileError(f"{checkpoint}: {error}; remove it to begin anew") from None
    if metrics is not None:
        metrics_file.catch_up(metrics, history.epochs)
    reached = history.epochs[-1]["epoch"] if history.epochs else start_epoch
    done = sum(part.count for part in parts_between(start_epoch, reached, (), len(train_batches)))
    parts = parts_between(reached, stop, snapshots, len(train_batches))
    left = sum(part.count for part in parts)
    model.train()
    run.launch(engine if parts else "eager", saved, math.floor(reached), (done + left) * repeats)
    progress.tell("engine", run.engine.told)
    try:
        if parts and run.evaluation is not None and test_batches is not None:
            run.evaluation.try_first(test_batches)
        with progress.task("train", total=done + left) as advance:
            advance(done)
            for part in parts:
                start = perf_counter()
                # Every epoch has its own seed, so a resumed run draws what an unbroken one does.
                with seeded(_mix(seed, part.epoch, part.first), [run.device]):
                    mean = run.part(part, advance)
                if not math.isfinite(mean):
                    flaw = first_flaw(train_batches, part.epoch, part.first, part.last)
                    mend = f"lower lr ({recipe.lr}), add warm-up or clip_norm, or check the data"
                    raise TrainingError(
                        f"epoch {part.epoch + 1}: the loss is {mean}"
                        + (f"{flaw}; check the data" if flaw else f"; {mend}")
                    )
                record = {
                    "epoch": part.end,
                    "lr": recipe.lr_at(part.epoch, run.total),
                    "loss": mean,
                }
                if run.evaluation is not None:
                    with seeded(_mix(seed, part.epoch, part.last), [run.device]):  # a loss may draw
                        record |= run.measured()
                if watch is not None:
                    with looking(run.evaluated):
                        said = watch(run.evaluated)
                    record["watched"] = number_in(said)
                record["seconds"] = perf_counter() - start
                history.epochs.append(record)
                if part.end in snapshots:
                    history.snapshots[part.end] = run.snapshot()
                if checkpoint is not None:
                    run.save(checkpoint, fingerprint, history)
                if metrics is not None:  # what a kill leaves out here, the checkpoint knows
                    append(metrics, metrics_file.line(record))
                told = ("accuracy", "test_loss", "metric", "watched")
                shown = {k: record[k] for k in told if k in record}
                advance(0, epoch=part.end, **shown)
    finally:  # in the memory format that the model had
        run.engine.step.become(Way())
        history.way = str(run.engine.way)
        history.engine = run.engine.told or history.way
    run.finish(history)
    return history


def _read(path: Path, fingerprint: str) -> Saved:
    """This run's checkpoint.  Errors: checkpoints.OtherRunError for another run's."""
    tensors, meta = checkpoints.read(path, Facts)
    if not checkpoints.same_run(meta["run"], fingerprint):
        raise checkpoints.OtherRunError(
            f"{path} belongs to another run ({checkpoints.told_apart_by(meta['run'], fingerprint)}): a run goes on "
            "with the model as it began (one that was interrupted "
            "has moved: make it anew, or apply the ticket again), one of a plan that dropped dead units under that "
            "plan alone; for another run remove it or name another checkpoint"
        )
    return tensors, meta


def _check_reach(
    path: Path, saved: Saved, start: float, stop: float, snapshots: Collection[float]
) -> None:
    """Refuses a checkpoint that is past what this run still has to see."""
    tensors, meta = saved
    if not meta["epochs"] or meta["epochs"][0]["epoch"] < start:
        raise FileError(f"{path}: expected epochs from {start:g} on, got none or others")
    ends = {record["epoch"] for record in meta["epochs"]}
    reached = meta["epochs"][-1]["epoch"]
    if not ends.issuperset(range(math.floor(start) + 1, math.floor(min(reached, stop)) + 1)):
        raise FileError(f"{path}: expected a record of every epoch, got some of them")
    kept = {epoch_of(key) for key in tensors if key.startswith("snapshot/")}
    lost = [e for e in snapshots if start <= e <= reached and e not in kept]
    if reached > stop or lost:
        raise ValueError(
            f"{path} is at epoch {reached:g} and holds no state of epoch {min(lost, default=stop):g}: "
            "remove it or name another"
        )


def _mix(seed: int, epoch: int, first: int) -> int:
    """A seed per (seed, epoch, first batch), far apart for neighbours."""
    text = f"{seed}/{epoch}/{first}" if first else f"{seed}/{epoch}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
