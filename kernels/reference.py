"""Every kernel's operation in plain PyTorch: the specification, the CPU path and the tests' oracle.

Conventions: `logits` are the gate parameters, `noise` is u ~ U(0, 1) of the same shape, `z` in [0, 1]
is the relaxed sample.  Each `*_slope_ref` gives dz/dlogits **from the sample alone**, so a backward
pass stores z and never the noise.  All functions are differentiable, twice, in any float dtype.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CONCRETE, HARD_CONCRETE, GAUSSIAN, BERNOULLI = range(4)

# u is clamped to [EPS, 1 - EPS]: both ends are representable in float32, so logit(u) stays finite.
EPS = 2.0**-24


class GateSpec(NamedTuple):
    """A gate as kernels see it: which formula, and its parameters.

    CONCRETE: a = tau.  HARD_CONCRETE: a, b, c = beta, gamma, zeta.  GAUSSIAN: a = sigma.
    BERNOULLI: z = 1[logit(u) + s > 0], gradient straight through sigmoid(s).
    """

    kind: int
    a: float = 1.0
    b: float = 0.0
    c: float = 1.0

    @classmethod
    def of(cls, values: Sequence[float]) -> "GateSpec":
        """From the numbers as which an operator is given it."""
        return cls(int(values[0]), *values[1:])

    @property
    def shift(self) -> float:
        """density = sigmoid(s - shift) of all but the Gaussian gate."""
        return self.a * math.log(-self.b / self.c) if self.kind == HARD_CONCRETE else 0.0


def sample_ref(spec: GateSpec, logits: Tensor, noise: Tensor) -> Tensor:
    """z in [0, 1], of the shape of `logits` and `noise`."""
    if spec.kind == CONCRETE:
        return concrete_ref(logits, noise, spec.a)
    if spec.kind == HARD_CONCRETE:
        return hard_concrete_ref(logits, noise, spec.a, spec.b, spec.c)
    if spec.kind == GAUSSIAN:
        return gaussian_ref(logits, noise, spec.a)
    return bernoulli_ref(logits, noise)


def slope_ref(spec: GateSpec, z: Tensor, logits: Tensor) -> Tensor:
    """dz/dlogits at the sample z, as a new tensor."""
    if spec.kind == CONCRETE:
        return concrete_slope_ref(z)
    if spec.kind == HARD_CONCRETE:
        return hard_concrete_slope_ref(z, spec.a, spec.b, spec.c)
    if spec.kind == GAUSSIAN:
        return gaussian_slope_ref(z)
    return concrete_slope_ref(torch.sigmoid(logits))


def density_ref(spec: GateSpec, logits: Tensor) -> Tensor:
    """P(z != 0), or what the method's paper penalises in its place."""
    if spec.kind == GAUSSIAN:
        return torch.special.ndtr(logits / spec.a)
    return torch.sigmoid(logits - spec.shift if spec.shift else logits)


def density_slope_ref(spec: GateSpec, logits: Tensor, density: Tensor) -> Tensor:
    """d density / d logits as a new tensor; `density` is `density_ref(spec, logits)`."""
    if spec.kind == GAUSSIAN:
        t = logits / spec.a
        return torch.exp(-0.5 * t * t) / (spec.a * math.sqrt(2 * math.pi))
    return concrete_slope_ref(density)


def bernoulli_ref(logits: Tensor, noise: Tensor) -> Tensor:
    """z = 1[logit(u) + s > 0], so P(z = 1) = sigmoid(s) (Bengio, Leonard & Courville 2013)."""
    return (torch.logit(noise, eps=EPS) + logits > 0).to(logits.dtype)


def concrete_ref(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """z = sigmoid(logit(u) / tau + s): binary Concrete (Maddison et al. 2017; CTS, arXiv 2512.07142)."""
    logistic = torch.logit(noise, eps=EPS)
    if tau != 1:
        logistic = logistic.div_(tau)
    return logistic.add_(logits).sigmoid_()


def concrete_slope_ref(z: Tensor) -> Tensor:
    """dz/ds = z (1 - z)."""
    return torch.addcmul(z, z, z, value=-1)


def hard_concrete_ref(
    logits: Tensor, noise: Tensor, beta: float, gamma: float, zeta: float
) -> Tensor:
    """a = sigmoid((logit(u) + log alpha) / beta); z = clip(a (zeta - gamma) + gamma, 0, 1) (Louizos 2018)."""
    a = torch.logit(noise, eps=EPS).add(logits).div(beta).sigmoid()
    return (a * (zeta - gamma) + gamma).clamp(0, 1)


def hard_concrete_slope_ref(z: Tensor, beta: float, gamma: float, zeta: float) -> Tensor:
    """a (1 - a) (zeta - gamma) / beta with a = (z - gamma) / (zeta - gamma); 0 where z is clipped."""
    slope = (z - gamma) * (zeta - z) / ((zeta - gamma) * beta)
    return slope * _interior(z)


def gaussian_ref(logits: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """z = clip(mu + sigma * eps, 0, 1), eps = Phi^-1(u) (Yamada 2020; arXiv 2603.08914)."""
    normal = torch.erfinv(2 * noise.clamp(EPS, 1 - EPS) - 1) * 2**0.5
    return (logits + sigma * normal).clamp(0, 1)


def gaussian_slope_ref(z: Tensor) -> Tensor:
    """1 where the sample is not clipped, else 0."""
    return _interior(z)


def _interior(z: Tensor) -> Tensor:
    return ((z > 0) & (z < 1)).to(z.dtype)


def squares_ref(t: Tensor) -> Tensor:
    """The sum of squares of a dense tensor, float32 [], right to 1e-6.

    PyTorch's norms add float32 one after the other: over a million equal values they lose a thousandth.
    Here rows of 256 are short enough for float32, and their sums are added in float64.
    """
    flat = t.detach().as_strided((t.numel(),), (1,), t.storage_offset())
    whole = flat.numel() // 256 * 256
    parts = (flat[:whole].view(-1, 256), flat[whole:].view(1, -1))
    norms = [torch.linalg.vector_norm(p, dim=1, dtype=torch.float32).double() for p in parts]
    return torch.cat(norms).square().sum().float()
