"""Concrete Ticket Search: train one gate logit per unit on frozen weights (arXiv 2512.07142)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checkpoints
from ..batches import Batch, EpochBatches, Numbered
from ..control import AbstractController, GradBalance, Reading, State
from ..convert import batch_statistics, require_sparse_layers
from ..gates import AbstractGate, Concrete
from ..granularity import Granularity, Weight
from ..nn import SparseLayer
from ..objectives import Net, Objective, TeacherMemory, reverse_kl
from ..patterns import Gated
from ..progress import QUIET, Progress
from ..sparsities import check_sparsity, masks_from_scores
from ..tickets import Ticket


class SearchError(ValueError):
    """A search that cannot go on; the message says what to change."""


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

    Errors: ValueError for epochs below 1, lr not above 0 or gain_lr below 0.
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

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"search epochs: expected at least 1, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"search lr: expected a positive number, got {self.lr}")
        if not self.gain_lr >= 0:
            raise ValueError(f"gain_lr: expected 0 (no gains) or more, got {self.gain_lr}")

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
        density = 1 - check_sparsity(sparsity)
        if sparsity == 0:
            raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
        layers = require_sparse_layers(model)
        # A pattern that cannot hold that many weights is told before the search, not after.
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        level = {name: torch.zeros(self.granularity.units(s)) for name, s in shapes.items()}
        masks_from_scores(level, shapes, sparsity, self.granularity)
        meta: dict[str, Any] = {
            "method": "cts",
            "objective": self.objective.name,
            "control": repr(self.control),
            "gate": repr(self.gate),
            "sparsity": sparsity,
            "seed": self.seed,
            "search_epochs": self.epochs,
            "search_lr": self.lr,
            "gain_lr": self.gain_lr,
        }
        drop = (self.lr_drop, self.lr_drop_at, str(self.granularity))
        run = ""
        if checkpoint is not None:
            run = checkpoints.fingerprint(model, batches, meta, drop)
        with self._gated(model, layers, density) as gated:
            step = _Step(self, model, gated, density, run)
            meta["objective_by_epoch"] = self._run(step, batches, progress, checkpoint)
            scores = {name: self.gate.score(g.logits.detach()) for name, g in gated.items()}
        ticket = Ticket.from_scores(scores, model, sparsity, self.granularity, meta=meta)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return ticket

    def _run(
        self,
        step: "_Step",
        batches: EpochBatches,
        progress: Progress,
        checkpoint: Path | None,
    ) -> list[float]:
        """All epochs; the mean objective of each."""
        steps = self.epochs * len(batches)
        done, losses = step.load(checkpoint)
        with progress.task("search", total=steps) as advance:
            advance(done * len(batches))
            for epoch in range(done, self.epochs):
                start, total = perf_counter(), step.zero()
                step.begin_epoch(batches.order(epoch) if isinstance(batches, Numbered) else None)
                for i, batch in enumerate(batches.epoch(epoch)):
                    if epoch * len(batches) + i == int(self.lr_drop_at * steps):
                        step.drop_lr(self.lr_drop)
                    total += step(batch)
                    advance()
                losses.append(float(total) / len(batches))  # the epoch's only host sync
                if not torch.isfinite(total):
                    raise SearchError(
                        f"search epoch {epoch + 1}: the objective {self.objective.name} is not finite; "
                        "check the data and the start weights, or lower lr"
                    )
                step.save(checkpoint, epoch + 1, losses)
                advance.describe(objective=losses[-1], seconds=perf_counter() - start)
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


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The L2 norm of all of them together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


class _Step:
    """One search step and the state it carries: logits, Adam, the controller."""

    def __init__(
        self,
        search: ConcreteSearch,
        model: nn.Module,
        gated: dict[str, Gated],
        density: float,
        run: str = "",
    ) -> None:
        self.search, self.run = search, run
        self.net = Net(model)
        self.gated = gated
        self.logits = [g.logits for g in gated.values()]
        self.device = self.logits[0].device
        self.sizes = [self._size(name) for name in gated]
        # With BatchNorm a sample's scores depend on its batch, which changes from epoch to epoch.
        self.batchwise = any(isinstance(m, _BatchNorm) for m in model.modules())
        d = sum(layer.raw_weight.numel() for layer in self.net.layers.values())
        self.target = search.control.target(density) * d  # expected weights kept
        self.state: State = search.control.init(self.device)
        groups: list[dict[str, Any]] = [{"params": self.logits, "lr": search.lr}]
        self.gains = [g.log_gain for g in gated.values() if g.log_gain is not None]
        if self.gains:
            groups.append({"params": self.gains, "lr": search.gain_lr})
        # One kernel for all logits where there is one; every step's update stays on the device.
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def begin_epoch(self, order: Tensor | None) -> None:
        """`order`: the samples [N] in the order of the epoch's batches, if the teacher may know them."""
        if order is None or self.batchwise:
            self.net.memory = None
            return
        if self.net.memory is None:
            self.net.memory = TeacherMemory(len(order))
        else:
            self.net.memory.complete = True
        self.order = order.to(self.device)

    def __call__(self, batch: Batch) -> Tensor:
        """Descends g_R + lambda g_S; returns the objective (detached, on the device)."""
        if self.net.memory is not None:
            size = len(batch[1])
            self.net.memory.rows, self.order = self.order[:size], self.order[size:]
        for g in self.gated.values():
            g.step += 1
        loss = self.search.objective(self.net, batch)
        # A layer the forward does not reach has no gradient: zeros.
        grads = torch.autograd.grad(
            loss, [*self.logits, *self.gains], allow_unused=True, materialize_grads=True
        )
        task, follow = grads[: len(self.logits)], grads[len(self.logits) :]
        kept, pulls = self._sparsity()
        percent = 100 / self.target  # of excess per weight
        reading = Reading(_norm(task), percent * _norm(pulls), percent * kept - 100)
        weight, self.state = self.search.control.update(self.state, reading)
        for logits, g_task, pull in zip(self.logits, task, pulls, strict=True):
            logits.grad = g_task.addcmul_(pull, percent * weight)
        for gain, grad in zip(self.gains, follow, strict=True):
            gain.grad = grad
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _sparsity(self) -> tuple[Tensor, list[Tensor]]:
        """Expected number of kept weights, and its gradient in each layer's logits."""
        gate, kept, pulls = self.search.gate, [], []
        for logits, size in zip(self.logits, self.sizes, strict=True):
            density = gate.density(logits)
            slope = gate.density_slope(logits, density)
            # `density` and `slope` are this layer's only two temporaries.
            pulls.append(slope if size is None else slope.mul_(size))
            kept.append(density.sum() if size is None else density.mul_(size).sum())
        return torch.stack(kept).sum(), pulls

    def _size(self, name: str) -> Tensor | None:
        """Weights per unit, shaped like the logits; None where each has one."""
        sizes = self.search.granularity.sizes(self.net.layers[name].raw_weight.shape)
        return None if bool((sizes == 1).all()) else sizes.to(self.device, torch.float32)

    def zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def drop_lr(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def save(self, path: Path | None, epoch: int, losses: list[float]) -> None:
        if path is None:
            return
        tensors, meta = checkpoints.pack_optimizer(self.optimizer)
        tensors |= {f"logits/{name}": g.logits.detach() for name, g in self.gated.items()}
        tensors |= {f"step/{name}": g.step for name, g in self.gated.items()}
        tensors |= {f"gain/{i}": g.detach() for i, g in enumerate(self.gains)}
        tensors |= {f"control/{name}": value for name, value in self.state.items()}
        if self.net.memory is not None and self.net.memory.table is not None:
            tensors["teacher"] = self.net.memory.table
        meta = {"optimizer": meta, "epoch": epoch, "losses": losses, "run": self.run}
        checkpoints.write(path, tensors, meta)

    def load(self, path: Path | None) -> tuple[int, list[float]]:
        """(epochs done, their losses) of an interrupted run."""
        if path is None or not path.exists():
            return 0, []
        tensors, meta = checkpoints.read(path)
        if meta["run"] != self.run:
            raise SearchError(
                f"{path} belongs to another search: expected the fingerprint {self.run[:12]} of this "
                f"search, its data and start weights, got {meta['run'][:12]}; remove it or name another"
            )
        with torch.no_grad():
            for name, g in self.gated.items():
                g.logits.copy_(tensors[f"logits/{name}"])
                g.step.copy_(tensors[f"step/{name}"])
            for i, gain in enumerate(self.gains):
                gain.copy_(tensors[f"gain/{i}"])
        self.state = {name: tensors[f"control/{name}"].to(self.device) for name in self.state}
        if "teacher" in tensors:
            self.net.memory = TeacherMemory(len(tensors["teacher"]))
            self.net.memory.table = tensors["teacher"].to(self.device)
        checkpoints.unpack_optimizer(self.optimizer, tensors, meta["optimizer"])
        return meta["epoch"], meta["losses"]
