"""What all searches by trained gates share: gates put into a model, epochs of steps, a ticket of the best-scored."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .. import checkpoints
from ..batches import EpochBatches
from ..control import AbstractController, FixedPenalty, GradBalance, falling
from ..convert import batch_statistics, require_dense_parameters
from ..engine import check_engine
from ..gates import AbstractGate, Concrete
from ..granularity import Granularity, Weight
from ..interrupts import ending_with
from ..kinds import check_fields
from ..layer import SparseLayer
from ..loaders import batches_of
from ..losses import Loss, LossLike, loss_of
from ..objectives import Objective, reverse_kl
from ..patterns import Gated
from ..progress import QUIET, Progress
from ..sparsities import check_possible, check_sparsity
from ..tickets import Ticket
from ..tied import require_own_weights
from ..unsaved import Unsaved
from .epochs import require_finite, run_epochs, way_of
from .gate_epochs import GateEpochs
from .many_step import ManyStep
from .penalty import fit_penalty
from .plain_step import PlainStep
from .protocol import Watch, require_full_precision
from .steps import FusedStep, Members, SearchStep
from .told import telling

T = TypeVar("T")
Member = tuple[float, int]  # a ticket's sparsity, and the seed of its gates' noise


@dataclass(frozen=True)
class AbstractGateSearch(ABC):
    """Trains one logit per unit of every sparse layer; a ticket keeps the units with the highest.

    Args:
        epochs: passes over the batches.
        lr: Adam's on the logits; times `lr_drop` from the fraction `lr_drop_at` of the search on.
        gain_lr: Adam's for one gain per layer, log-scaled, which makes up for the signal that the removed
            weights carried; training takes the gains' place, so they are dropped.  0 leaves them out.
        start_density: expected share of open gates that the search starts with; None: the ticket's own.
        ramp: fraction of the search in which the density aimed at falls, exponentially, from `start_density`
            to the ticket's own; 0: it is the ticket's from the start.
        seed: of the gates' noise.
        dtype: in which the networks compute; float32, bfloat16 or float16 (by autocast).
        channels_last: whether convolutions compute in that memory format; None: where it measures faster.
        engine: how steps are launched: "eager", "graph" (one CUDA graph), "compile", "compile-graph", or "auto", the
            one of these that a few steps find fastest.

    Errors: ValueError for a number out of range or another dtype.
    """

    epochs: int | None = 10
    objective: Objective = reverse_kl
    control: AbstractController = field(default_factory=GradBalance)
    gate: AbstractGate | None = field(default_factory=lambda: Concrete(tau=1.0))
    granularity: Granularity = field(default_factory=Weight)
    lr: float = 0.1
    gain_lr: float = 0.01
    lr_drop: float = 0.1
    lr_drop_at: float = 0.88
    start_density: float | None = None
    ramp: float | None = 0.0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    channels_last: bool | None = None
    engine: str = field(default="auto", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_engine(self.engine)
        start = self.start_density
        checks = (
            ("search epochs", self.epochs, self.epochs is None or self.epochs >= 1, "at least 1"),
            ("search lr", self.lr, 0 < self.lr < math.inf, "a positive number"),
            ("gain_lr", self.gain_lr, 0 <= self.gain_lr < math.inf, "0 (no gains) or more"),
            ("lr_drop", self.lr_drop, 0 <= self.lr_drop <= 1, "a factor of 0 to 1"),
            ("lr_drop_at", self.lr_drop_at, 0 <= self.lr_drop_at <= 1, "a fraction of 0 to 1"),
            ("start_density", start, start is None or 0 < start < 1, "null or 0 < density < 1"),
            ("ramp", self.ramp, self.ramp is None or 0 <= self.ramp <= 1, "0 <= ramp <= 1"),
            (
                "dtype",
                self.dtype,
                self.dtype in (torch.float32, torch.bfloat16, torch.float16),
                "float32, bfloat16 or float16",
            ),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {value}")

    @property
    @abstractmethod
    def name(self) -> str:
        """The method's, for the ticket's provenance."""

    @property
    def trains_weights(self) -> bool:
        """Whether weights move during the search; they are put back at its end."""
        return False

    def epochs_for(self, sparsity: float) -> int:
        """Passes over the batches for a ticket of `sparsity`.  Errors: ValueError where that is not said."""
        return self._said("search epochs", self.epochs)

    def gate_for(self, sparsity: float) -> AbstractGate:
        """The gate for a ticket of `sparsity`.  Errors: as `epochs_for`."""
        return self._said("gate", self.gate)

    def ramp_for(self, sparsity: float) -> float:
        """The fraction of the search in which the density falls to that of `sparsity`.  Errors: as `epochs_for`."""
        return self._said("ramp", self.ramp)

    def _said(self, what: str, value: T | None) -> T:
        if value is None:
            raise ValueError(f"{what} of {self.name}: expected a value, got None")
        return value

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
        """The ticket of exactly the best-scored gates; the model is returned to its former state.

        Where the gates themselves ended is in the provenance, `meta["natural_sparsity"]`: much below the sparsity
        asked for, the search was too short, and the ticket cuts what they still used.

        Args:
            model: with sparse layers (`sparsify_`), holding the weights the ticket shall start from.
            sparsity: fraction removed, in (0, 1).
            checkpoint: written after every epoch; if it exists, the search goes on from there with
                the numbers of an uninterrupted run, and it stays until the ticket is saved.
            watch: measured after every epoch with the gates at their mean ("accuracy") and with the ticket that
                would be found by then ("hard_accuracy"); in the provenance under "progress".

        Errors: ValueError for bad arguments; SearchError if the objective is not finite.
        """
        batches, by = batches_of(batches, model, steps_per_epoch), loss_of(loss)
        checkpoints.check_resumable(checkpoint, batches)
        members = [(sparsity, self.seed)]
        if self.control == FixedPenalty():
            return fit_penalty(
                self, model, batches, sparsity=sparsity, progress=progress, checkpoint=checkpoint,
                watch=watch, facts=self._facts(members), loss=by,
            )  # fmt: skip
        return self._find(model, batches, members, progress, checkpoint, watch, by)[0]

    def _find(
        self,
        model: nn.Module,
        batches: EpochBatches,
        members: list[Member],
        progress: Progress,
        checkpoint: Path | None,
        watch: Watch | None,
        loss: Loss,
    ) -> list[Ticket]:
        if self.objective.classes and not loss.has_classes:
            raise ValueError(
                f"objective {self.objective.name}: expected a loss with classes, got {loss.name}; use objectives.task, "
                "objectives.loss_change or another of the loss alone"
            )
        model = self._searched(model, members[0][0])
        layers = require_dense_parameters(model)
        require_own_weights(model)
        require_full_precision(layers, double=not self.fusible)
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        for sparsity, _ in members:
            if check_sparsity(sparsity) == 0:
                raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
            check_possible(shapes, sparsity, self.granularity)
        run = ""
        if checkpoint is not None:
            run = checkpoints.fingerprint(model, batches, self._facts(members), loss=loss)
        with self._gated(model, layers, members[0][0]) as gated:
            epochs = self.epochs_for(members[0][0])
            saved = way_of(checkpoint, run)
            work = GateEpochs(self, model, gated, members, batches, watch, saved, loss)
            progress.tell("engine", work.engine.told)
            records = run_epochs(
                work,
                epochs,
                run=run,
                progress=progress,
                checkpoint=checkpoint,
            )
            found = [require_finite(scores) for scores in work.scores()]
        tickets = []
        for i, (scores, member) in enumerate(zip(found, members, strict=True)):
            meta = self._meta(*member)
            meta["loss"] = loss.name
            meta["engine"] = str(work.engine.way)
            mine = [record["tickets"][i] for record in records]
            meta["objective_by_epoch"] = [record["objective"] for record in mine]
            meta["progress"] = [record["progress"] for record in mine]
            meta["natural_sparsity"] = meta["progress"][-1]["sparsity"]
            ticket = Ticket.from_scores(
                scores, model, meta["sparsity"], self.granularity, meta=meta
            )
            tickets.append(self._finish(ticket, model, batches))
        left = Unsaved.of([checkpoint], len(tickets))
        return [replace(t, unsaved=own) for t, own in zip(tickets, left, strict=True)]

    def _facts(self, members: list[Member]) -> tuple[Any, ...]:
        """What tells a run apart, besides data and weights."""
        return (
            *(self._meta(*m) for m in members),
            self.lr_drop,
            self.lr_drop_at,
            str(self.granularity),
        )

    def _searched(self, model: nn.Module, sparsity: float) -> nn.Module:
        """The model that is searched, whose weights the ticket brings."""
        return model

    def _finish(self, ticket: Ticket, model: nn.Module, batches: EpochBatches) -> Ticket:
        """What is left to do once the model is as it was."""
        return ticket

    def _first_density(self, sparsity: float) -> float:
        return 1 - sparsity if self.start_density is None else self.start_density

    def targets(self, density: float, steps: int) -> list[float]:
        """The density that GradBalance and its like aim at in each of `steps` steps, for a ticket of `density`."""
        first, share = self._first_density(1 - density), self.ramp_for(1 - density)
        length = share * steps * self.control.aims
        return [self.control.target(falling(first, density, t, length)) for t in range(steps)]

    def _meta(self, sparsity: float, seed: int) -> dict[str, Any]:
        meta = {
            "method": self.name,
            "objective": self.objective.name,
            "control": repr(self.control),
            "gate": repr(self.gate_for(sparsity)),
            "sparsity": sparsity,
            "seed": seed,
            "search_epochs": self.epochs_for(sparsity),
            "search_lr": self.lr,
            "gain_lr": self.gain_lr,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.start_density is not None:
            meta |= {"start_density": self.start_density, "ramp": self.ramp_for(sparsity)}
        return meta

    def _step(
        self,
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> SearchStep:
        """The step that suits the gate, the objective and the device."""
        if self.fusible:
            kind = FusedStep if len(members) == 1 else ManyStep
            return kind(self, model, gated, members, loss)
        if self.dtype == torch.float32 and not self.channels_last and len(members) == 1:
            return PlainStep(self, model, gated, members, loss)
        raise ValueError(
            "search dtype, channels_last and many: expected float32, False and one search for the "
            f"objective {self.objective.name} with {self.gate}, which the fused step does not know"
        )

    @property
    def fusible(self) -> bool:
        """Whether `kernels.GateBank` knows the gate and the objective differentiates once."""
        known = self.gate is None or self.gate.spec is not None
        return known and not self.objective.second_order

    @contextmanager
    def _gated(
        self, model: nn.Module, layers: dict[str, SparseLayer], sparsity: float
    ) -> Iterator[dict[str, Gated]]:
        """Gates in every sparse layer, parameters frozen unless they train; undone on leaving."""
        gate, density = self.gate_for(sparsity), self._first_density(sparsity)
        patterns = {name: layer.pattern for name, layer in layers.items()}
        required = {p: p.requires_grad for p in model.parameters()}
        memory = {p: p.data for p in required}
        grads = {p: p.grad for p in required}
        values = {p: p.detach().clone() for p in required} if self.trains_weights else {}
        gated = {}

        def put_back() -> None:
            for name, layer in layers.items():
                layer.pattern = patterns[name]
            for p, flag in required.items():
                p.requires_grad_(flag)
                p.data, p.grad = memory[p], grads[p]
                if p in values:
                    p.data.copy_(values[p])

        with batch_statistics(model), ending_with(put_back):
            if not self.trains_weights:
                for p in required:
                    p.requires_grad_(False)
            for index, (name, layer) in enumerate(layers.items()):
                gated[name] = layer.pattern = Gated(
                    layer.raw_weight.shape,
                    gate,
                    self.granularity,
                    density=density,
                    seed=self.seed,
                    layer=index,
                    gain=self.gain_lr > 0,
                    device=layer.raw_weight.device,
                )
            yield gated
