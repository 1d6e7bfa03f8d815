"""One training run from inside: its parts, its moving parts, what it leaves."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import NotRequired, TypedDict

from . import checkpoints, schema
from .batches import Batch, EpochBatches
from .convert import sparse_layers
from .copies import copying
from .engine import (
    Evaluation,
    Timeline,
    TrainingStep,
    Way,
    feed_of,
    launch,
    takes_images,
)
from .engine.training_step import Penalty
from .evaluating import evaluate as evaluate
from .loss_functions import own_parameters
from .losses import Loss
from .patterns import Planned
from .process import between_steps
from .recipe import Recipe, optimizer_for, rates
from .writing import FileError


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

    A record holds "epoch", "lr", "loss", "seconds", and of the test data "accuracy" where there are classes for sure,
    "test_loss" where there are none, or the "metric" that was asked for.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[float, dict[str, Tensor]] = field(default_factory=dict)
    engine: str = ""  # how steps were launched, and why if there was a choice
    way: str = ""  # the same without why
    unreached: list[str] | None = (
        None  # parameters that no step gave a gradient; None: no step was taken
    )

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch, percent.  Errors: ValueError where none was measured."""
        last = self.epochs[-1] if self.epochs else {}
        if "accuracy" not in last:
            got = next((name for name in ("test_loss", "metric") if name in last), "no test data")
            raise ValueError(
                f"accuracy: expected test data and a loss of class scores, got records of {got}; give test_batches, "
                "and metric='accuracy' where the highest output is the prediction"
            )
        return last["accuracy"]

    @property
    def seconds(self) -> float:
        """Training and evaluation time of all epochs."""
        return sum(epoch["seconds"] for epoch in self.epochs)


class Part(NamedTuple):
    """The batches first ... last - 1 of an epoch, and the epoch that is reached by then."""

    epoch: int
    first: int
    last: int
    end: float

    @property
    def count(self) -> int:
        return self.last - self.first


def parts_between(
    start: float, stop: float, between: Collection[float], batches: int
) -> list[Part]:
    """A run cut at the ends of epochs and wherever a snapshot is due."""
    whole = range(math.ceil(start), math.floor(stop) + 1)
    cuts = sorted({start, stop, *whole, *(e for e in between if start < e < stop)})
    parts = []
    for a, b in pairwise(cuts):
        epoch = math.floor(a)
        first, last = round((a - epoch) * batches), round((b - epoch) * batches)
        parts.append(Part(epoch, first, last, b))
    return parts


class Run:
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
        metric: Loss | Literal["accuracy"] | None,
    ) -> None:
        self.loss = loss
        self.metric: Loss | Literal["accuracy"] | None = metric
        self.unmoved = [*own_parameters(loss, model).values()]
        self.model, self.recipe, self.total, self.penalty = model, recipe, total, penalty
        self.steps, self.test_batches = max(len(batches), 1), test_batches
        self.device = next(model.parameters()).device
        if recipe.amp == "fp16" and self.device.type == "cpu":
            raise ValueError("recipe amp: fp16 needs a GPU; use bf16 on the CPU")
        self.feed = feed_of(batches, self.device)
        lr = rates(recipe, total, stop, self.steps)
        self.timeline = Timeline({"lr": lr if len(lr) else [recipe.lr]}, self.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer_for(parameters, recipe, lr=self.timeline.now["lr"])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.average = None
        if recipe.ema is not None:
            with copying(model):
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
        self.training = self._step()
        self.engine = launch(
            self.training.become,
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
        if isinstance(self.metric, Loss):
            return {"metric": found.loss}
        if self.evaluation.classes:
            return {"accuracy": found.accuracy}
        return {"test_loss": found.loss}

    def part(self, part: Part, advance: Any) -> float:
        """Mean training loss; the only host sync is at the end."""
        self.model.train()
        step, first = self.training, part.epoch * self.steps + part.first
        step.clear()
        self.timeline.to(first)
        self.engine.begin(part.epoch, part.first)
        for index in range(first, first + part.count):
            self.engine()
            if self.after_step is not None:
                self.after_step(Step(index, self.model, self.optimizer, self.feed.present))
                self.engine.refresh()
            advance()
            between_steps()
        for p in self.unmoved:  # nobody sets them back
            p.grad = None
        return step.mean()

    def snapshot(self) -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def finish(self, history: History) -> None:
        """The average, where there is one, is what the caller gets."""
        if (unreached := self.training.unreached) is not None:
            missed = set(map(id, unreached))
            history.unreached = [n for n, p in self.model.named_parameters() if id(p) in missed]
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())

    def save(self, path: Path, fingerprint: str, history: History) -> None:
        tensors = checkpoints.pack_optimizer(self.optimizer, self.model) | self._own()
        for epoch, state in history.snapshots.items():
            tensors |= {f"snapshot/{epoch}/{k}": v for k, v in state.items()}
        meta = {"scaler": self.scaler.state_dict(), "seconds": history.seconds}
        meta |= {"run": fingerprint, "epochs": history.epochs, "engine": str(self.engine.way)}
        checkpoints.write(path, tensors, meta)

    def _own(self) -> dict[str, Tensor]:
        """What is there from the start, by the names of a checkpoint."""
        own = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            own |= {f"average/{k}": v for k, v in self.average.state_dict().items()}
        return own

    def load(self, saved: Saved, history: History) -> None:
        """Errors: FileError for what `save` did not write of this run, with nothing changed."""
        tensors, meta = saved
        ends = [record["epoch"] for record in meta["epochs"]]
        if not ends or ends != sorted(set(ends)):
            raise FileError("training: expected records of ever later epochs, got others")
        Way.of(meta["engine"])
        found, moments = checkpoints.apart(tensors, "optimizer/")
        found, snapshots = checkpoints.apart(found, "snapshot/")
        found = schema.tensors(found, self._own(), "training")
        states = self._states(snapshots)
        checkpoints.check_optimizer(self.optimizer, moments, self.model)
        self._check_average(found)
        self.model.load_state_dict(_below("model/", found))
        # After the model, whose masks may be others by now: they say which moments are held.
        checkpoints.unpack_optimizer(self.optimizer, moments, self.model)
        if self.average is not None:
            self.average.load_state_dict(_below("average/", found))
        if meta["scaler"]:  # {} where there is none
            self.scaler.load_state_dict(meta["scaler"])
        history.epochs = meta["epochs"]
        history.snapshots |= states

    def _check_average(self, found: dict[str, Tensor]) -> None:
        """Errors: FileError for an average of other places than a planned model's: they are added entry by entry."""
        layers = [n for n, m in sparse_layers(self.model).items() if isinstance(m.pattern, Planned)]
        for name in layers if self.average is not None else ():
            key = f"{name}.pattern.mask".lstrip(".")
            if not torch.equal(found[f"model/{key}"], found[f"average/module.{key}"]):
                raise FileError(f"average: expected the mask of {name or 'the model'}, got another")

    def _states(self, tensors: dict[str, Tensor]) -> dict[float, dict[str, Tensor]]:
        """Snapshots by epoch."""
        states: dict[float, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name = key.split("/", 2)[2] if key.count("/") > 1 else ""
            states.setdefault(epoch_of(key), {})[name] = value
        own = self.model.state_dict()
        return {e: schema.tensors(state, own, f"snapshot {e:g}") for e, state in states.items()}


def epoch_of(key: str) -> float:
    """Of a snapshot's key in a checkpoint, snapshot/EPOCH/NAME.  Errors: FileError for one of something else."""
    text = key.split("/")[1]
    try:
        return float(text)
    except ValueError:
        raise FileError(f"snapshot: expected an epoch, got {text[:40]!r}") from None


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Record(TypedDict):
    """What a part of a run has to tell, as checkpoints keep it."""

    epoch: Annotated[float, schema.Range(0)]
    lr: float
    loss: float
    seconds: schema.Seconds
    accuracy: NotRequired[schema.Percent]
    test_loss: NotRequired[schema.Number]
    metric: NotRequired[schema.Number]
    watched: NotRequired[schema.Number]


class _Scaler(TypedDict):
    """Of `torch.amp.GradScaler`; none of it where there is none."""

    scale: NotRequired[Annotated[float, schema.Range(2.0**-126, 2.0**127)]]
    growth_factor: NotRequired[Annotated[float, schema.Range(1, 2.0**20)]]
    backoff_factor: NotRequired[Annotated[float, schema.Range(2.0**-20, 1)]]
    growth_interval: NotRequired[Annotated[int, schema.Range(1, 2**31)]]
    _growth_tracker: NotRequired[Annotated[int, schema.Range(0, 2**31)]]


class Facts(TypedDict):
    """What a training's checkpoint says beside tensors."""

    run: str
    seconds: schema.Seconds
    engine: str
    epochs: list[Record]
    scaler: _Scaler
