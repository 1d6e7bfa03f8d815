"""Every kernel's operation in plain PyTorch: the specification, the CPU path and the tests' oracle.

Conventions: `logits` are the gate parameters, `noise` is u ~ U(0, 1) of the same shape, `z` in [0, 1]
is the relaxed sample.  Each `*_slope_ref` gives dz/dlogits **from the sample alone**, so a backward
pass stores z and never the noise.  All functions are differentiable, twice, in any float dtype.
"""

import torch
from torch import Tensor

# u is clamped to [EPS, 1 - EPS]: both ends are representable in float32, so logit(u) stays finite.
EPS = 2.0**-24


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
