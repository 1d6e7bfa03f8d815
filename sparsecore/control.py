"""Controllers: how hard sparsity pulls.  Frozen rules with explicit state, all on the device, no host sync.

The search descends g_R + lambda * g_S, where g_S = d excess / d logits and
excess = 100 * (expected density / target density - 1).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .kinds import check_fields

State = dict[str, Tensor]


class Reading(NamedTuple):
    """What a controller sees at one step; 0-dim tensors on the search's device."""

    task_norm: Tensor  # ||g_R||_2 over all logits
    sparsity_norm: Tensor  # ||g_S||_2 over all logits
    excess: Tensor  # percent above the target density; negative once below
    lr: Tensor | None = None  # the logits' learning rate by now


class AbstractController(ABC):
    """Gives the weight lambda of the sparsity gradient, one step after another."""

    @property
    def aims(self) -> bool:
        """Whether lambda follows the excess; one that does not has no use for a target that moves."""
        return True

    @abstractmethod
    def target(self, density: float) -> float:
        """The density at which `excess` is zero, for a ticket of `density`."""

    @abstractmethod
    def init(self, device: torch.device) -> State:
        """State before the first step."""

    @abstractmethod
    def update(self, state: State, reading: Reading) -> tuple[Tensor, State]:
        """(lambda, next state)."""

    @property
    def rule(self) -> kernels.Rule | None:
        """`update` as the fused step computes it, from state["weight"]; None: the step calls `update`."""
        return None


@dataclass(frozen=True)
class GradBalance(AbstractController):
    """lambda follows ||g_R|| / ||g_S|| while the density is above target, 0 below (arXiv 2512.07142, alg. 1).

    That average goes on pulling for about a hundred steps after the target is met, and gates do not come back:
    where the target moves, or steps are few, they end far below it.  With a `band` the ratio is averaged on both sides,
    and pulls in proportion to the excess, so that the density keeps to its target.

    Args:
        slack: puts the target above the wanted density, which it is a multiple of, 0.5 to 2; 1.1 in the paper.
        momentum: the average's.
        band: percent above the target from which the whole average pulls, at most 100; 0: none, as in the paper.

    Errors: ValueError for a number out of range.
    """

    slack: float = 1.1
    momentum: float = 0.99
    band: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        checks = (
            ("slack", self.slack, 0.5 <= self.slack <= 2, "a factor of 0.5 to 2 on the density"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "0 <= momentum < 1"),
            ("band", self.band, 0 <= self.band <= 100, "percent, 0 (none) to 100"),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ValueError(f"GradBalance {name}: expected {expected}, got {value}")

    def target(self, density: float) -> float:
        return self.slack * density

    def init(self, device: torch.device) -> State:
        return {
            "weight": torch.zeros((), device=device, dtype=torch.float32),
            "started": torch.zeros((), dtype=torch.bool, device=device),
        }

    def update(self, state: State, reading: Reading) -> tuple[Tensor, State]:
        tiny = torch.finfo(reading.sparsity_norm.dtype).tiny
        ratio = reading.task_norm / reading.sparsity_norm.clamp_min(tiny)
        if self.band == 0:
            ratio = torch.where(reading.excess > 0, ratio, torch.zeros_like(ratio))
        averaged = self.momentum * state["weight"] + (1 - self.momentum) * ratio
        average = torch.where(state["started"], averaged, ratio)
        weight = average
        if self.band > 0:
            weight = average * (reading.excess / self.band).clamp(0, 1)
        return weight, {"weight": average, "started": torch.ones_like(state["started"])}

    @property
    def rule(self) -> kernels.Rule:
        return kernels.Rule(self.momentum, 1 - self.momentum, 0.0, self.band)


@dataclass(frozen=True)
class Lagrangian(AbstractController):
    """Gradient ascent on lambda from 0, the paper's ablation partner: lambda <- lambda + rate * excess.

    A step descends under the lambda before its ascent, as gradients of both at one point have it.

    Args:
        lr: the rate; None: 0.01 times the logits' own, with which it then falls, as the authors' does.

    Errors: ValueError for a rate out of range.
    """

    lr: float | None = None

    _SHARE: ClassVar[float] = 0.01  # of the logits' rate

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lagrangian: expected a positive rate, or None, got {self.lr}")

    def target(self, density: float) -> float:
        return density

    def init(self, device: torch.device) -> State:
        return {"weight": torch.zeros((), device=device, dtype=torch.float32)}

    def update(self, state: State, reading: Reading) -> tuple[Tensor, State]:
        weight = state["weight"]
        return weight, {"weight": weight + self._rate(reading) * reading.excess}

    def _rate(self, reading: Reading) -> Tensor | float:
        if self.lr is not None:
            return self.lr
        if reading.lr is None:
            raise ValueError(
                "lagrangian: expected the logits' rate in reading.lr, got none; give it a rate, lr=1e-3"
            )
        return self._SHARE * reading.lr

    @property
    def rule(self) -> kernels.Rule:
        if self.lr is None:
            return kernels.Rule(1.0, 0.0, 0.0, share=self._SHARE)
        return kernels.Rule(1.0, 0.0, self.lr)


@dataclass(frozen=True)
class FixedPenalty(AbstractController):
    """A constant lambda.

    Args:
        weight: None: the one that leads to the ticket's sparsity, which takes several searches to find.

    Errors: ValueError for a negative weight, which would reward density, and one that is not finite.
    """

    weight: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise ValueError(f"fixed: expected lambda of at least 0, or None, got {self.weight}")

    @property
    def aims(self) -> bool:
        return False

    def target(self, density: float) -> float:
        return density

    def init(self, device: torch.device) -> State:
        if self.weight is None:
            raise ValueError("control fixed: expected a number here, as in fixed=0.5, got none")
        return {"weight": torch.full((), self.weight, device=device, dtype=torch.float32)}

    def update(self, state: State, reading: Reading) -> tuple[Tensor, State]:
        return state["weight"], state

    @property
    def rule(self) -> kernels.Rule:
        return kernels.Rule(1.0, 0.0, 0.0)


def falling(first: float, last: float, index: int, length: float) -> float:
    """Where an exponential fall from `first` to `last` over `length` steps is at step `index`."""
    share = min(index / length, 1.0) if length else 1.0
    return first * (last / first) ** share


def banded(band: float = 3.0) -> GradBalance:
    """GradBalance within `band` percent of its target."""
    return GradBalance(band=band)


CONTROLS: dict[str, Callable[..., AbstractController]] = {
    "gradbalance": GradBalance,
    "band": banded,
    "lagrangian": Lagrangian,
    "fixed": FixedPenalty,
}
