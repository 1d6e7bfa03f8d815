"""dds, dsd and sdd: against the dense matrix, their gradients, compilation and arguments."""

import pytest
import torch
from helpers import DEVICE, rand, randn
from torch import Tensor

from sparsecore.kernels.blocks.algebra import dds, dsd, sdd
from sparsecore.kernels.blocks.plan import BlockPlan
from sparsecore.kernels.blocks.products import (
    block_forward,
    block_grad_input,
    block_grad_values,
    pack,
    stored_blocks,
    unpack,
)


def matrices(dtype: torch.dtype = torch.float64) -> tuple[BlockPlan, Tensor, Tensor, Tensor]:
    """A plan [40, 37], packed blocks, x [5, 37] and dy [5, 40], all leaves."""
    plan = BlockPlan.from_mask(rand(40, 37, seed=1) < 0.004, (16, 32))
    assert 1 < plan.blocks < 6
    packed = randn(plan.blocks, 16, 32, seed=2, dtype=dtype).requires_grad_()
    x, dy = (randn(5, size, seed=size, dtype=dtype).requires_grad_() for size in (37, 40))
    return plan, packed, x, dy


def test_products_are_those_of_the_dense_matrix() -> None:
    plan, packed, x, dy = matrices()
    s = unpack(packed, plan)
    pairs = [
        (dds(x, packed, plan), x @ s.T),
        (dds(dy, packed, plan, transposed=True), dy @ s),
        (dsd(packed, plan, x.T), s @ x.T),
        (dsd(packed, plan, dy.T, transposed=True), s.T @ dy.T),
        (sdd(dy.T, x, plan), stored_blocks(dy.T @ x, plan)),
    ]
    for value, expected in pairs:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_transposed_plans_multiply_alike() -> None:
    plan, packed, x, _ = matrices()
    across = plan.T
    turned = stored_blocks(unpack(packed, plan).T, across)
    torch.testing.assert_close(dds(x, packed, plan), dds(x, turned, across, transposed=True))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_of_all_products(check) -> None:
    plan, packed, x, dy = matrices()
    turned = [t.detach().T.requires_grad_() for t in (x, dy)]
    with torch.random.fork_rng(devices=[]):  # the check draws directions from the global generator
        for transposed, left, right in ((False, x, turned[0]), (True, dy, turned[1])):
            of = {"plan": plan, "transposed": transposed}
            assert check(lambda x, s, of=of: dds(x, s, **of), (left, packed), fast_mode=True)
            assert check(lambda s, x, of=of: dsd(s, x=x, **of), (packed, right), fast_mode=True)
        assert check(lambda a, b: sdd(a, b, plan), (turned[1], x), fast_mode=True)


def test_opcheck() -> None:
    plan, packed, x, dy = matrices(torch.float32)
    lists, sides = plan.flatten()
    ops = torch.ops.sparsecore
    for transposed, left in ((False, x), (True, dy)):
        torch.library.opcheck(ops.block_dds, (left, packed, lists, sides, transposed))
    torch.library.opcheck(ops.block_sdd, (dy, x, lists, sides))


def test_compiles_whole() -> None:
    plan, packed, x, _ = matrices(torch.float32)

    def energy(x: Tensor, packed: Tensor) -> Tensor:
        y = dds(x, packed, plan)
        return (sdd(y.T, x, plan) * packed).sum() + dsd(packed, plan, x.T).square().sum()

    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, packed), energy(x, packed))
    for a, b in zip(
        torch.autograd.grad(compiled(x, packed), (x, packed)),
        torch.autograd.grad(energy(x, packed), (x, packed)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing() -> None:
    plan, packed, x, dy = matrices(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, blocks = dds(x, packed, plan), sdd(dy.T, x, plan)
    assert torch.equal(y, dds(x, packed, plan)) and torch.equal(blocks, sdd(dy.T, x, plan))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="the CPU's operations do not run the kernels")
def test_the_algebra_runs_the_kernels() -> None:
    plan, packed, x, dy = matrices(torch.float32)
    on_gpu = [t.detach().to(DEVICE).requires_grad_() for t in (packed, x, dy)]
    results = []
    for s, a, b in ((packed, x, dy), on_gpu):
        there = plan.to(s.device)
        y = dds(a, s, there)
        z = dsd(s, there, b.T, transposed=True)
        w = sdd(b.T, a, there)
        total = y.square().sum() + z.square().sum() + w.square().sum()
        results.append([y, z, w, *torch.autograd.grad(total, (s, a, b))])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, s, x, dy: dds(dy, s, p), "expected x"),
        (lambda p, s, x, dy: dds(x, s, p, transposed=True), "expected x"),
        (lambda p, s, x, dy: dds(x[0], s, p), "expected x"),
        (lambda p, s, x, dy: dds(x, s[:1], p), "expected packed"),
        (lambda p, s, x, dy: dds(x, s.double(), p), "expected packed"),
        (lambda p, s, x, dy: dsd(s, p, x), "expected x"),
        (lambda p, s, x, dy: sdd(x.T, dy, p), "expected a"),
        (lambda p, s, x, dy: sdd(dy.T, x[:3], p), "expected b"),
        (lambda p, s, x, dy: sdd(dy.T, x.double(), p), "one dtype"),
        (lambda p, s, x, dy: dds(x, s, p.to("meta")), "expected a plan on cpu"),
        (lambda p, s, x, dy: pack(x[0], p, x.dtype), "expected values"),
        (lambda p, s, x, dy: block_forward(x, s, dy[0, :3], p, []), "expected bias"),
        (lambda p, s, x, dy: block_forward(x, s, None, p, [1] * 6), "expected axes"),
        (lambda p, s, x, dy: block_forward(dy, s, None, p, []), "expected x"),
        (lambda p, s, x, dy: block_grad_input(dy, s, p, [3, 3], []), "height and width"),
        (lambda p, s, x, dy: block_grad_input(x, s, p, [], []), "expected dy"),
        (lambda p, s, x, dy: block_grad_values(dy[:3], x, p, [], x.dtype), "expected dy"),
        (lambda p, s, x, dy: block_grad_values(dy.double(), x, p, [], x.dtype), "one dtype"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*(t.detach() if isinstance(t, Tensor) else t for t in matrices(torch.float32)))


def test_bad_convolutions() -> None:
    plan = BlockPlan.from_mask(torch.ones(16, 16, 3, 3, dtype=torch.bool), (16, 16))
    packed, x = torch.zeros(9, 16, 16), torch.zeros(2, 16, 4, 4)
    with pytest.raises(ValueError, match="plan of a matrix"):
        dds(x.flatten(1)[:, :16], packed, plan)
    with pytest.raises(ValueError, match="within the padded image"):
        block_forward(x, packed, None, plan, (1, 1, 0, 0, 3, 3))
    with pytest.raises(ValueError, match="expected axes"):
        block_forward(x, packed, None, plan, ())
