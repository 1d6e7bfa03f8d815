"""Products with gates sampled inside: every output and gradient against float64, with the same noise."""

import pytest
import torch
import triton
import triton.language as tl
from fused_cases import CASES, DTYPES, GATES, Case, by_kernels, check, one, problem
from helpers import DEVICE
from torch.nn import functional as F

from sparsecore.kernels import philox
from sparsecore.kernels.gated.fused import (
    _launch_dlogits,
    _launch_forward,
)
from sparsecore.kernels.gated.fused_kernels import _noise
from sparsecore.kernels.gated.fused_launch import Tiles, _config
from sparsecore.kernels.reference import (
    GateSpec,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_scratch")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_layouts(case: str, dtype: torch.dtype) -> None:
    p = problem(CASES[case], dtype)
    check(p, by_kernels(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(gate: GateSpec, dtype: torch.dtype) -> None:
    p = problem(Case((9, 20), (34, 20)), dtype, gate)
    check(p, by_kernels(p))


@pytest.mark.parametrize("shift", [-60.0, 60.0])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_all_gates_closed_or_open(gate: GateSpec, shift: float) -> None:
    p = problem(Case((9, 20), (34, 20)), torch.float32, gate, shift=shift)
    found = by_kernels(p)
    check(p, found)
    if shift > 0:  # then it is the plain product
        plain = F.linear(p.x, p.g.weight * p.g.gain, p.bias)
        torch.testing.assert_close(found["y"], plain)


def test_weights_in_the_compute_dtype() -> None:
    p = problem(CASES["quads"], torch.float16, weight_dtype=torch.float16)
    check(p, by_kernels(p))


@pytest.mark.parametrize(
    "case", [Case((33, 36), (34, 36)), Case((2, 5, 5, 4), (7, 5, 2, 2))], ids=str
)
def test_parts_and_slices(case: Case) -> None:
    p = problem(case, torch.float32)
    tiles = dict.fromkeys(("fwd", "dx", "dlogits"), Tiles(16, 16, 16, split=2, slices=4))
    first, again = by_kernels(p, tiles), by_kernels(p, tiles)
    check(p, first)
    assert all(torch.equal(first[name], again[name]) for name in first)  # no atomics


def test_logits_that_lie_unlike_the_weight() -> None:
    p = problem(CASES["3x3-channels-last"], torch.float32)
    p = p._replace(g=p.g._replace(logits=p.g.logits.contiguous()))
    check(p, by_kernels(p))


def test_without_gain_bias_and_trained_weights() -> None:
    p = problem(CASES["odd"], torch.float32)
    unit = p._replace(bias=torch.zeros_like(p.bias), g=p.g._replace(gain=torch.ones_like(p.g.gain)))
    g = p.g._replace(gain=None)
    y, ds = torch.full_like(p.dy, float("nan")), torch.full_like(g.logits, float("nan"))
    _launch_forward(y, p.x, None, g)
    _launch_dlogits(ds, None, None, p.dy, p.x, g)
    check(unit, {"y": y, "dlogits": ds})


def test_pixels_far_apart() -> None:
    """More than 2**31 elements between two rows of x: addresses are 64-bit."""
    room = torch.empty(1, dtype=torch.float16, device=DEVICE)
    try:
        torch.use_deterministic_algorithms(False)  # it would fill, and so touch, all of it
        room = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no 4 GiB to reserve")
    p = problem(Case((2, 16), (5, 16)), torch.float16)
    x = room.as_strided((2, 16), (2**31 + 8, 1)).copy_(p.x)
    check(p, by_kernels(p._replace(x=x)))


@triton.jit
def _noise_kernel(out_ptr, seed_ptr, step_ptr, first, length, w_k, QUAD: tl.constexpr):
    row = (first.to(tl.int64) + tl.arange(0, 2)) * length
    u = _noise(row, 4, w_k, tl.load(seed_ptr), tl.load(step_ptr), 3, 16, QUAD)
    at = tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, u)


@pytest.mark.parametrize(("taps", "quad"), [(1, True), (1, False), (9, False)])
def test_gates_beyond_two_to_the_31(taps: int, quad: bool) -> None:
    first, length = 2**24 + 3, 1024 * taps  # of a row
    out = torch.full((2, 16), float("nan"), device=DEVICE)
    _noise_kernel[(1,)](out, one(1), one(2), first, length, taps, QUAD=quad)
    for row in range(2):
        start = (first + row) * length + 4 * taps
        u = philox.uniform_ref(16 * taps, one(1), one(2), 3, offset=start)[::taps]
        assert torch.equal(out[row], u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["fwd", "dx", "dlogits"])
def test_tiles_suit_every_size(kind: str, dtype: torch.dtype) -> None:
    for t in (1, 16, 100, 10**6):
        for n in (1, 64, 5000):
            for k in (1, 100, 9000):
                for taps in (1, 9):
                    tiles = _config(kind, t, n, k, taps, dtype)
                    assert tiles == _config(kind, t, n, k, taps, dtype)
                    assert min(tiles.t, tiles.n, tiles.k) >= 16  # of tensor cores' products
                    blocks = {
                        "fwd": triton.cdiv(k, tiles.k) * taps,
                        "dx": triton.cdiv(n, tiles.n) * taps,
                        "dlogits": triton.cdiv(t, tiles.t),
                    }
                    assert 1 <= tiles.split <= blocks[kind]  # no empty part
