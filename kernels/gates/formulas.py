"""What every gate kernel computes at one gate, in registers: noise, sample, slope, density.

KIND and the parameters A, B, C are a `GateSpec`.  With FAST the special functions are the GPU's
approximate ones (about 2 ulp each); without, Triton's exact ones.  Under the interpreter, which has
no libdevice, FAST means the same formulas with exact functions.
"""

from ..dsl import libdevice, tl, triton
from ..philox import uniform_words
from ..reference import BERNOULLI, CONCRETE, EPS, GAUSSIAN, HARD_CONCRETE

_CONCRETE = tl.constexpr(CONCRETE)
_HARD_CONCRETE = tl.constexpr(HARD_CONCRETE)
_GAUSSIAN = tl.constexpr(GAUSSIAN)
_BERNOULLI = tl.constexpr(BERNOULLI)
_EPS = tl.constexpr(EPS)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_SQRT2 = tl.constexpr(1.4142135623730951)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)

if triton.knobs.runtime.interpret:

    @triton.jit
    def _fast_log2(x):
        return tl.log2(x)

    @triton.jit
    def _fast_divide(x, y):
        return x / y
else:

    @triton.jit
    def _fast_log2(x):
        return libdevice.fast_log2f(x)

    @triton.jit
    def _fast_divide(x, y):
        return libdevice.fast_dividef(x, y)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST:
        return _fast_divide(1.0, 1.0 + tl.exp2(-x * _LOG2E))
    return tl.div_rn(tl.full(x.shape, 1.0, x.dtype), 1.0 + tl.exp(-x))


@triton.jit
def _normal(u):
    """Phi^-1(u) = sqrt(2) erfinv(2u - 1), by Giles (2010), "Approximating the erfinv function"."""
    x = 2.0 * u - 1.0
    w = -tl.log(4.0 * u * (1.0 - u))  # -log(1 - x^2), without its cancellation
    a = w - 2.5
    p = 2.81022636e-08 * a + 3.43273939e-07
    p = p * a + -3.5233877e-06
    p = p * a + -4.39150654e-06
    p = p * a + 0.00021858087
    p = p * a + -0.00125372503
    p = p * a + -0.00417768164
    p = p * a + 0.246640727
    p = p * a + 1.50140941
    b = tl.sqrt(w) - 3.0
    q = -0.000200214257 * b + 0.000100950558
    q = q * b + 0.00134934322
    q = q * b + -0.00367342844
    q = q * b + 0.00573950773
    q = q * b + -0.0076224613
    q = q * b + 0.00943887047
    q = q * b + 1.00167406
    q = q * b + 2.83297682
    return _SQRT2 * x * tl.where(w < 5.0, p, q)


@triton.jit
def uniform_at(index, seed, step, layer):
    """u of arbitrary indices (int64, any shape): one Philox each, of which one word in four is used."""
    a, b, c, d = uniform_words(index >> 2, seed, step, layer)
    lane = (index & 3).to(tl.int32)
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def sample_gate(
    u, s, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr
):
    """z in [0, 1] from u in [0, 1) and the logit s, float32."""
    u = tl.minimum(tl.maximum(u, _EPS), 1.0 - _EPS)
    if KIND == _GAUSSIAN:
        return tl.minimum(tl.maximum(s + A * _normal(u), 0.0), 1.0)
    if KIND == _BERNOULLI:  # logit(u) + s > 0, without a logarithm
        return tl.where(u > (1.0 - u) * tl.exp2(-s * _LOG2E), 1.0, 0.0)
    if FAST:
        if KIND == _CONCRETE and A == 1.0:
            # sigmoid(log(u / (1 - u)) + s): the logarithm and the exponential cancel
            return _fast_divide(u, u + (1.0 - u) * tl.exp2(-s * _LOG2E))
        logistic = (_fast_log2(u) - _fast_log2(1.0 - u)) * _LN2
    else:
        logistic = tl.log(tl.div_rn(u, 1.0 - u))
    if KIND == _CONCRETE:
        return _sigmoid(logistic * (1.0 / A) + s, FAST)
    z = _sigmoid((logistic + s) * (1.0 / A), FAST) * (C - B) + B
    return tl.minimum(tl.maximum(z, 0.0), 1.0)


@triton.jit
def gate_slope(
    z, s, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr
):
    """dz/ds at the sample z (straight through sigmoid(s) for Bernoulli)."""
    if KIND == _CONCRETE:
        return z * (1.0 - z)
    if KIND == _BERNOULLI:
        p = _sigmoid(s, FAST)
        return p * (1.0 - p)
    inside = (z > 0.0) & (z < 1.0)
    if KIND == _GAUSSIAN:
        return tl.where(inside, 1.0, 0.0)
    return tl.where(inside, (z - B) * (C - z) * (1.0 / ((C - B) * A)), 0.0)


@triton.jit
def gate_density(
    s,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    SHIFT: tl.constexpr,
    FAST: tl.constexpr,
):
    """(density, d density / ds) of the logit s; SHIFT is `GateSpec.shift`."""
    if KIND == _GAUSSIAN:
        t = s * (1.0 / A)
        density = 0.5 + 0.5 * tl.erf(t * (1.0 / _SQRT2))
        return density, tl.exp(-0.5 * t * t) * (_INV_SQRT_2PI / A)
    density = _sigmoid(s - SHIFT, FAST)
    return density, density * (1.0 - density)


@triton.jit
def load_block(ptr, index, numel, MASKED: tl.constexpr):
    """float32; whole blocks go without a mask, which would break up 16-byte vectors."""
    if MASKED:
        return tl.load(ptr + index, mask=index < numel, other=0.0).to(tl.float32)
    return tl.load(ptr + index).to(tl.float32)


@triton.jit
def store_block(ptr, index, value, numel, MASKED: tl.constexpr):
    value = value.to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + index, value, mask=index < numel)
    else:
        tl.store(ptr + index, value)
