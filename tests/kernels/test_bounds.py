"""The bound of products: it lets other orders of summation pass, and no tile that is slightly wrong."""

import pytest
import torch
from bounds import Expected, gated, gates, products, require
from helpers import randn
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
from sparsecore.kernels.units import Unit, apply_ref, gather_ref, unit_shape

TOKENS = 12608  # of a batch of 64 images in ViT-B/16
GATES = [
    GateSpec(CONCRETE, 1.0),
    GateSpec(CONCRETE, 2 / 3),
    GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1),
    GateSpec(GAUSSIAN, 0.5),
    GateSpec(BERNOULLI),
]
NAMES = ("y", "dx", "dweight", "dbias")


def problem(dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias and dy, with some features far larger than others."""
    x, weight = randn(TOKENS, 48, seed=1) * torch.logspace(-2, 1, 48), randn(64, 48, seed=2)
    return [t.to(dtype) for t in (x, weight, randn(64, seed=3), randn(TOKENS, 64, seed=4))]


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b in float32, one term after the other."""
    total = torch.zeros(a.shape[1], b.shape[1])
    for row, other in zip(a.float(), b.float(), strict=True):
        total.addcmul_(row[:, None], other[None, :])
    return total


def cut_off(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b as a tensor core may sum it: after every 8 terms without the bits that float32 has no place for."""
    total = torch.zeros(a.shape[1], b.shape[1])
    for rows, others in zip(a.double().split(8), b.double().split(8), strict=True):
        exact = total.double() + rows.T @ others
        total = exact.float()
        total = torch.where(total.abs() > exact.abs(), total.nextafter(torch.zeros(())), total)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_in_any_order_pass(dtype: torch.dtype) -> None:
    x, weight, bias, dy = problem(dtype)
    y, dx, dweight, dbias = products(F.linear, x, weight, bias, dy)
    require("y", F.linear(x, weight, bias), y)
    require("dx", dy @ weight, dx)
    require("dbias", dy.sum(0), dbias)
    narrow = [dy.T @ x, dy.flip(0).T @ x.flip(0)]
    parts = [a.float().T @ b.float() for a, b in zip(dy.split(800), x.split(800), strict=True)]
    for found in (*narrow, sum(parts), one_by_one(dy.flip(0), x.flip(0))):
        require("dweight", found, dweight)
    if dtype == torch.float16:
        require("dweight", cut_off(dy, x), dweight)


@pytest.mark.parametrize("place", [(0, 0), (16, 32), (48, 0)])
def test_a_tile_that_is_slightly_wrong_does_not(place: tuple[int, int]) -> None:
    """By 1e-5 of itself, after a sum as long as they come and as inexact as the order makes it."""
    x, weight, bias, dy = problem(torch.float32)
    found = [F.linear(x, weight, bias), dy @ weight, one_by_one(dy, x)]
    expected = products(F.linear, x, weight, bias, dy)
    for name, value, right in zip(NAMES, found, expected, strict=False):
        require(name, value, right)
        row, column = place[0], place[1] % value.shape[1]
        value[row : row + 16, column : column + 16] *= 1 + 1e-5
        with pytest.raises(AssertionError, match=f"{name}, a"):
            require(name, value, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_wrong_element_does_not(dtype: torch.dtype) -> None:
    """A term too much, beside 12,608, or the element is not a number."""
    x, weight, bias, dy = problem(dtype)
    expected = products(F.linear, x, weight, bias, dy)[2]
    right = one_by_one(dy, x)
    typical = (dy[:, 3].float() * x[:, 40].float()).abs().median()
    for wrong in (right[3, 40] + typical, torch.nan):
        value = right.clone()
        value[3, 40] = wrong
        with pytest.raises(AssertionError, match="dweight, an element"):
            require("dweight", value, expected)


def test_what_is_narrow_or_empty() -> None:
    for shape in ((), (1,), (5, 1), (2, 3, 4, 5), (0, 4)):
        exact = torch.ones(shape, dtype=torch.float64)
        for filters in (False, True):
            right = Expected(exact, torch.zeros_like(exact), torch.zeros_like(exact), filters)
            require("one", exact.float(), right)
            if exact.numel():
                with pytest.raises(AssertionError, match="an element"):
                    require("one", exact.float() + 1e-6, right)


def noise(*shape: int) -> Tensor:
    return (randn(*shape, seed=9).sigmoid() * 2**24).floor() / 2**24


@pytest.mark.parametrize("shift", [-60.0, 0.0, 60.0])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates_in_float32_pass(gate: GateSpec, shift: float) -> None:
    logits, u = randn(300, 200, seed=3) + shift, noise(300, 200)
    u[0, :2] = torch.tensor([0.0, 1 - EPS])
    z = sample_ref(gate, logits, u)
    (exact, error), (slope, slope_error) = gates(gate, logits, u)
    assert bool(((z - exact).abs() <= error).all())
    assert bool(((slope_ref(gate, z, logits) - slope).abs() <= slope_error).all())
    part = (exact > 0) & (exact < 0.9)
    for value, most in (
        (exact, error),
        (slope, slope_error),
    ):  # and are not much less exact than that
        assert not part.any() or float((most / value)[part].median()) < 1e-4


def in_float32(x, weight, logits, bias, gain, dy, gate, unit, u) -> dict[str, Tensor]:
    """The layer and its gradients as a GPU computes them: factors of x's dtype, float32 sums."""
    z, wide = sample_ref(gate, logits, u), dy.float()
    used = (gain * apply_ref(weight, z, unit)).to(x.dtype).float()
    dused = wide.T @ x.float()
    spread = apply_ref(torch.ones_like(weight), z, unit)
    return {
        "y": F.linear(x.float(), used, bias).to(x.dtype),
        "dx": (wide @ used).to(x.dtype),
        "dweight": dused * spread * gain,
        "dlogits": gather_ref(dused * weight, unit) * slope_ref(gate, z, logits) * gain,
        "dbias": wide.sum(0),
        "dgain": (dused * weight * spread).sum(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [-60.0, 0.0])
@pytest.mark.parametrize("unit", [Unit(), Unit(16, 16), Unit(1, 0)], ids=str)
def test_gated_products_pass_and_wrong_ones_do_not(
    unit: Unit, shift: float, dtype: torch.dtype
) -> None:
    x, weight, bias, dy = problem(dtype)
    shape = unit_shape(weight.shape, unit)
    logits, u = randn(*shape, seed=6) + shift, noise(*shape)
    gain = torch.tensor(1.3)
    off = 2e-5 if shift == 0 and dtype == torch.float32 else 3e-4  # exp(-60) is as exact as 60 is
    for gate in GATES:
        given = (x[:300], weight.float(), logits, bias.float(), gain, dy[:300], gate, unit, u)
        expected = gated(F.linear, *given)
        for name, value in in_float32(*given).items():
            require(name, value, expected[name])
            if value.numel() >= 256 and value[:16, :16].any():
                wrong = value.clone()
                wrong[:16, :16] *= 1 + off if value.dtype == torch.float32 else 1.01
                with pytest.raises(AssertionError, match=name):
                    require(name, wrong, expected[name])
