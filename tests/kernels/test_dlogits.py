"""dlogits at the end of dW's product: every gradient against float64 with the same noise, and the operation."""

import pytest
import torch
import triton
from fused_cases import CONV, DTYPES, GATES, LINEAR, Case, by_dlogits, check, problem

from sparsecore.kernels.gated.dlogits import _config, launch_dlogits
from sparsecore.kernels.gated.epilogue import epilogue_gated
from sparsecore.kernels.gated.tile import Tiles
from sparsecore.kernels.reference import GateSpec

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_scratch")]
CASES = LINEAR | CONV | {"long": Case((150, 36), (33, 36))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shapes_and_layouts(case: str, dtype: torch.dtype) -> None:
    p = problem(CASES[case], dtype)
    check(p, by_dlogits(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(gate: GateSpec, dtype: torch.dtype) -> None:
    p = problem(Case((9, 20), (34, 20)), dtype, gate)
    check(p, by_dlogits(p))


@pytest.mark.parametrize(
    "case", [Case((33, 36), (34, 36)), Case((2, 5, 5, 4), (7, 5, 2, 2))], ids=str
)
def test_parts_and_slices(case: Case) -> None:
    p = problem(case, torch.float32)
    tiles = Tiles(16, 16, 16, split=2, slices=4)
    first, again = by_dlogits(p, tiles), by_dlogits(p, tiles)
    check(p, first)
    assert all(torch.equal(first[name], again[name]) for name in first)  # no atomics


def test_logits_that_lie_unlike_the_weight() -> None:
    p = problem(CONV["3x3-channels-last"], torch.float32)
    p = p._replace(g=p.g._replace(logits=p.g.logits.contiguous()))
    check(p, by_dlogits(p))


def test_without_gain_and_trained_weights() -> None:
    p = problem(LINEAR["odd"], torch.float32)
    unit = p._replace(g=p.g._replace(gain=torch.ones_like(p.g.gain)))
    ds = torch.full_like(p.g.logits, float("nan"))
    launch_dlogits(ds, None, None, p.dy, p.x, p.g._replace(gain=None), conv=p.conv)
    check(unit, {"dlogits": ds})


@pytest.mark.parametrize("case", ["odd", *CONV])
def test_the_layer_and_its_gradients(case: str, kernels_noise: None) -> None:
    p = problem(CASES[case], torch.float32)
    g, c = p.g, p.conv
    tensors = (p.x, g.weight, g.logits, p.bias, g.gain.log())
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    address = {"gate": g.gate, "seed": g.seed, "step": g.step, "layer": g.layer}
    slide = None if p.x.ndim == 2 else (c[:2], c[2:4], c[4:])
    y = epilogue_gated(*inputs, slide=slide, **address)
    dx, dw, ds, db, dlog_gain = torch.autograd.grad(y, inputs, p.dy)
    found = {"y": y.detach(), "dx": dx, "dlogits": ds, "dweight": dw, "dbias": db}
    check(p, found | {"dgain": dlog_gain / g.gain})


@pytest.mark.parametrize("case", ["odd", "all-of-it"])
def test_opcheck(case: str) -> None:
    p = problem(CASES[case], torch.float32)
    g = p.g
    rest = (g.seed, g.step, g.layer, [float(v) for v in g.gate], list(p.conv), [False, True])
    operation = torch.ops.sparsecore.gated_dlogits.default
    torch.library.opcheck(operation, (p.dy, p.x, g.weight, g.logits, g.gain, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_suit_every_size(dtype: torch.dtype) -> None:
    for t in (1, 16, 100, 10**6):
        for n in (1, 64, 5000):
            for k in (1, 100, 9000):
                for taps in (1, 9):
                    tiles = _config(t, n, k, taps, dtype)
                    assert min(tiles.t, tiles.n, tiles.k) >= 16  # of tensor cores' products
                    assert 1 <= tiles.split <= triton.cdiv(t, tiles.t)  # no empty part
