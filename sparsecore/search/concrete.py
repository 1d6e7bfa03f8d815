"""Concrete Ticket Search: train one gate logit per unit on frozen weights (arXiv 2512.07142)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .. import checkpoints
from ..batches import EpochBatches
from ..control import AbstractController, GradBalance
from ..convert import batch_statistics, require_dense_parameters
from ..gates import AbstractGate, Concrete
from ..granularity import Granularity, Weight
from ..nn import SparseLayer
from ..objectives import Objective, TeacherMemory, reverse_kl
from ..patterns import Gated
from ..progress import QUIET, Progress
from ..sparsities import check_sparsity, masks_from_scores
from ..tickets import Ticket
from .graph import Feed
from .protocol import SearchError
from .steps import FusedStep, LayerwiseStep, ManyStep, PlainStep, SearchStep


@dataclass(frozen=True)
class ConcreteSearch:
    """Finds a ticket in a model's present weights, which stay as they are.

    With `rewind` weights (a few epochs of dense training first) and `reverse_kl` this is the paper's
    best variant, CTS-KL; from untrained weights use `objectives.task`.

    Args:
        epochs: passes over the batches; the paper's "short" is 12.5 % of the training epochs.
        gate: the paper's is Concrete(tau=2/3), but there P(z > 1/2) is sigmoid(2s/3), many times the
            sigmoid(s) that the penalty counts: what is searched is denser than what is found.
        lr: Adam's, 0.1 for CIFAR-sized models, 0.4 for ImageNet; times `lr_drop` from `lr_drop_at`.
        gain_lr: Adam's for one gain per layer, log-scaled, which makes up for the signal that the removed
            weights carried; training takes the gains' place, so they are dropped.  0 leaves them
            out, as the paper does: then a ticket must match the teacher at the dense weights'
            scale, and keeps large weights rather than the right ones.  The README measures it.
        seed: of the gates' noise.
        dtype: in which the networks compute; float32, bfloat16 or float16 (by autocast).
        channels_last: whether convolutions compute in that memory format.
        graph: whether a step is one CUDA graph, where the data lies on a GPU.
        layerwise: whether each layer draws by itself, by the strategy that measures fastest at its shape
            (`kernels.gated_linear`), instead of all in one launch.  None: on a GPU, where gates of
            several weights can close, so that what is closed is skipped.

    Errors: ValueError for epochs below 1, lr not above 0, gain_lr below 0 or another dtype.
    """

    epochs: int = 10
    objective: Objective = reverse_kl
    control: AbstractController = field(default_factory=GradBalance)
    gate: AbstractGate = field(default_factory=lambda: Concrete(tau=1.0))
    granularity: Granularity = field(default_factory=Weight)
    lr: float = 0.1
    gain_lr: float = 0.01
    lr_drop: float = 0.1
    lr_drop_at: float = 0.88
    seed: int = 0
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    graph: bool = True
    layerwise: bool | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"search epochs: expected at least 1, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"search lr: expected a positive number, got {self.lr}")
        if not self.gain_lr >= 0:
            raise ValueError(f"gain_lr: expected 0 (no gains) or more, got {self.gain_lr}")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype}")

    def __call__(
        self,
        model: nn.Module,
        batches: EpochBatches,
        *,
        sparsity: float,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
    ) -> Ticket:
        """The ticket of exactly the best-scored gates; the model is returned to its former state.

        Args:
            model: with sparse layers (`sparsify_`), holding the weights the ticket shall start from.
            sparsity: fraction removed, in (0, 1).
            checkpoint: written after every epoch; if it exists, the search goes on from there with
                the numbers of an uninterrupted run, and it is removed when the ticket is found.

        Errors: ValueError for bad arguments; SearchError if the objective is not finite.
        """
        members = [(sparsity, self.seed)]
        return self._find(model, batches, members, progress, checkpoint)[0]

    def many(
        self,
        model: nn.Module,
        batches: EpochBatches,
        *,
        sparsities: Sequence[float],
        seeds: Sequence[int] | None = None,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
    ) -> list[Ticket]:
        """Several searches at once, sparsities[i] with the gates' noise from seeds[i]: for small models.

        Each ticket is what a search of its own would find, to rounding; the networks are computed
        side by side (`torch.vmap`) on the same batches, so that their launches are one model's.

        Args:
            seeds: by default `self.seed` for all.

        Errors: as `__call__`; ValueError for lengths that differ, channels_last, or an objective that
        needs more than class scores.
        """
        seeds = [self.seed] * len(sparsities) if seeds is None else seeds
        if len(seeds) != len(sparsities) or not sparsities:
            raise ValueError(
                f"many: expected as many seeds as sparsities, at least one of each, got {len(seeds)} "
                f"and {len(sparsities)}"
            )
        members = list(zip(sparsities, seeds, strict=True))
        return self._find(model, batches, members, progress, checkpoint)

    def _find(
        self,
        model: nn.Module,
        batches: EpochBatches,
        members: list[tuple[float, int]],
        progress: Progress,
        checkpoint: Path | None,
    ) -> list[Ticket]:
        """The ticket of each (sparsity, seed)."""
        layers = require_dense_parameters(model)
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        for sparsity, _ in members:
            if check_sparsity(sparsity) == 0:
                raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
            # A pattern that cannot hold that many weights is told before the search, not after.
            level = {name: torch.zeros(self.granularity.units(s)) for name, s in shapes.items()}
            masks_from_scores(level, shapes, sparsity, self.granularity)
        metas = [self._meta(sparsity, seed) for sparsity, seed in members]
        drop = (self.lr_drop, self.lr_drop_at, str(self.granularity))
        run = ""
        if checkpoint is not None:
            run = checkpoints.fingerprint(model, batches, *metas, drop)
        densities = [(1 - sparsity, seed) for sparsity, seed in members]
        with self._gated(model, layers, densities[0][0]) as gated:
            step = self._step(model, gated, densities)
            losses = self._run(step, batches, run, progress, checkpoint)
            found = [
                {name: self.gate.score(s.detach()) for name, s in logits.items()}
                for logits in step.logits()
            ]
        tickets = []
        for i, (scores, meta) in enumerate(zip(found, metas, strict=True)):
            meta["objective_by_epoch"] = [loss[i] for loss in losses]
            ticket = Ticket.from_scores(
                scores, model, meta["sparsity"], self.granularity, meta=meta
            )
            tickets.append(ticket)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return tickets

    def _meta(self, sparsity: float, seed: int) -> dict[str, Any]:
        return {
            "method": "cts",
            "objective": self.objective.name,
            "control": repr(self.control),
            "gate": repr(self.gate),
            "sparsity": sparsity,
            "seed": seed,
            "search_epochs": self.epochs,
            "search_lr": self.lr,
            "gain_lr": self.gain_lr,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _step(
        self, model: nn.Module, gated: dict[str, Gated], members: list[tuple[float, int]]
    ) -> SearchStep:
        fused = self.gate.spec is not None and not self.objective.second_order
        plain = self.dtype == torch.float32 and not self.channels_last and len(members) == 1
        if not fused and not plain:
            raise ValueError(
                "search dtype, channels_last and many: expected float32, False and one search for the "
                f"objective {self.objective.name} with {self.gate}, which the fused step does not know"
            )
        if len(members) > 1:
            return ManyStep(self, model, gated, members)
        layerwise = self.layerwise
        if layerwise is None:
            closes = not isinstance(self.gate, Concrete) and not self.granularity.unit.single
            layerwise = closes and next(model.parameters()).is_cuda
        kind = (LayerwiseStep if layerwise else FusedStep) if fused else PlainStep
        return kind(self, model, gated, members[0][0])

    def _run(
        self,
        step: SearchStep,
        batches: EpochBatches,
        run: str,
        progress: Progress,
        checkpoint: Path | None,
    ) -> list[list[float]]:
        """All epochs; the mean objective of each, a number a ticket."""
        steps, length = self.epochs * len(batches), len(batches)
        drop_at = int(self.lr_drop_at * steps)
        done, losses = _load(step, checkpoint, run)
        if done * length > drop_at:
            step.drop_lr(self.lr_drop)
        feed = Feed(step, batches, self.graph)
        with progress.task("search", total=steps) as advance:
            advance(done * length)
            for epoch in range(done, self.epochs):
                start = perf_counter()
                feed.begin(epoch)
                for i in range(length):
                    if epoch * length + i == drop_at:
                        step.drop_lr(self.lr_drop)
                    feed()
                    advance()
                mean = (step.total / length).tolist()  # the epoch's only host sync
                losses.append(mean)
                if not all(map(math.isfinite, mean)):
                    raise SearchError(
                        f"search epoch {epoch + 1}: the objective {self.objective.name} is not finite; "
                        "check the data and the start weights, or lower lr"
                    )
                _save(step, checkpoint, run, epoch + 1, losses)
                advance.describe(objective=sum(mean) / len(mean), seconds=perf_counter() - start)
        return losses

    @contextmanager
    def _gated(
        self, model: nn.Module, layers: dict[str, SparseLayer], density: float
    ) -> Iterator[dict[str, Gated]]:
        """Gates in every sparse layer, all parameters frozen; undone on leaving."""
        patterns = {name: layer.pattern for name, layer in layers.items()}
        required = {p: p.requires_grad for p in model.parameters()}
        gated = {}
        with batch_statistics(model):
            try:
                for p in required:
                    p.requires_grad_(False)
                for index, (name, layer) in enumerate(layers.items()):
                    gated[name] = layer.pattern = Gated(
                        layer.raw_weight.shape,
                        self.gate,
                        self.granularity,
                        density=density,
                        seed=self.seed,
                        layer=index,
                        gain=self.gain_lr > 0,
                        device=layer.raw_weight.device,
                    )
                yield gated
            finally:
                for name, layer in layers.items():
                    layer.pattern = patterns[name]
                for p, flag in required.items():
                    p.requires_grad_(flag)


def _save(
    step: SearchStep, path: Path | None, run: str, epoch: int, losses: list[list[float]]
) -> None:
    if path is None:
        return
    tensors = {name: value.contiguous() for name, value in step.tensors().items()}
    if step.net.memory is not None and step.net.memory.table is not None:
        tensors["teacher"] = step.net.memory.table
    checkpoints.write(path, tensors, {"epoch": epoch, "losses": losses, "run": run})


def _load(step: SearchStep, path: Path | None, run: str) -> tuple[int, list[list[float]]]:
    """(epochs done, their losses) of an interrupted run."""
    if path is None or not path.exists():
        return 0, []
    tensors, meta = checkpoints.read(path)
    if meta["run"] != run:
        raise SearchError(
            f"{path} belongs to another search: expected the fingerprint {run[:12]} of this "
            f"search, its data and start weights, got {meta['run'][:12]}; remove it or name another"
        )
    with torch.no_grad():
        for name, value in step.tensors().items():
            value.copy_(tensors[name])
    if "teacher" in tensors:
        step.net.memory = TeacherMemory(len(tensors["teacher"]))
        step.net.memory.table = tensors["teacher"].to(step.device)
    return meta["epoch"], meta["losses"]
