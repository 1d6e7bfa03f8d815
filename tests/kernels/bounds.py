"""How far right products may be from the exact ones: the bound of all tests that compare products.

A dot product y of K terms p_k is K - 1 additions in some order; each rounds a partial sum s by s * d,
|d| <= u, so the error is e = sum of s * d.  Two assumptions: roundings are independent with mean 0
(Higham & Mary 2019, "A new approach to probabilistic rounding error analysis"), and terms stand in no
order that matters.  With R^2 = sum p_k^2, a sum of m of the terms then has

    E s^2 = m/K (1 - (m-1)/(K-1)) R^2 + m(m-1) / (K(K-1)) y^2 <= m/K (R^2 + y^2).

The shares m/K of all partial sums add up to at most (K + 1) / 2, one term after the other; E d^2 is at most
u^2 / 3, uniform within half a unit in the last place.  So in any order

    E e^2 <= v = (K + 4) u^2 (R^2 + y^2) / 6,

with room for the products' own roundings, a gain and a bias (which is one more term).  The worst case,
K u sum |p_k|, is about 100 times as much for K = 12,608: it would hide a wrong tile.

**One element**: |e| <= 16 sqrt(v).  Sums walk at random (mean squares along a Brownian bridge have a
tail e^(-x pi^2 / 2)), so this is passed with probability e^(-16 pi / sqrt 2) = 4e-16, and with e^(-20) if every
|d| were u.  **A window** of M = 16 x 16 elements, which the smallest tile fills: sum e^2 / v <= M + 256, its mean
and one element at its own limit.  Rounding averages out over a window and a systematic error does not: one
of about 2.5 sqrt(K/6) u relative to y is seen, 7e-6 at K = 12,608.

Beside what is random there is what is `sure`: rounding of the result to its dtype (u |y|), underflow (what
falls below the least normal number may be flushed to 0, at every term), and tensor cores' sums of 16-bit
factors, which are cut off rather than rounded, after 8 terms or more: u = 2^-23, and K/8 u sqrt(R^2 + y^2) of drift.

Factors that are not exact (weights times gates, rounded to the compute dtype) add sum a_k^2 E_k^2 to v, where
E_k bounds the factor's error.  What is multiplied or summed up after a product carries its v along.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels.reference import (
    BERNOULLI,
    CONCRETE,
    EPS,
    GAUSSIAN,
    HARD_CONCRETE,
    GateSpec,
    sample_ref,
    slope_ref,
)
from sparsecore.kernels.units import Unit, allowed_ref, apply_ref, gather_ref

WINDOW = 16
LIMIT = 16.0  # of one element's error, in roots of its mean square
TINY = torch.finfo(torch.float32).tiny
UNIT = 2.0**-24
# Of special functions: the GPU's approximate ones have errors of 2 to 6 units each, and three follow each other.
SPECIAL = 16 * UNIT


class Expected(NamedTuple):
    """A result in float64, its error's mean square, and an error beside it, at most.

    filters: four dimensions are [n, k, r, s] rather than [b, c, h, w].
    """

    exact: Tensor
    variance: Tensor
    sure: Tensor
    filters: bool = False

    def times(self, factor: Tensor, error: Tensor | float = 0.0) -> "Expected":
        """The product, in float32, with a factor known to `error`."""
        exact = self.exact * factor
        sure = self.sure * factor.abs() + self.exact.abs() * error + 2 * UNIT * exact.abs() + TINY
        return self._replace(exact=exact, variance=self.variance * factor**2, sure=sure)

    def summed(self, fold: Callable[[Tensor], Tensor]) -> "Expected":
        """Sums in float32; bounded errors of many terms are as good as random."""
        exact, terms = fold(self.exact), fold(torch.ones_like(self.exact))
        variance, drift = _rounding(exact, fold(self.exact**2), terms, torch.float32)
        variance += fold(self.variance + self.sure**2)
        return self._replace(exact=exact, variance=variance, sure=drift)


def _rounding(
    y: Tensor, squares: Tensor, terms: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(variance, sure) of sums of so many terms, with factors of a dtype."""
    size, sure = squares + y**2, terms * TINY
    unit = torch.finfo(dtype).eps / 2
    if dtype.itemsize == 2:
        unit = 2.0**-23
        sure += terms / 8 * unit * size.sqrt()
    return (terms + 4) * unit**2 * size / 6, sure


def products(
    layer: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, error: Tensor | None = None,
) -> list[Expected]:  # fmt: skip
    """y = layer(x, weight, bias), a linear layer or convolution, and dx, dweight, dbias for dy, in x's dtype.

    error: of each weight, at most.  All of them are linear in each factor: the layer of squares gives R^2, and
    that of ones where there is something the number of terms.
    """

    def run(*inputs: Tensor) -> list[Tensor]:
        leaves = [t.detach().double().requires_grad_() for t in inputs[:3]]
        y = layer(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs[3].double())]

    given = [t.detach().double() for t in (x, weight, bias, dy)]
    squares, terms = run(*[t**2 for t in given]), run(*[t != 0 for t in given])
    found = []
    for exact, square, count in zip(run(*given), squares, terms, strict=True):
        found.append(Expected(exact, *_rounding(exact, square, count, x.dtype)))
    found[2] = found[2]._replace(filters=True)
    if error is not None:
        wrong = run(given[0] ** 2, error**2, torch.zeros_like(bias), given[3] ** 2)
        for i in range(2):
            found[i] = found[i]._replace(variance=found[i].variance + wrong[i])
    return found


def gates(gate: GateSpec, logits: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(z, how far from it float32 may be), and the same of its slope.

    The logistic and the logit meet with an error of a few units of each, which does to z what it does as part
    of the logit, also where z is clipped or steps.
    """
    s, u = logits.double(), noise.double()
    if gate.kind == GAUSSIAN:
        size = s.abs() + gate.a * torch.special.ndtri(u.clamp(EPS, 1 - EPS)).abs()
    else:
        size = s.abs() + (1 + torch.logit(u, eps=EPS).abs()) / (
            gate.a if gate.kind == CONCRETE else 1
        )
    at = [s, s - SPECIAL * size, s + SPECIAL * size]
    zs = [sample_ref(gate, t, u) for t in at]
    slopes = [slope_ref(gate, z, t) for z, t in zip(zs, at, strict=True)]
    (z, z_error), (slope, slope_error) = (
        (values[0], torch.stack([(v - values[0]).abs() for v in values[1:]]).amax(0))
        for values in (zs, slopes)
    )
    rounding = SPECIAL * (z + abs(gate.b)) * (z != 0)  # of z = a (c - b) + b
    slope_error += SPECIAL * slope
    if gate.kind == HARD_CONCRETE:
        slope_error += rounding / gate.a * (slope != 0)
    elif gate.kind == CONCRETE:
        slope_error += rounding  # of 1 - z
    elif gate.kind == BERNOULLI:
        slope_error += SPECIAL * torch.sigmoid(s)
    return [(z, z_error + rounding + TINY), (slope, slope_error + TINY)]


def gated(
    layer: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor, gain: Tensor, dy: Tensor,
    gate: GateSpec, unit: Unit, noise: Tensor,
) -> dict[str, Expected]:  # fmt: skip
    """y and all gradients of layer(x, gain * weight * z, bias), one gate z for each unit."""
    (z, z_error), (slope, slope_error) = gates(gate, logits, noise)
    allowed = allowed_ref(z, unit)
    z, z_error, slope, slope_error = (t * allowed for t in (z, z_error, slope, slope_error))
    wide, factor = weight.detach().double(), gain.detach().double()
    z_weight, spread = apply_ref(wide, z, unit), apply_ref(torch.ones_like(wide), z, unit)
    spread_error = apply_ref(torch.ones_like(wide), z_error, unit)
    used = factor * z_weight
    error = (factor * wide).abs() * spread_error + 4 * UNIT * used.abs()
    if x.dtype.itemsize == 2:  # rounded to it before the gain or after
        error += torch.finfo(x.dtype).eps / 2 * used.abs() + _least(x.dtype) * (1 + factor.abs())
    y, dx, dused, dbias = products(layer, x, used, bias, dy, error)
    dz = dused.times(wide).summed(lambda t: gather_ref(t, unit))
    dgain = dused.times(wide).times(spread, spread_error).summed(torch.sum)
    return {
        "y": y,
        "dx": dx,
        "dweight": dused.times(spread, spread_error).times(factor),
        "dlogits": dz.times(slope, slope_error).times(factor),
        "dbias": dbias,
        "dgain": dgain,
    }


def require(name: str, found: Tensor, expected: Expected) -> None:
    """Every element and every window of 16 x 16 is within its bound.  Errors: AssertionError."""
    exact, variance, sure, filters = expected
    assert found.shape == exact.shape, f"{name}: expected {exact.shape}, got {found.shape}"
    if not found.numel():
        return
    sure = sure + torch.finfo(found.dtype).eps / 2 * exact.abs() + _least(found.dtype)
    beyond = ((found.double() - exact).abs() - sure).clamp_min(0)
    score = torch.where(beyond == 0, 0, beyond / variance.sqrt())  # in roots of the mean square
    _at_most(f"{name}, an element", score, torch.full_like(score, LIMIT))
    size = _windows(torch.ones_like(score), filters).sum(1)
    total = _windows(score**2, filters).sum(1)
    _at_most(f"{name}, a window", (total / size).sqrt(), (1 + LIMIT**2 / size).sqrt())


def _at_most(what: str, score: Tensor, limit: Tensor) -> None:
    wrong = ~(score <= limit)  # NaN is
    if bool(wrong.any()):
        worst = int(torch.nan_to_num(score / limit, nan=torch.inf).argmax())
        raise AssertionError(
            f"{what}: expected an error of at most {limit.flatten()[worst]:.2f} roots of its mean square, "
            f"got {score.flatten()[worst]:.2f} ({int(wrong.sum())} of {len(wrong.flatten())} are beyond, "
            f"the worst is number {worst})"
        )


def _least(dtype: torch.dtype) -> float:
    """What underflow may cost: float16 keeps its subnormal numbers, others may be flushed to 0."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps / 2 if dtype == torch.float16 else info.tiny


def _windows(t: Tensor, filters: bool) -> Tensor:
    """[windows, 256], of tokens and features, or of a weight's rows and columns at a tap; zeros fill it up."""
    if t.ndim == 4:
        t = t.permute(2, 3, 0, 1) if filters else t.permute(0, 2, 3, 1)
    if t.ndim < 2:
        flat = t.flatten()
        t = F.pad(flat, (0, -flat.numel() % WINDOW)).unflatten(0, (-1, WINDOW))
    t = t.flatten(0, -2)
    t = F.pad(t, (0, -t.shape[1] % WINDOW, 0, -t.shape[0] % WINDOW))
    t = t.unflatten(1, (-1, WINDOW)).unflatten(0, (-1, WINDOW))  # [rows, 16, columns, 16]
    return t.transpose(1, 2).flatten(2).flatten(0, 1)
