"""Gates: distributions over masks, as frozen values.  Randomness and logits are arguments.

Laws (tests/test_gates.py): `density(init(p)) == p`; `sample` lies in [0, 1] and grows with the logit;
`slope(sample(s, u), s)` is d sample / d s; `density_slope(s, density(s))` is d density / d s.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import kernels
from .kinds import check_fields
from .sparsities import check_sparsity, kept_count

Project = Callable[[Tensor], Tensor]


def _same(values: Tensor) -> Tensor:
    return values


class AbstractGate(ABC):
    """A distribution over z in [0, 1] with one logit per unit; all tensors share the units' shape."""

    deterministic: ClassVar[bool] = False  # whether the sample ignores its noise

    @property
    def spec(self) -> kernels.GateSpec | None:
        """The gate as the fused kernels know it; None: PyTorch computes it."""
        return None

    @abstractmethod
    def sample(self, logits: Tensor, noise: Tensor, project: Project = _same) -> Tensor:
        """The relaxed sample z, given uniform noise in [0, 1).

        `project` zeroes the units that a pattern such as N:M forbids (`Granularity.project`).
        """

    @abstractmethod
    def slope(self, z: Tensor, logits: Tensor) -> Tensor:
        """dz/dlogits at the sample z, as a new tensor; zero where `project` or clipping made z zero."""

    @abstractmethod
    def density(self, logits: Tensor) -> Tensor:
        """P(z != 0), or the stand-in that the method's paper penalises, per unit."""

    @abstractmethod
    def density_slope(self, logits: Tensor, density: Tensor) -> Tensor:
        """d density / d logits, per unit, as a new tensor; `density` is `density(logits)`."""

    @abstractmethod
    def mean(self, logits: Tensor) -> Tensor:
        """The deterministic gate value used without sampling."""

    @abstractmethod
    def init(self, density: float) -> float:
        """The logit at which `density` is reached."""

    def score(self, logits: Tensor) -> Tensor:
        """What hardening ranks units by: the k best are kept."""
        return logits


class _SpecifiedGate(AbstractGate):
    """A gate whose formulas are the kernels' reference."""

    @property
    @abstractmethod
    def spec(self) -> kernels.GateSpec: ...

    def sample(self, logits: Tensor, noise: Tensor, project: Project = _same) -> Tensor:
        return project(kernels.sample_ref(self.spec, logits, noise))

    def slope(self, z: Tensor, logits: Tensor) -> Tensor:
        return kernels.slope_ref(self.spec, z, logits)

    def density(self, logits: Tensor) -> Tensor:
        return kernels.density_ref(self.spec, logits)

    def density_slope(self, logits: Tensor, density: Tensor) -> Tensor:
        return kernels.density_slope_ref(self.spec, logits, density)


def _check_density(density: float) -> float:
    if not 0 < density < 1:
        raise ValueError(f"density: expected 0 < density < 1, got {density}")
    return density


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")


@dataclass(frozen=True)
class Concrete(_SpecifiedGate):
    """Binary Concrete, z = sigmoid(logit(u)/tau + s), never exactly 0 (Maddison 2017; CTS).

    Its density is sigmoid(s), what the CTS penalty uses; P(z > 1/2) is sigmoid(tau * s).
    """

    tau: float = 2 / 3

    def __post_init__(self) -> None:
        check_fields(self)
        _positive("tau", self.tau)

    @property
    def spec(self) -> kernels.GateSpec:
        return kernels.GateSpec(kernels.CONCRETE, self.tau)

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def init(self, density: float) -> float:
        return math.log(_check_density(density) / (1 - density))


@dataclass(frozen=True)
class HardConcrete(_SpecifiedGate):
    """Stretched and clipped Concrete with exact zeros and ones (Louizos, Welling & Kingma 2018)."""

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self) -> None:
        check_fields(self)
        _positive("beta", self.beta)
        if not (self.gamma < 0 and self.zeta > 1):
            raise ValueError(
                f"hard-concrete: expected gamma < 0 and zeta > 1, got {self.gamma}, {self.zeta}"
            )

    @property
    def spec(self) -> kernels.GateSpec:
        return kernels.GateSpec(kernels.HARD_CONCRETE, self.beta, self.gamma, self.zeta)

    def mean(self, logits: Tensor) -> Tensor:
        return (torch.sigmoid(logits) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def init(self, density: float) -> float:
        return math.log(_check_density(density) / (1 - density)) + self.spec.shift


@dataclass(frozen=True)
class Gaussian(_SpecifiedGate):
    """Stochastic gate z = clip(mu + sigma * eps, 0, 1); the logit is mu (Yamada 2020; arXiv 2603.08914)."""

    sigma: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        _positive("sigma", self.sigma)

    @property
    def spec(self) -> kernels.GateSpec:
        return kernels.GateSpec(kernels.GAUSSIAN, self.sigma)

    def mean(self, logits: Tensor) -> Tensor:
        return logits.clamp(0, 1)

    def init(self, density: float) -> float:
        p = torch.tensor(_check_density(density), dtype=torch.float64)
        return self.sigma * float(torch.special.ndtri(p))


@dataclass(frozen=True)
class Bernoulli(_SpecifiedGate):
    """A hard gate, z = 1 with probability sigmoid(s); its gradient goes straight through sigmoid(s).

    (Bengio, Leonard & Courville 2013.)  Under N:M open units tie, and a group keeps its first.
    """

    @property
    def spec(self) -> kernels.GateSpec:
        return kernels.GateSpec(kernels.BERNOULLI)

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def init(self, density: float) -> float:
        return math.log(_check_density(density) / (1 - density))


@dataclass(frozen=True)
class TopK(AbstractGate):
    """Edge-popup: a hard top-k of |score| per layer, straight-through gradient (Ramanujan 2020).

    Exactly k units are kept, without a host sync; which ones among equals is left open.
    """

    sparsity: float
    deterministic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_sparsity(self.sparsity)

    def sample(self, logits: Tensor, noise: Tensor, project: Project = _same) -> Tensor:
        scores = project(logits.detach().abs()).flatten()
        best = torch.topk(scores, kept_count(len(scores), self.sparsity), sorted=False).indices
        return torch.zeros_like(scores).index_fill_(0, best, 1).view_as(logits)

    def slope(self, z: Tensor, logits: Tensor) -> Tensor:
        return torch.sign(logits)

    def density(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, kept_count(logits.numel(), self.sparsity) / logits.numel())

    def density_slope(self, logits: Tensor, density: Tensor) -> Tensor:
        return torch.zeros_like(logits)

    def mean(self, logits: Tensor) -> Tensor:
        return self.sample(logits, logits)

    def init(self, density: float) -> float:
        if abs(density - (1 - self.sparsity)) > 1e-9:
            raise ValueError(
                f"TopK keeps a fixed share: expected density {1 - self.sparsity:.6g}, got {density}"
            )
        return 1.0

    def score(self, logits: Tensor) -> Tensor:
        return logits.abs()


@dataclass(frozen=True)
class Annealed(AbstractGate):
    """z = sigmoid(T * s), which becomes the step 1[s > 0] as the temperature T grows (Savarese 2020).

    T is a number, or a tensor [] beside the logits whose value may change.  Nothing is random.  Under N:M the
    gradient goes straight through, for a unit that is forbidden now could never come back otherwise.
    """

    temperature: float | Tensor = 1.0
    deterministic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.temperature, Tensor):
            _positive("temperature", self.temperature)

    def sample(self, logits: Tensor, noise: Tensor, project: Project = _same) -> Tensor:
        return project(self.density(logits))

    def slope(self, z: Tensor, logits: Tensor) -> Tensor:
        return self.density_slope(logits, self.density(logits))

    def density(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(self.temperature * logits)

    def density_slope(self, logits: Tensor, density: Tensor) -> Tensor:
        return self.temperature * density * (1 - density)

    def mean(self, logits: Tensor) -> Tensor:
        return self.density(logits)

    def init(self, density: float) -> float:
        return math.log(_check_density(density) / (1 - density)) / float(self.temperature)


GATES: dict[str, type[AbstractGate]] = {
    "concrete": Concrete,
    "hard-concrete": HardConcrete,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}
