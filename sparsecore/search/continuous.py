"""Continuous sparsification: weights and soft masks train together (Savarese, Silva & Maire 2020, arXiv 1912.04427)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import checkpoints, schema
from ..batches import Batch, EpochBatches, require_samples, size_of
from ..control import AbstractController, FixedPenalty, GradBalance, State, falling
from ..convert import batch_statistics, require_dense_parameters, sparse_layers
from ..copies import copied
from ..engine import (
    AbstractStep,
    EngineError,
    Layout,
    Timeline,
    Way,
    check_engine,
    compiled_call,
    feed_of,
    launch,
    plainly,
    state_kept,
    structure,
    takes_images,
)
from ..gates import Annealed
from ..granularity import Granularity, Weight
from ..kinds import check_fields
from ..loaders import batches_of
from ..losses import Loss, LossLike, loss_of
from ..patterns import Gated
from ..progress import QUIET, Progress
from ..recipe import Recipe, optimizer_for, steps_in_all
from ..sparsities import check_possible, check_sparsity
from ..tickets import Ticket
from ..tied import require_own_weights
from ..unsaved import Unsaved
from .epochs import StepEpochs, require_finite, run_epochs, way_of
from .kept import Kept
from .penalty import fit_penalty
from .protocol import Watch, require_full_precision
from .told import telling


@dataclass(frozen=True)
class ContinuousSparsification:
    """Trains weights w and mask logits s at once; the layer computes with w * sigmoid(T s) / sigmoid(s0).

    The temperature T rises exponentially, step by step, from 1 to `final_temperature`, so that the soft mask
    ends as the step 1[s > 0].  Nothing is drawn: the search is deterministic.  The ticket starts from the
    model's present weights, and those that were trained are dropped.

    In the paper a fixed penalty on sum sigmoid(T s) leads to a sparsity that nobody chose (in the provenance
    as "natural_sparsity").  Here a controller aims at a density that falls exponentially from sigmoid(s0) to
    the ticket's, and the ticket keeps exactly the best s; `FixedPenalty(weight)` is the paper's way.  SGD with
    the weights' rate moves s too little in a short search: Adam it is.

    Args:
        epochs: passes over the batches.
        initial: s0, the logits' first value.
        ramp: fraction of the search in which the density aimed at falls; what T has decided by then hardly moves.
        lr: Adam's on the logits, constant.
        recipe: the weights' optimiser, rate and schedule (over the search), momentum, weight_decay,
            label_smoothing, clip_norm and amp (not fp16); its other fields play no part.

    Errors: ValueError for a number out of range, or a recipe in fp16.
    """

    epochs: int = 12
    final_temperature: float = 200.0
    initial: float = 0.0
    control: AbstractController = field(default_factory=GradBalance)
    ramp: float = 0.7
    lr: float = 0.01
    recipe: Recipe = field(default_factory=Recipe)
    granularity: Granularity = field(default_factory=Weight)
    engine: str = field(default="auto", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_engine(self.engine)
        checks = (
            ("search epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("final_temperature", self.final_temperature, self.final_temperature >= 1, "at least 1"),
            ("initial", self.initial, abs(self.initial) < 10, "a number between -10 and 10"),
            ("ramp", self.ramp, 0 <= self.ramp <= 1, "0 <= ramp <= 1"),
            ("search lr", self.lr, 0 < self.lr < math.inf, "a positive number"),
            ("recipe amp", self.recipe.amp, self.recipe.amp != "fp16", "null or bf16"),
        )  # fmt: skip
        for name, value, good, expected in checks:
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {value}")

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
        """The ticket of exactly the highest logits over all layers.

        The model is never touched: the search works on a copy.

        Args:
            sparsity: fraction removed, in (0, 1).
            checkpoint: written after every epoch; if it exists, the search goes on from there with
                the numbers of an uninterrupted run, and it stays until the ticket is saved.
            watch: measured after every epoch on the soft network, with the weights it trained; BatchNorm
                then takes the statistics of the batches it is measured on.

        Errors: ValueError for bad arguments; SearchError if the objective is not finite, or for a
        checkpoint of another search.
        """
        batches = batches_of(batches, model, steps_per_epoch)
        given = loss_of(loss)
        by = given.smoothed(self.recipe.label_smoothing)
        checkpoints.check_resumable(checkpoint, batches)
        if self.control == FixedPenalty():
            return fit_penalty(
                self, model, batches, sparsity=sparsity, progress=progress, checkpoint=checkpoint,
                watch=watch, facts=(self, sparsity), loss=given,
            )  # fmt: skip
        layers = require_dense_parameters(model)
        require_own_weights(model)
        require_full_precision(layers)
        if check_sparsity(sparsity) == 0:
            raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        check_possible(shapes, sparsity, self.granularity)
        run = ""
        if checkpoint is not None:
            run = checkpoints.fingerprint(model, batches, self, sparsity, loss=given)
        net = copied(model)
        with batch_statistics(net):
            saved = way_of(checkpoint, run)
            work = _ContinuousEpochs(self, net, 1 - sparsity, batches, watch, saved, by)
            progress.tell("engine", work.engine.told)
            records = run_epochs(
                work,
                self.epochs,
                run=run,
                progress=progress,
                checkpoint=checkpoint,
            )
        meta = self._meta(sparsity) | {"loss": by.name}
        meta |= {"natural_sparsity": work.natural_sparsity(), "progress": records}
        meta["engine"] = str(work.engine.way)
        scores = require_finite({n: p.logits.detach() for n, p in work.gated.items()})
        ticket = Ticket.from_scores(scores, model, sparsity, self.granularity, meta=meta)
        return replace(ticket, unsaved=Unsaved.of([checkpoint])[0])

    @property
    def first_density(self) -> float:
        """sigmoid(s0)."""
        return 1 / (1 + math.exp(-self.initial))

    def temperature(self, index: int, steps: int) -> float:
        """T at step `index` of `steps`: 1 at the first, `final_temperature` at the last."""
        return self.final_temperature ** (index / max(steps - 1, 1))

    def target(self, density: float, index: int, steps: int) -> float:
        """The density that the controller aims at in step `index` of `steps`, for a ticket of `density`."""
        length = self.ramp * steps * self.control.aims
        return self.control.target(falling(self.first_density, density, index, length))

    def _meta(self, sparsity: float) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "method": "continuous",
            "sparsity": sparsity,
            "seed": None,  # nothing is drawn
            "search_epochs": self.epochs,
            "search_lr": self.lr,
            "final_temperature": self.final_temperature,
            "initial": self.initial,
            "control": repr(self.control),
            "ramp": self.ramp,
            "optimizer": recipe.optimizer,
            "lr": recipe.lr,
            "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay,
            "clip_norm": recipe.clip_norm,
        }


class _ContinuousStep(AbstractStep):
    """The weights' optimiser and the logits' on one gradient of a gated network; `total` sums loss * samples."""

    def __init__(
        self,
        search: ContinuousSparsification,
        net: nn.Module,
        gated: dict[str, Gated],
        kept: Kept,
        timeline: Timeline,
        loss: Loss,
    ) -> None:
        self.loss = loss
        self.search, self.model, self.gated = search, net, gated
        self.kept, self.timeline = kept, timeline
        self.logits = [pattern.logits for pattern in gated.values()]
        own = set(map(id, self.logits))
        self.weights = [p for p in net.parameters() if p.requires_grad and id(p) not in own]
        self.device = self.logits[0].device
        self.total = torch.zeros((), device=self.device, dtype=torch.float32)
        self.optimizer = optimizer_for(self.weights, search.recipe, lr=timeline.now["lr"])
        capturable = self.device.type == "cuda"
        self.gates = torch.optim.Adam(self.logits, lr=search.lr, fused=True, capturable=capturable)
        self.control: State = search.control.init(self.device)
        self.lr = torch.tensor(search.lr, device=self.device, dtype=torch.float32)
        self.call: Callable[..., Any] = plainly
        self.layout = Layout([net], [self.optimizer, self.gates])

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> None:
        search, recipe, timeline = self.search, self.search.recipe, self.timeline
        require_samples(batch)
        timeline.advance()
        batch = self.layout.of(batch)
        with recipe.autocast(self.device):
            loss = self.loss(self.model, batch, self.call)
        parameters = [*self.weights, *self.logits]
        # A layer the forward does not reach has no gradient: zeros.
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        count = len(self.weights)
        gate = next(iter(self.gated.values())).gate
        target = timeline.now["target"][0].float()
        pulled, control = self.kept.pulled(
            search.control, self.control, gate, self.logits, grads[count:], target, self.lr
        )
        for name, value in control.items():  # in place: a graph knows no other address
            self.control[name].copy_(value)
        for p, grad in zip(parameters, (*grads[:count], *pulled), strict=True):
            p.grad = grad
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.weights, recipe.clip_norm)
        self.optimizer.step()
        self.gates.step()
        self.total += loss.detach() * size_of(batch)

    def changes(self) -> list[Tensor]:
        found = [*self.model.parameters(), *self.control.values(), self.total]
        for optimizer in (self.optimizer, self.gates):
            slots = [v for slots in optimizer.state.values() for v in slots.values()]
            found += [v for v in slots if isinstance(v, Tensor)]
        return found + self.timeline.changes()

    @contextmanager
    def undone(self) -> Iterator[None]:
        with super().undone(), state_kept(self.optimizer, self.gates):
            yield

    def facts(self) -> Any:
        return super().facts(), structure(self.model), self.search.recipe.amp

    def become(self, way: Way) -> Self:
        if way.compiled and self.loss.takes_model:
            raise EngineError(
                f"engine {way.name}: a loss of (model, batch) calls the model by itself, which is not compiled then; "
                "use engine=eager, or a loss of (output, target)"
            )
        self.layout.become(way.channels_last)
        self.call = compiled_call(repr(self.facts())) if way.compiled else plainly
        return self


class _ContinuousEpochs(StepEpochs):
    """Epochs of `net`, a copy that is gated here."""

    def __init__(
        self,
        search: ContinuousSparsification,
        net: nn.Module,
        density: float,
        batches: EpochBatches,
        watch: Watch | None,
        saved: str | None,
        loss: Loss | None = None,
    ) -> None:
        by = (loss or Loss()).smoothed(search.recipe.label_smoothing)
        super().__init__(batches, watch, by)
        self.net = net
        steps = steps_in_all(search.epochs, self.length)
        layers = sparse_layers(net)
        device = next(net.parameters()).device
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        self.kept = Kept(shapes, search.granularity, device)
        epochs = [(i + 0.5) / self.length for i in range(steps)]
        targets = [search.target(density, i, steps) * self.kept.count for i in range(steps)]
        self.timeline = Timeline(
            {
                "lr": [search.recipe.lr_at(e, search.epochs) for e in epochs],
                "temperature": [search.temperature(i, steps) for i in range(steps)],
                "target": targets,
            },
            device,
        )
        gate = Annealed(self.timeline.now["temperature"][0])
        self.gated: dict[str, Gated] = {}
        for name, layer in layers.items():
            layer.raw_weight.requires_grad_()
            pattern = Gated(
                shapes[name],
                Annealed(),
                search.granularity,
                density=search.first_density,
                gain=True,
                device=device,
            )
            pattern.gate = gate
            assert pattern.log_gain is not None
            # 1 / sigmoid(s0): a constant here.
            pattern.log_gain.requires_grad_(False).fill_(-math.log(search.first_density))
            layer.pattern = self.gated[name] = pattern
        step = self.step = _ContinuousStep(search, net, self.gated, self.kept, self.timeline, by)
        self.engine = launch(
            step.become,
            feed_of(batches, device),
            engine=search.engine,
            steps=steps,
            saved=saved,
            layouts=takes_images(net),
        )

    def natural_sparsity(self) -> float:
        """The share of weights that 1[s > 0] removes."""
        kept = 0.0
        for s, size in zip(self.step.logits, self.kept.sizes, strict=True):
            opened = s.detach() > 0
            kept += float(opened.sum() if size is None else size[opened].sum())
        return 1 - kept / self.kept.count

    def measure(self, watch: Watch) -> float:
        return watch(self.net)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        gates = checkpoints.pack_optimizer(self.step.gates)
        tensors = checkpoints.pack_optimizer(self.step.optimizer) | self._own()
        tensors |= {f"gates/{name}": value for name, value in gates.items()}
        return tensors, {"engine": str(self.engine.way)}

    def _own(self) -> dict[str, Tensor]:
        """What is there from the start."""
        control = {f"control/{name}": value for name, value in self.step.control.items()}
        return control | {f"net/{name}": p.detach() for name, p in self.net.named_parameters()}

    def load(self, tensors: dict[str, Tensor], rest: dict[str, Any], epochs: int) -> None:
        found, moments = checkpoints.apart(tensors, "optimizer/")
        found, gates = checkpoints.apart(found, "gates/")
        own = self._own()
        found = schema.tensors(found, own, "search")
        gates = {name.removeprefix("gates/"): value for name, value in gates.items()}
        checkpoints.unpack_optimizer(self.step.gates, gates)
        checkpoints.unpack_optimizer(self.step.optimizer, moments)
        for name, value in own.items():
            value.copy_(found[name])
