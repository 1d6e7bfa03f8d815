"""One plain training loop: schedules by absolute epoch, exact resume, metrics as JSON lines."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import checkpoints
from .batches import Batch, DataEnded, EpochBatches
from .progress import QUIET, Progress

_OPTIMIZERS = ("sgd", "adam", "adamw")
_SCHEDULES = ("constant", "step", "cosine")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(ValueError):
    """A run that cannot go on; the message says what to change."""


class Step(NamedTuple):
    """An optimiser step that has just been taken."""

    index: int  # since epoch 0
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch


Penalty = Callable[[nn.Module], Tensor]  # a scalar that is added to the loss
AfterStep = Callable[[Step], None]


@dataclass(frozen=True)
class Recipe:
    """How to train.  Errors: ValueError for a value out of range.

    Args:
        schedule: `step` multiplies lr by `gamma` at each of `milestones` (fractions of the run).
        accumulate: micro-batches that a batch is cut into; the numbers are the same to rounding.
        amp: `bf16` or `fp16` (GPU only) autocast; None trains in float32.
        ema: decay of an average of the weights that is evaluated in their place; None: off.
        augment: whether the data set's customary augmentation is used.
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    batch: int = 128
    epochs: int = 12
    schedule: str = "step"
    milestones: tuple[float, ...] = (0.7,)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    amp: str | None = None
    accumulate: int = 1
    ema: float | None = None
    clip_norm: float | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        checks = (
            ("optimizer", self.optimizer in _OPTIMIZERS, f"one of {', '.join(_OPTIMIZERS)}"),
            ("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
            ("amp", self.amp in (None, *_DTYPES), "null, bf16 or fp16"),
            ("lr", self.lr > 0, "a positive number"),
            ("momentum", 0 <= self.momentum < 1, "0 <= momentum < 1"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("batch", self.batch >= 1, "at least 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "fractions between 0 and 1"),
            ("gamma", 0 < self.gamma <= 1, "0 < gamma <= 1"),
            ("warmup_epochs", self.warmup_epochs >= 0, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 <= label_smoothing < 1"),
            ("accumulate", 1 <= self.accumulate <= self.batch, "1 <= accumulate <= batch"),
            ("ema", self.ema is None or 0 < self.ema < 1, "null or 0 < ema < 1"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "null or positive"),
        )
        for name, good, expected in checks:
            if not good:
                raise ValueError(f"recipe {name}: expected {expected}, got {getattr(self, name)!r}")

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that forwards run in."""
        dtype = _DTYPES.get(self.amp or "")
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def lr_at(self, epoch: float, total: float) -> float:
        """The learning rate at an absolute, fractional epoch of a run of `total` epochs."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= m * total - 1e-9 for m in self.milestones)
        if self.schedule == "cosine":
            done = (epoch - self.warmup_epochs) / max(total - self.warmup_epochs, 1e-9)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.lr


@dataclass
class History:
    """What a run gave: a record per epoch (or part of one), and the states asked for."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[float, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch, percent."""
        return self.epochs[-1]["accuracy"]  # a KeyError where there was nothing to test on

    @property
    def seconds(self) -> float:
        """Training and evaluation time of all epochs."""
        return sum(epoch["seconds"] for epoch in self.epochs)


def evaluate(model: nn.Module, batches: EpochBatches) -> float:
    """Accuracy in percent, in evaluation mode; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            hits = torch.cat([model(x).argmax(-1) == y for x, y in batches.epoch(0)])
        return 100 * float(hits.double().mean())
    finally:
        for module, mode in modes.items():
            module.training = mode


def train(
    model: nn.Module,
    train_batches: EpochBatches,
    test_batches: EpochBatches | None,
    recipe: Recipe,
    *,
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
) -> History:
    """Trains from `start_epoch` to `stop_epoch` with a fresh optimiser; the schedule is absolute.

    Epochs may be fractions: 1.5 is the middle of the second epoch, to the nearest batch.

    Args:
        test_batches: None leaves accuracies out.
        total_epochs: the schedule's length, `recipe.epochs` by default.
        seed: of dropout and the like; data order belongs to the batches.
        snapshots: epochs after which the state_dict is kept (rewind points); start_epoch counts.
        penalty: added to the loss of every step.
        after_step: called after every step; what it changes has to be in the model's or optimiser's state,
            so that a run that was killed goes on with it.
        watch: asked after every epoch; what it says stands in the records as "watched".
        facts: what tells this run from others beside the recipe, the data and the weights, by its repr: a
            checkpoint cannot see what `penalty` and `after_step` do.
        metrics: one JSON line per epoch is appended here.
        checkpoint: written after every epoch, snapshots included; if it exists the run goes on from there,
            on the CPU to exactly the same numbers.

    Errors: ValueError for a start after the end, fp16 on the CPU, or a checkpoint that belongs to another run
    or went too far for this one; TrainingError if the loss is not finite.
    """
    stop = recipe.epochs if stop_epoch is None else stop_epoch
    if not 0 <= start_epoch <= stop:
        raise ValueError(f"start_epoch: expected 0 to {stop:g}, the end, got {start_epoch}")
    run = _Run(model, recipe, total_epochs or recipe.epochs, len(train_batches))
    run.penalty, run.after_step = penalty, after_step
    history = History()
    fingerprint = ""
    if checkpoint is not None:
        known = (asdict(recipe), start_epoch, run.total, seed)
        fingerprint = checkpoints.fingerprint(model, train_batches, *known, *facts)
    if start_epoch in snapshots:
        history.snapshots[start_epoch] = run.snapshot()
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint, fingerprint, history)
        _check_reach(checkpoint, history, start_epoch, stop, snapshots)
    if metrics is not None:
        _cut_metrics(metrics, {e["epoch"] for e in history.epochs})
    reached = history.epochs[-1]["epoch"] if history.epochs else start_epoch
    done = sum(part.count for part in _parts(start_epoch, reached, (), len(train_batches)))
    parts = _parts(reached, stop, snapshots, len(train_batches))
    with progress.task("train", total=done + sum(part.count for part in parts)) as advance:
        advance(done)
        for part in parts:
            start = perf_counter()
            with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
                # Every epoch has its own seed, so a resumed run draws what an unbroken one does.
                torch.manual_seed(_mix(seed, part.epoch, part.first))
                loss = run.part(train_batches.epoch(part.epoch), part, advance)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"epoch {part.epoch + 1}: the loss is {loss}; lower lr ({recipe.lr}), "
                    "add warm-up or clip_norm, or check the data"
                )
            record = {"epoch": part.end, "lr": recipe.lr_at(part.epoch, run.total), "loss": loss}
            if test_batches is not None:
                record["accuracy"] = evaluate(run.evaluated, test_batches)
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
            shown = {k: record[k] for k in ("accuracy", "watched") if k in record}
            advance(0, epoch=part.end, **shown)
    run.finish()
    return history


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
    """The moving parts of one run: model, optimiser, loss scaler, average."""

    penalty: Penalty | None = None
    after_step: AfterStep | None = None

    def __init__(self, model: nn.Module, recipe: Recipe, total: float, steps: int) -> None:
        self.model, self.recipe, self.total, self.steps = model, recipe, total, max(steps, 1)
        self.device = next(model.parameters()).device
        if recipe.amp == "fp16" and self.device.type == "cpu":
            raise ValueError("recipe amp: fp16 needs a GPU; use bf16 on the CPU")
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer_for(parameters, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.average = None
        if recipe.ema is not None:
            average_fn = get_ema_multi_avg_fn(recipe.ema)
            self.average = AveragedModel(model, multi_avg_fn=average_fn, use_buffers=True)

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average

    def part(self, batches: Iterator[Batch], part: _Part, advance: Any) -> float:
        """Mean training loss; the only host sync is at the end."""
        self.model.train()
        total, count, done = torch.zeros((), device=self.device), 0, part.first
        for i, (x, y) in enumerate(islice(batches, part.first, part.last), part.first):
            for group in self.optimizer.param_groups:
                # The middle of the step: a warm-up never starts with a step of size 0.
                group["lr"] = self.recipe.lr_at(part.epoch + (i + 0.5) / self.steps, self.total)
            total += self._step(x, y) * len(y)
            count += len(y)
            done = i + 1
            if self.after_step is not None:
                index = part.epoch * self.steps + i
                self.after_step(Step(index, self.model, self.optimizer, (x, y)))
            advance()
        if done < part.last:
            raise DataEnded(part.epoch, done, part.last)
        return float(total) / max(count, 1)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        recipe, mean = self.recipe, torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        parts = zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate), strict=True)
        for part, labels in parts:
            with recipe.autocast(self.device):
                scores = self.model(part)
                loss = F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing)
            loss = loss * (len(labels) / len(y))
            self.scaler.scale(loss).backward()
            mean += loss.detach()
        if self.penalty is not None:
            self.scaler.scale(self.penalty(self.model)).backward()
        if recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return mean

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
        checkpoints.write(path, tensors, meta | {"run": fingerprint, "epochs": history.epochs})

    def load(self, path: Path, fingerprint: str, history: History) -> None:
        tensors, meta = checkpoints.read(path)
        if meta["run"] != fingerprint:
            raise ValueError(
                f"{path} belongs to another run (its fingerprint is {meta['run'][:12]}, this run's "
                f"{fingerprint[:12]}): remove it or name another checkpoint; one of a plan that dropped dead "
                "units goes on under that plan alone"
            )

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


def optimizer_for(
    parameters: list[nn.Parameter], recipe: Recipe, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """A recipe's optimiser; `capturable`: its steps may be part of a CUDA graph."""
    # fused: one pass over weights, gradients and moments
    options: dict[str, Any] = {
        "lr": torch.tensor(recipe.lr, device=parameters[0].device) if capturable else recipe.lr,
        "weight_decay": recipe.weight_decay,
        "fused": True,
    }
    if recipe.optimizer == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
        return torch.optim.SGD(parameters, **options)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, capturable=capturable, **options)


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
