"""The laws of gates, their moments against closed forms, and their gradients."""

import math

import pytest
import torch
from helpers import GRANULARITIES, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecore import gated_weight
from sparsecore.gates import AbstractGate, Annealed, Concrete, Gaussian, HardConcrete, TopK
from sparsecore.granularity import NM, Granularity, parse_granularity

STOCHASTIC: list[AbstractGate] = [Concrete(), HardConcrete(), Gaussian()]
GATES: list[AbstractGate] = [*STOCHASTIC, TopK(0.5), Annealed(3.0)]
densities = st.floats(0.001, 0.999)
by_gate = pytest.mark.parametrize("gate", GATES, ids=lambda g: type(g).__name__)
by_stochastic = pytest.mark.parametrize("gate", STOCHASTIC, ids=lambda g: type(g).__name__)
by_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)


@by_stochastic
@given(p=densities)
def test_density_of_init_is_the_density(gate: AbstractGate, p: float) -> None:
    logit = torch.tensor(gate.init(p), dtype=torch.float64)
    assert gate.density(logit).item() == pytest.approx(p, rel=1e-9)


@given(p=st.floats(0.02, 0.98), n=st.integers(1, 200))
def test_topk_keeps_exactly_its_share(p: float, n: int) -> None:
    gate = TopK(1 - p)
    assert abs(gate.init(p) - 1.0) == 0
    z = gate.sample(randn(n), rand(n))
    assert int(z.sum()) == math.floor(n * (1 - gate.sparsity) + 1e-6)
    assert gate.density(randn(n)).sum().item() == pytest.approx(float(z.sum()), abs=1e-4)


def test_topk_keeps_exactly_its_share_of_equal_scores() -> None:
    for scores in (torch.ones(10), torch.tensor([2.0, 1, 1, 1, 1, 1, 1, 0, 0, 0])):
        z = TopK(0.6).sample(scores, scores)
        assert int(z.sum()) == 4 and scores[z == 1].min() >= scores[z == 0].max()


@given(p=densities, temperature=st.floats(0.1, 200))
def test_an_annealed_gate_is_a_sigmoid_that_steepens(p: float, temperature: float) -> None:
    gate = Annealed(temperature)
    logits = torch.tensor([gate.init(p)], dtype=torch.float64, requires_grad=True)
    assert gate.density(logits).item() == pytest.approx(p, rel=1e-9)
    z = gate.sample(logits, logits)
    assert torch.equal(z, gate.mean(logits)) and torch.equal(z, gate.density(logits))
    (slope,) = torch.autograd.grad(z.sum(), logits)
    torch.testing.assert_close(gate.slope(z, logits), slope)
    assert slope.item() == pytest.approx(temperature * p * (1 - p), rel=1e-9)


@by_gate
@settings(deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 20))
def test_samples_lie_in_the_unit_interval_and_grow_with_the_logit(
    gate: AbstractGate, seed: int, scale: float
) -> None:
    logits, noise = scale * randn(64, seed=seed), rand(64, seed=seed + 1)
    z = gate.sample(logits, noise)
    assert bool(((z >= 0) & (z <= 1)).all())
    if not isinstance(gate, TopK):
        assert bool((gate.sample(logits + 0.5, noise) >= z).all())


@by_gate
def test_extreme_noise_and_logits_stay_finite(gate: AbstractGate) -> None:
    noise = torch.tensor([0.0, 2.0**-31, 0.5, 1 - 2.0**-24])
    for level in (-60.0, 0.0, 60.0):
        logits = torch.full((4,), level, requires_grad=True)
        z = gate.sample(logits.detach(), noise)
        assert torch.isfinite(z).all() and torch.isfinite(gate.slope(z, logits)).all()
        assert torch.isfinite(gate.density(logits)).all()


@by_stochastic
def test_slopes_are_the_derivatives(gate: AbstractGate) -> None:
    logits = randn(200, dtype=torch.float64).requires_grad_()
    noise = rand(200, seed=1, dtype=torch.float64)
    z = gate.sample(logits, noise)
    (expected,) = torch.autograd.grad(z.sum(), logits)
    torch.testing.assert_close(gate.slope(z, logits), expected, rtol=1e-9, atol=1e-12)
    (expected,) = torch.autograd.grad(gate.density(logits).sum(), logits)
    torch.testing.assert_close(
        gate.density_slope(logits, gate.density(logits)), expected, rtol=1e-9, atol=1e-12
    )


N = 200_000


def _draw(gate: AbstractGate, logit: float) -> torch.Tensor:
    return gate.sample(torch.full((N,), logit, dtype=torch.float64), rand(N, dtype=torch.float64))


def _close(share: float, expected: float) -> None:
    """Within five standard errors of a binomial share."""
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / N) + 1e-9


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 2.0])
def test_concrete_moments(logit: float) -> None:
    gate = Concrete()
    z = _draw(gate, logit)
    # P(z > 1/2) = sigmoid(tau s); logit(z) = s + Logistic / tau has mean s, variance (pi / tau)^2 / 3
    _close((z > 0.5).double().mean().item(), 1 / (1 + math.exp(-gate.tau * logit)))
    log_odds = torch.logit(z)
    deviation = math.pi / gate.tau / math.sqrt(3)
    assert abs(log_odds.mean().item() - logit) < 5 * deviation / math.sqrt(N)
    assert log_odds.std().item() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 2.0])
def test_hard_concrete_moments(logit: float) -> None:
    gate = HardConcrete()
    z = _draw(gate, logit)
    _close((z > 0).double().mean().item(), gate.density(torch.tensor(logit).double()).item())
    # P(z = 1) = sigmoid(log alpha + beta log((zeta - 1) / (1 - gamma)))... by symmetry of the logistic
    threshold = (1 - gate.gamma) / (gate.zeta - gate.gamma)
    expected = 1 / (1 + math.exp(gate.beta * math.log(threshold / (1 - threshold)) - logit))
    _close((z == 1).double().mean().item(), expected)


@pytest.mark.parametrize("mu", [-0.4, 0.0, 0.5, 1.2])
def test_gaussian_moments(mu: float) -> None:
    gate = Gaussian()
    z = _draw(gate, mu)

    def phi(t: float) -> float:
        return 0.5 * math.erfc(-t / math.sqrt(2))

    def pdf(t: float) -> float:
        return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    _close((z > 0).double().mean().item(), phi(mu / gate.sigma))
    _close((z == 1).double().mean().item(), phi((mu - 1) / gate.sigma))
    a, b = -mu / gate.sigma, (1 - mu) / gate.sigma
    mean = mu * (phi(b) - phi(a)) + gate.sigma * (pdf(a) - pdf(b)) + (1 - phi(b))
    assert abs(z.mean().item() - mean) < 5 * z.std().item() / math.sqrt(N)


@by_granularity
@by_stochastic
@pytest.mark.parametrize("shape", [(5, 8), (4, 8, 3, 2)], ids=str)
def test_gradcheck_with_fixed_noise(
    gate: AbstractGate, granularity: Granularity, shape: tuple[int, ...]
) -> None:
    units = granularity.units(shape)
    weight = randn(*shape, dtype=torch.float64).requires_grad_()
    logits = (0.4 + 0.3 * randn(*units, seed=1, dtype=torch.float64)).requires_grad_()
    noise = 0.1 + 0.8 * rand(*units, seed=2, dtype=torch.float64)

    gain = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def f(w: torch.Tensor, s: torch.Tensor, *gain: torch.Tensor) -> torch.Tensor:
        return gated_weight(w, s, noise, gate, granularity, *gain)

    with torch.random.fork_rng(devices=[]):  # gradgradcheck draws its directions
        for inputs in ((weight, logits), (weight, logits, gain)):
            assert torch.autograd.gradcheck(f, inputs)
            assert torch.autograd.gradgradcheck(f, inputs)


@by_granularity
@by_gate
def test_the_fused_backward_equals_the_plain_composition(
    gate: AbstractGate, granularity: Granularity
) -> None:
    weight, upstream = randn(6, 8).requires_grad_(), randn(6, 8, seed=3)
    units = granularity.units((6, 8))
    logits, noise = randn(*units, seed=1).requires_grad_(), rand(*units, seed=2)
    gain = torch.tensor(0.6, requires_grad=True)
    inputs = (weight, logits, gain)
    loss = (gated_weight(weight, logits, noise, gate, granularity, gain) * upstream).sum()
    fused = torch.autograd.grad(loss, inputs, retain_graph=True)  # in place
    differentiable = torch.autograd.grad(loss, inputs, create_graph=True)  # out of place
    z = gate.sample(logits, noise, granularity.project).detach().requires_grad_()
    product = gain * granularity.apply(weight, z)
    by_hand = torch.autograd.grad((product * upstream).sum(), (weight, z, gain))
    slope = gate.slope(z.detach(), logits.detach())
    for found in (fused, differentiable):
        torch.testing.assert_close(found[0], by_hand[0])
        torch.testing.assert_close(found[1], by_hand[1] * slope)
        torch.testing.assert_close(found[2], by_hand[2])


@by_gate
@given(seed=st.integers(0, 1000), k=st.integers(1, 13))
@settings(deadline=None, max_examples=25)
def test_n_to_m_samples_keep_at_most_n_of_m(gate: AbstractGate, seed: int, k: int) -> None:
    pattern = NM(2, 4)
    z = gate.sample(randn(3, k, seed=seed), rand(3, k, seed=seed + 1), pattern.project)
    for row in z:
        for start in range(0, k, 4):
            assert int((row[start : start + 4] > 0).sum()) <= 2


@pytest.mark.parametrize("text", ["weight", "channel", "block:64x32", "vector:8", "2:4"])
def test_granularity_names_round_trip(text: str) -> None:
    assert str(parse_granularity(text)) == text


@pytest.mark.parametrize("text", ["", "weights", "block:0x4", "block:4", "4:2", "vector:", "2:4:8"])
def test_bad_granularity_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_granularity(text)


@by_granularity
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    taps=st.sampled_from([(), (3, 3), (1, 2)]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_gather_is_the_adjoint_of_spread(
    granularity: Granularity, n: int, k: int, taps: tuple[int, ...], seed: int
) -> None:
    shape = (n, k, *taps)
    z = randn(*granularity.units(shape), seed=seed, dtype=torch.float64)
    values = randn(*shape, seed=seed + 1, dtype=torch.float64)
    spread = granularity.spread(z, shape)
    assert spread.shape == values.shape
    torch.testing.assert_close((spread * values).sum(), (z * granularity.gather(values)).sum())
    assert int(granularity.sizes(shape).sum()) == values.numel()
    torch.testing.assert_close(granularity.apply(values, z), values * spread)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Concrete(0),
        lambda: HardConcrete(gamma=0.1),
        lambda: Gaussian(-1),
        lambda: Annealed(0),
        lambda: TopK(1.0),
        lambda: TopK(float("nan")),
        lambda: Concrete().init(0),
        lambda: Gaussian().init(1),
        lambda: TopK(0.5).init(0.4),
    ],
)
def test_impossible_gates_are_refused(build) -> None:
    with pytest.raises(ValueError, match="expected"):
        build()
