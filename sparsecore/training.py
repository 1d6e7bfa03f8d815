"""One plain training loop: schedules by absolute epoch, exact resume, metrics as JSON lines."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import checkpoints
from .batches import Batch, EpochBatches, first_flaw
from .engine import (
    Evaluation,
    Timeline,
    TrainingStep,
    Way,
    check_engine,
    feed_of,
    launch,
    takes_images,
)
from .engine.training_step import Penalty
from .evaluating import evaluate as evaluate
from .evaluating import metric_of
from .loaders import batches_of
from .losses import Loss, LossLike, loss_of
from .progress import QUIET, Progress
from .recipe import Recipe, optimizer_for


class TrainingError(ValueError):
    """A run that cannot go on; the message says what to change."""


@dataclass(frozen=True)
class Step:
    """An optimiser step that has just been taken."""

    index: int  # since epoch 0
    model: nn.Module
    optimizer: torch.optim.Optimizer
    present: Callable[[], Batch]

    @property
    def batch(self) -> Batch:
        """The batch of the step."""
        return self.present()


AfterStep = Callable[[Step], None]
Saved = tuple[dict[str, Tensor], dict[str, Any]]  # what a checkpoint holds


@dataclass
class History:
    """What a run gave: a record per epoch (or part of one), and the states asked for.

    A record holds "epoch", "lr", "loss", "seconds", and of the test data "accuracy" where there are classes,
    "test_loss" where there are none, or the "metric" that was asked for.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[float, dict[str, Tensor]] = field(default_factory=dict)
    engine: str = ""  # how steps were launched, and why if there was a choice
    way: str = ""  # the same without why

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch, percent."""
        return self.epochs[-1]["accuracy"]  # a KeyError where there was nothing to test on

    @property
    def seconds(self) -> float:
        """Training and evaluation time of all epochs."""
        return sum(epoch["seconds"] for epoch in self.epochs)


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
        metric: measured on the test data in place of accuracy, as `evaluate` takes it.
        steps_per_epoch: of training batches without a length.
        total_epochs: the schedule's length, `recipe.epochs` by default.
        seed: of dropout and the like; data order belongs to the batches.
        snapshots: epochs after which the state_dict is kept (rewind points); start_epoch counts.
        penalty: added to the loss of every step.  One that counts or draws in Python is not for graphs: "auto"
            takes none with a penalty, unless it has `capturable = True`.
        after_step: called after every step; what it changes has to be in the model's or optimiser's state,
            so that a run that was killed goes on with it.
        watch: asked after every epoch; what it says stands in the records as "watched".
        facts: what tells this run from others beside the recipe, the data and the weights, by its repr: a
            checkpoint cannot see what `penalty` and `after_step` do.
        metrics: one JSON line per epoch is appended here.
        checkpoint: written after every epoch, snapshots included; if it exists the run goes on from there,
            on the CPU to exactly the same numbers.
        engine: how steps are launched: "eager", "graph" (one CUDA graph), "compile", "compile-graph", or the one of
            these that a few steps find fastest; a run that goes on keeps what it began with.
        repeats: how many such runs there are, which share what is compiled.

    Errors: ValueError for a start after the end, fp16 on the CPU, or a checkpoint that belongs to another run
    or went too far for this one; TrainingError if the loss is not finite; EngineError for an engine that is not
    possible here.
    """
    check_engine(engine, next(model.parameters()).device)
    by = loss_of(loss).smoothed(recipe.label_smoothing)
    train_batches = batches_of(train_batches, model, steps_per_epoch)
    test_batches = None if test_batches is None else batches_of(test_batches)
    asked = metric_of(metric)
    checkpoints.check_resumable(checkpoint, train_batches)
    stop = recipe.epochs if stop_epoch is None else stop_epoch
    if not 0 <= start_epoch <= stop:
        raise ValueError(f"start_epoch: expected 0 to {stop:g}, the end, got {start_epoch}")
    history = History()
    fingerprint, saved = "", None
    if checkpoint is not None:
        known = (asdict(recipe), start_epoch, total_epochs or recipe.epochs, seed)
        fingerprint = checkpoints.fingerprint(model, train_batches, *known, *facts, loss=by)
        saved = _read(checkpoint, fingerprint) if checkpoint.exists() else None
    total = total_epochs or recipe.epochs
    run = _Run(model, recipe, total, stop, train_batches, test_batches, penalty, by, asked)
    run.after_step = after_step
    if start_epoch in snapshots:
        history.snapshots[start_epoch] = run.snapshot()
    if checkpoint is not None and saved is not None:
        run.load(saved, history)
        _check_reach(checkpoint, history, start_epoch, stop, snapshots)
    if metrics is not None:
        _cut_metrics(metrics, {e["epoch"] for e in history.epochs})
    reached = history.epochs[-1]["epoch"] if history.epochs else start_epoch
    done = sum(part.count for part in _parts(start_epoch, reached, (), len(train_batches)))
    parts = _parts(reached, stop, snapshots, len(train_batches))
    left = sum(part.count for part in parts)
    model.train()
    run.launch(engine if parts else "eager", saved, math.floor(reached), (done + left) * repeats)
    progress.tell("engine", run.engine.told)
    try:
        with progress.task("train", total=done + left) as advance:
            advance(done)
            for part in parts:
                start = perf_counter()
                with torch.random.fork_rng(
                    devices=[run.device] if run.device.type == "cuda" else []
                ):
                    # Every epoch has its own seed, so a resumed run draws what an unbroken one does.
                    torch.manual_seed(_mix(seed, part.epoch, part.first))
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
                    record |= run.measured()
                if watch is not None:
                    record["watched"] = watch(run.evaluated)
                record["seconds"] = perf_counter() - start
                history.epochs.append(record)
                if metrics is not None:
                    with metrics.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                if part.end in snapshots:
                    history.snapshots[part.end] = run.snapshot()
                if checkpoint is not None:
                    run.save(checkpoint, fingerprint, history)
                told = ("accuracy", "test_loss", "metric", "watched")
                shown = {k: record[k] for k in told if k in record}
                advance(0, epoch=part.end, **shown)
    finally:  # in the memory format that the model had
        run.engine.step.become(Way())
        history.way = str(run.engine.way)
        history.engine = run.engine.told or history.way
    run.finish()
    return history


def _read(path: Path, fingerprint: str) -> Saved:
    """This run's checkpoint.  Errors: ValueError for another run's."""
    tensors, meta = checkpoints.read(path)
    if meta["run"] != fingerprint:
        raise ValueError(
            f"{path} belongs to another run (its fingerprint is {meta['run'][:12]}, this run's "
            f"{fingerprint[:12]}): remove it or name another checkpoint; one of a plan that dropped dead "
            "units goes on under that plan alone"
        )
    return tensors, meta


def _check_reach(
    path: Path, history: History, start: float, stop: float, snapshots: Collection[float]
) -> None:
    """Refuses a checkpoint that is past what this run still has to see."""
    reached = history.epochs[-1]["epoch"]
    lost = [e for e in snapshots if start <= e <= reached and e not in history.snapshots]
    if reached > stop or lost:
        raise ValueError(
            f"{path} is at epoch {reached:g} and holds no state of epoch {min(lost, default=stop):g}: "
            "remove it or name another"
        )


class _Part(NamedTuple):
    """The batches first ... last - 1 of an epoch, and the epoch that is reached by then."""

    epoch: int
    first: int
    last: int
    end: float

    @property
    def count(self) -> int:
        return self.last - self.first


def _parts(start: float, stop: float, between: Collection[float], batches: int) -> list[_Part]:
    """A run cut at the ends of epochs and wherever a snapshot is due."""
    whole = range(math.ceil(start), math.floor(stop) + 1)
    cuts = sorted({start, stop, *whole, *(e for e in between if start < e < stop)})
    parts = []
    for a, b in pairwise(cuts):
        epoch = math.floor(a)
        first, last = round((a - epoch) * batches), round((b - epoch) * batches)
        parts.append(_Part(epoch, first, last, b))
    return parts


class _Run:
    """The moving parts of one run: model, optimiser, loss scaler, average, and the engine of their steps."""

    after_step: AfterStep | None = None

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        total: float,
        stop: float,
        batches: EpochBatches,
        test_batches: EpochBatches | None,
        penalty: Penalty | None,
        loss: Loss,
        metric: Loss | None,
    ) -> None:
        self.loss, self.metric = loss, metric
        self.model, self.recipe, self.total, self.penalty = model, recipe, total, penalty
        self.steps, self.test_batches = max(len(batches), 1), test_batches
        self.device = next(model.parameters()).device
        if recipe.amp == "fp16" and self.device.type == "cpu":
            raise ValueError("recipe amp: fp16 needs a GPU; use bf16 on the CPU")
        self.feed = feed_of(batches, self.device)
        # The middle of a step: a warm-up never starts with a step of size 0.
        middles = [(i + 0.5) / self.steps for i in range(self.steps)]
        rates = [recipe.lr_at(e + m, total) for e in range(math.ceil(stop)) for m in middles]
        self.timeline = Timeline({"lr": rates or [recipe.lr]}, self.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer_for(parameters, recipe, lr=self.timeline.now["lr"])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.average = None
        if recipe.ema is not None:
            self.average = AveragedModel(model, use_buffers=True)

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average

    def _step(self) -> TrainingStep:
        recipe = self.recipe
        return TrainingStep(
            self.model,
            self.loss,
            self.optimizer,
            accumulate=recipe.accumulate,
            amp=recipe.amp_dtype,
            scaler=self.scaler,
            clip_norm=recipe.clip_norm,
            penalty=self.penalty,
            timeline=self.timeline,
            average=None if self.average is None else (self.average, recipe.ema or 0.0),
        )

    def launch(self, engine: str, saved: Saved | None, epoch: int, steps: int) -> None:
        """Makes the engine: the one asked for, the checkpoint's, or the fastest."""
        counts = self.penalty is not None and not getattr(self.penalty, "capturable", False)
        self.engine = launch(
            self._step().become,
            self.feed,
            engine=engine,
            steps=steps,
            saved=None if saved is None else saved[1].get("engine"),
            epoch=epoch,
            layouts=takes_images(self.model),
            unless="since its penalty may count or draw in Python" if counts else "",
        )
        self.evaluation = None
        if self.test_batches is not None:
            way = self.engine.way
            self.evaluation = Evaluation(
                self.evaluated,
                self.test_batches,
                engine="auto" if engine == "auto" and way.graph else way.name,
                times=-(-steps // self.steps),
                by=self.loss.unsmoothed,
                metric=self.metric,
                channels_last=way.channels_last,
            )

    def measured(self) -> dict[str, float]:
        """What a record tells of the test data."""
        assert self.evaluation is not None
        found = self.evaluation.measure()
        if self.metric is not None:
            return {"metric": found.loss}
        if self.evaluation.classes:
            return {"accuracy": found.accuracy}
        return {"test_loss": found.loss}

    def part(self, part: _Part, advance: Any) -> float:
        """Mean training loss; the only host sync is at the end."""
        self.model.train()
        step, first = self.engine.step, part.epoch * self.steps + part.first
        step.clear()
        self.timeline.to(first)
        self.engine.begin(part.epoch, part.first)
        samples = 0
        for index in range(first, first + part.count):
            self.engine()
            samples += self.feed.size
            if self.after_step is not None:
                self.after_step(Step(index, self.model, self.optimizer, self.feed.present))
                self.engine.refresh()
            advance()
        return float(step.total) / max(samples, 1)

    def snapshot(self) -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def finish(self) -> None:
        """The average, where there is one, is what the caller gets."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())

    def save(self, path: Path, fingerprint: str, history: History) -> None:
        tensors, meta = checkpoints.pack_optimizer(self.optimizer, self.model)
        tensors |= {f"model/{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average/{k}": v for k, v in self.average.state_dict().items()}
        for epoch, state in history.snapshots.items():
            tensors |= {f"snapshot/{epoch}/{k}": v for k, v in state.items()}
        meta = {"optimizer": meta, "scaler": self.scaler.state_dict(), "seconds": history.seconds}
        meta |= {"run": fingerprint, "epochs": history.epochs, "engine": str(self.engine.way)}
        checkpoints.write(path, tensors, meta)

    def load(self, saved: Saved, history: History) -> None:
        tensors, meta = saved

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        self.model.load_state_dict(part("model/"))
        if self.average is not None:
            self.average.load_state_dict(part("average/"))
        checkpoints.unpack_optimizer(self.optimizer, tensors, meta["optimizer"], self.model)
        self.scaler.load_state_dict(meta["scaler"])
        history.epochs = meta["epochs"]
        for key, value in part("snapshot/").items():
            epoch, name = key.split("/", 1)
            history.snapshots.setdefault(float(epoch), {})[name] = value


def _mix(seed: int, epoch: int, first: int) -> int:
    """A seed per (seed, epoch, first batch), far apart for neighbours."""
    text = f"{seed}/{epoch}/{first}" if first else f"{seed}/{epoch}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _cut_metrics(path: Path, done: set[int]) -> None:
    """Drops lines of epochs that the checkpoint does not know (a run killed between the two)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["epoch"] in done:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # half a line
    path.write_text("".join(kept))
