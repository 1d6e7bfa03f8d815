"""What all training under moving masks shares: a copy of the model trains, its masks are updated after some steps.

An update follows from the seed, the step and what a checkpoint of `training.train` holds, so that a killed run
goes on to the same ticket.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..convert import require_dense_parameters, sparse_layers
from ..copies import copied
from ..engine import check_engine
from ..granularity import Granularity, Weight
from ..kinds import check_fields
from ..layer import SparseLayer
from ..loaders import batches_of
from ..losses import Loss, LossLike, loss_of
from ..patterns import Masked
from ..progress import QUIET, Progress
from ..recipe import Recipe
from ..remasking import remask_
from ..sparsities import check_possible, check_sparsity
from ..telling import note_training
from ..tickets import Ticket, dense_state
from ..training import Step, train
from ..unsaved import Unsaved
from .protocol import SearchError, Watch
from .told import telling

Shapes = Mapping[str, torch.Size]
Masks = dict[str, Tensor]  # bool by layer, of the weight's shape


class Due(NamedTuple):
    """An update of the masks that is due."""

    step: Step  # the last one taken
    taken: int  # steps since training began
    amount: float  # as the schedule has it
    sparsity: float  # that the ticket shall have
    counts: Mapping[str, int]  # weights that each layer's first mask kept
    loss: Loss | None = None  # None: the default one


@dataclass(frozen=True)
class AbstractSparseTraining(ABC):
    """Trains a copy of the model under masks that are updated as it goes.

    Args:
        recipe: how the weights train; without an average (`ema`), which would mix networks of several masks.
        epochs: how many are trained.
        start_epoch: of the model's present weights; the schedule of `recipe` spans start_epoch + epochs.
        granularity: of masks; a unit is ranked by the mean over its weights.
        seed: of all that is random.
        engine: how steps are launched (`train`); a graph is captured anew after each update.

    Errors: ValueError for a value out of range.
    """

    recipe: Recipe
    epochs: float
    start_epoch: float = 0
    granularity: Granularity = field(default_factory=Weight)
    seed: int = 0
    engine: str = field(default="auto", repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        check_engine(self.engine)
        for name, (good, expected) in self._checks().items():
            if not good:
                value = getattr(self.recipe if name == "ema" else self, name)
                raise ValueError(f"{self.name} {name}: expected {expected}, got {value!r}")

    def _checks(self) -> dict[str, tuple[bool, str]]:
        """Whether each field is in range, and what that is."""
        return {
            "epochs": (0 < self.epochs < math.inf, "a positive number"),
            "start_epoch": (0 <= self.start_epoch < math.inf, "0 or more"),
            "ema": (self.recipe.ema is None, "a recipe with ema=None, since masks move"),
        }

    @property
    @abstractmethod
    def name(self) -> str:
        """As tickets tell their method."""

    @property
    def finished(self) -> bool:
        """Whether tickets hold the trained weights."""
        return True

    @abstractmethod
    def schedule(self, steps: int, length: int) -> dict[int, float]:
        """By number of steps taken, how much an update then changes; `length`: steps in an epoch."""

    @abstractmethod
    def start(self, shapes: Shapes, sparsity: float) -> Masks:
        """The first masks, on the CPU.  Errors: ValueError for a sparsity that they cannot have."""

    @abstractmethod
    def update(self, due: Due) -> Masks:
        """The masks from now on."""

    @telling
    def __call__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        sparsity: float,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
        watch: Watch | None = None,
        loss: LossLike = None,
        steps_per_epoch: int | None = None,
    ) -> Ticket:
        """The trained network under its last masks; the model itself is not touched.

        Args:
            model: with sparse layers (`sparsify_`) whose weights require gradients.
            sparsity: fraction removed, in (0, 1).
            checkpoint: written after every epoch, as `train` does.
            watch: measured after every epoch; in the provenance under "progress".

        Errors: ValueError for bad arguments or a run too short for any update; SearchError for training that
        fails or a checkpoint of another run.
        """
        batches = batches_of(batches, model, steps_per_epoch)
        by = loss_of(loss)
        layers = require_dense_parameters(model)
        _refuse_untrainable(layers)
        if check_sparsity(sparsity) == 0:
            raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
        end, length = self.start_epoch + self.epochs, len(batches)
        first = _steps(self.start_epoch, length)
        steps = _steps(end, length) - first
        schedule = self.schedule(steps, length)
        if not (steps and schedule):
            raise ValueError(
                f"{self.name}: expected a run with at least one update of its masks, got {steps} steps in "
                f"epochs of {length}: train for longer or update more often"
            )
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        check_possible(shapes, sparsity, self.granularity)
        masks = self.start(shapes, sparsity)
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        network = copied(model)
        for name, layer in sparse_layers(network).items():
            layer.set_mask_(masks[name])

        def after_step(step: Step) -> None:
            taken = step.index + 1 - first
            if taken in schedule:
                due = Due(step, taken, schedule[taken], sparsity, counts, by)
                remask_(network, self.update(due), step.optimizer)

        try:
            history = train(
                network,
                batches,
                None,
                self.recipe,
                start_epoch=self.start_epoch,
                stop_epoch=end,
                total_epochs=end,
                seed=self.seed,
                after_step=after_step,
                watch=watch,
                facts=(self, sparsity),
                checkpoint=checkpoint,
                progress=progress,
                engine=self.engine,
                loss=by,
            )
        except ValueError as error:
            raise SearchError(f"{self.name}: {error}") from error
        note_training(network, history.unreached)
        meta = self._meta(sparsity) | {"updates": len(schedule), "engine": history.way}
        meta["loss"] = by.name
        if watch is not None:
            meta["progress"] = [
                {"epoch": record["epoch"], "accuracy": record["watched"]}
                for record in history.epochs
            ]
        masks = {name: mask.cpu() for name, mask in masks_of(network).items()}
        weights = dense_state(network if self.finished else model)
        return Ticket(masks, weights, meta, unsaved=Unsaved.of([checkpoint])[0])

    def _meta(self, sparsity: float) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        recipe = asdict(self.recipe) | {"milestones": list(self.recipe.milestones)}
        return own | {
            "method": self.name,
            "sparsity": sparsity,
            "recipe": recipe,
            "granularity": str(self.granularity),
            "finished": self.finished,
            "torch": torch.__version__,
        }


def masks_of(model: nn.Module) -> Masks:
    """The present masks, on their device."""
    found = {}
    for name, layer in sparse_layers(model).items():
        assert isinstance(layer.pattern, Masked)
        found[name] = layer.pattern.mask
    return found


def _steps(epoch: float, length: int) -> int:
    """Steps before a point in time, as `train` rounds them."""
    whole = math.floor(epoch)
    return whole * length + round((epoch - whole) * length)


def _refuse_untrainable(layers: Mapping[str, SparseLayer]) -> None:
    frozen = [name for name, layer in layers.items() if not layer.raw_weight.requires_grad]
    if frozen:
        raise ValueError(
            f"sparse training: expected weights that require gradients, got frozen ones in "
            f"{', '.join(frozen[:4])}: call requires_grad_(True) on them or leave them dense"
        )
