"""Joint Concrete Search: gates and weights train together while the density falls, then the weights are rewound.

Concrete Ticket Search asks which frozen weights make the network work as it is.  A ticket is trained,
though: what counts is what it can become.  Iterative magnitude pruning finds that out by training to the end
before each small cut.  Here both happen at once.  Gates start half open, the penalty's target falls
exponentially to the ticket's density, and the weights follow the task all the while, so each cut is made
in a network that has adapted to those before.  One search of a few epochs replaces all rounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..control import AbstractController, banded
from ..gates import AbstractGate, Concrete
from ..losses import Loss
from ..objectives import Objective, task
from ..patterns import Gated
from ..recipe import Recipe, optimizer_for
from .gated import AbstractGateSearch
from .steps import FusedStep, Members, SearchStep


@dataclass(frozen=True)
class JointSearch(AbstractGateSearch):
    """Finds the ticket of a network while that network trains under its gates; this project's own method.

    The ticket starts from the model's present weights: those that the search trained are dropped.
    Its batches should be augmented as those of training are, since the weights learn from them too.

    Args:
        epochs: None: pace * ln(1 / density), rounded up, at least 4.  Magnitude pruning by a fifth per round
            trains 4.5 times for each factor of e: `pace` = 4.5 takes an epoch for each of its trainings.
        ramp: None: of a search as long as `pace` makes it 1.5 * pace epochs, time enough for weights to show
            what they are worth, but at least a quarter and at most 70 %: the rest is for settling.
        gate: None: Concrete, nearly without noise, under which the weights learn better, but with more
            the fewer of them are left: tau = 100 sqrt(density), 10 at most (bench/results/search-log.md).
        objective: of class scores; a teacher (`reverse_kl`) would be the network as it trains.
        control: keeps to the target as it falls, within the band; the paper's cuts ahead of it.
        gain_lr: weights follow, so no gains are needed.
        recipe: the weights' optimiser, rate (for the search's batch; without a schedule, times `lr_drop` with
            the gates' own), momentum, decay, label_smoothing (of the task) and clip_norm.

    The other fields and errors are those of `AbstractGateSearch`; ValueError also for a gate that kernels
    do not know, or an objective that differentiates twice.
    """

    epochs: int | None = None
    pace: float = 4.5
    objective: Objective = task
    control: AbstractController = field(default_factory=banded)
    gate: AbstractGate | None = None
    gain_lr: float = 0.0
    start_density: float | None = 0.5
    ramp: float | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(optimizer="adam", lr=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.pace < math.inf:
            raise ValueError(f"pace: expected a positive number of epochs, got {self.pace}")
        if not self.fusible:
            raise ValueError(
                "joint search: expected a gate with a kernel (Concrete, HardConcrete, Gaussian, Bernoulli) and "
                f"an objective of first order, got {self.gate} and {self.objective.name}"
            )

    @property
    def name(self) -> str:
        return "joint"

    def epochs_for(self, sparsity: float) -> int:
        if self.epochs is not None:
            return self.epochs
        return math.ceil(self._paced(sparsity))

    def ramp_for(self, sparsity: float) -> float:
        if self.ramp is not None:
            return self.ramp
        return min(0.7, max(0.25, 1.5 * self.pace / self._paced(sparsity)))

    def _paced(self, sparsity: float) -> float:
        """Epochs of a search, by `pace`."""
        return max(4.0, -self.pace * math.log1p(-sparsity))

    def gate_for(self, sparsity: float) -> AbstractGate:
        if self.gate is not None:
            return self.gate
        return Concrete(tau=min(10.0, 100.0 * math.sqrt(1 - sparsity)))

    @property
    def trains_weights(self) -> bool:
        return True

    def _meta(self, sparsity: float, seed: int) -> dict[str, Any]:
        recipe = self.recipe
        return super()._meta(sparsity, seed) | {
            "optimizer": recipe.optimizer,
            "lr": recipe.lr,
            "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay,
            "label_smoothing": recipe.label_smoothing,
            "clip_norm": recipe.clip_norm,
        }

    def _step(
        self,
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> SearchStep:
        return JointStep(self, model, gated, members, loss)


class JointStep(FusedStep):
    """A fused step after which the weights move too."""

    def __init__(
        self,
        search: JointSearch,
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> None:
        smoothed = (loss or Loss()).smoothed(search.recipe.label_smoothing)
        super().__init__(search, model, gated, members, smoothed)
        self.batchwise = True  # the teacher moves: nothing about it can be remembered
        layers = self.net.layers.values()
        for layer, weight in zip(layers, self.bank.weights, strict=True):
            layer.raw_weight.data = weight  # one memory, also where the bank has its own layout
        gated_weights = [layer.raw_weight for layer in layers]
        gates = (p for pattern in gated.values() for p in pattern.parameters())
        known = set(map(id, (*gated_weights, *gates)))  # logits and gains are the bank's to move
        self.others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
        self.weights = [*gated_weights, *self.others]
        self.clip_norm = search.recipe.clip_norm
        self.optimizer = optimizer_for(self.weights, search.recipe)
        self._make_state()
        self._take_gradients()

    def _make_state(self) -> None:
        """The optimiser's state exists from the start, so that a checkpoint or a graph finds it in its place."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for p in self.weights:
            p.grad = torch.zeros_like(p)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[0] * 0
        self.optimizer.step()
        for slots in self.optimizer.state.values():
            for value in slots.values():
                if isinstance(value, Tensor):
                    value.zero_()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _take_gradients(self) -> None:
        """The bank leaves dR/dweight where the gated weight was: in float32 always the same memory."""
        for p, grad in zip(self.weights, self.bank.out, strict=False):
            p.grad = grad.to(p.dtype)

    def gradients(self, loss: Tensor) -> Sequence[Tensor]:
        """dR/dw_eff in the bank's order; those of all other parameters go where their optimiser looks."""
        found = torch.autograd.grad(
            loss, [*self.leaves, *self.others], allow_unused=True, materialize_grads=True
        )
        count = len(self.leaves)
        for p, grad in zip(self.others, found[count:], strict=True):
            p.grad = grad
        return found[:count]

    def descend(self, batch: Batch) -> Tensor:
        loss = super().descend(batch)
        if self.search.dtype != torch.float32:
            self._take_gradients()
        grads = [p.grad for p in self.weights if p.grad is not None]
        torch._foreach_div_(grads, self.search.objective.scale)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        self.optimizer.step()
        return loss

    def drop_lr(self, factor: float) -> None:
        super().drop_lr(factor)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        for i, p in enumerate(self.weights):
            found[f"weight/{i}"] = p.detach()
            slots = self.optimizer.state[p]
            found |= {f"{k}/{i}": v for k, v in slots.items() if isinstance(v, Tensor)}
        return found
