"""Products with gates sampled inside: every output and gradient against float64, with the same noise."""

import pytest
import torch
import triton
import triton.language as tl
from fused_cases import DTYPES, GATES, LINEAR, Case, by_fused, check, one, problem
from helpers import DEVICE
from torch.nn import functional as F

from sparsecore.kernels import philox
from sparsecore.kernels.device import PROGRAMS
from sparsecore.kernels.gated.fused_launch import (
    TOKENS,
    _config,
    launch_backward,
    launch_forward,
)
from sparsecore.kernels.gated.tile import Tiles, tile_noise
from sparsecore.kernels.reference import (
    GateSpec,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_scratch")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR)
def test_shapes_and_layouts(case: str, dtype: torch.dtype) -> None:
    p = problem(LINEAR[case], dtype)
    check(p, by_fused(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(gate: GateSpec, dtype: torch.dtype) -> None:
    p = problem(Case((9, 20), (34, 20)), dtype, gate)
    check(p, by_fused(p))


@pytest.mark.parametrize("shift", [-60.0, 60.0])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_all_gates_closed_or_open(gate: GateSpec, shift: float) -> None:
    p = problem(Case((9, 20), (34, 20)), torch.float32, gate, shift=shift)
    found = by_fused(p)
    check(p, found)
    if shift > 0:  # then it is the plain product
        plain = F.linear(p.x, p.g.weight * p.g.gain, p.bias)
        torch.testing.assert_close(found["y"], plain)


@pytest.mark.parametrize("t", [1, 15, 16, 17, 63, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(dtype: torch.dtype, t: int) -> None:
    p = problem(Case((t, 132), (100, 132)), dtype)
    first, again = by_fused(p), by_fused(p)
    check(p, first)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weights_in_the_compute_dtype(dtype: torch.dtype, gate: GateSpec) -> None:
    p = problem(Case((64, 192), (128, 192)), dtype, gate, weight_dtype=dtype)
    check(p, by_fused(p))


@pytest.mark.parametrize("split", [1, 2, 3])
def test_parts(split: int) -> None:
    p = problem(Case((16, 36), (34, 36)), torch.float32)
    tiles = Tiles(16, 16, 16, split)
    first, again = by_fused(p, tiles), by_fused(p, tiles)
    check(p, first)
    assert all(torch.equal(first[name], again[name]) for name in first)  # no atomics


def test_logits_that_lie_unlike_the_weight() -> None:
    p = problem(LINEAR["quads"], torch.float32)
    p = p._replace(g=p.g._replace(logits=p.g.logits.T.contiguous().T))
    found = by_fused(p)
    assert found["dlogits"].stride() == p.g.logits.stride()
    check(p, found)


def test_without_gain_bias_and_trained_weights() -> None:
    p = problem(LINEAR["odd"], torch.float32)
    unit = p._replace(bias=torch.zeros_like(p.bias), g=p.g._replace(gain=torch.ones_like(p.g.gain)))
    g = p.g._replace(gain=None)
    y, ds = torch.full_like(p.dy, float("nan")), torch.full_like(g.logits, float("nan"))
    launch_forward(y, p.x, None, g)
    launch_backward(None, ds, None, None, p.dy, p.x, g)
    check(unit, {"y": y, "dlogits": ds})
    dx = torch.full_like(p.x, float("nan"))
    launch_backward(dx, None, None, None, p.dy, p.x, g)
    check(unit, {"dx": dx})


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
    check(p, by_fused(p._replace(x=x)))


@triton.jit
def _noise_kernel(out_ptr, seed_ptr, step_ptr, first, length, w_k, QUAD: tl.constexpr):
    row = (first.to(tl.int64) + tl.arange(0, 2)) * length
    u = tile_noise(row, 4, w_k, tl.load(seed_ptr), tl.load(step_ptr), 3, 16, QUAD)
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
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_tiles_suit_every_size(kind: str, dtype: torch.dtype) -> None:
    for t in (1, 16, 17, 100, TOKENS):
        for n in (1, 64, 1024, 5000):
            for k in (1, 100, 4096, 9000):
                tiles = _config(kind, t, n, k, dtype)
                assert t <= tiles.t and min(tiles.t, tiles.n, tiles.k) >= 16  # of tensor cores
                own, summed = (n, k) if kind == "fwd" else (k, n)
                columns, steps = (tiles.n, tiles.k) if kind == "fwd" else (tiles.k, tiles.n)
                assert 1 <= tiles.split <= triton.cdiv(summed, steps)  # no empty part
                programs = tiles.split * triton.cdiv(own, columns)
                assert tiles.split == 1 or (programs <= PROGRAMS and 2 * t * tiles.split <= summed)
