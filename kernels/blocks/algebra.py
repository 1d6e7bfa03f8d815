"""Products of a block-sparse matrix S with dense ones, closed under differentiation.

The name says what is d(ense) and s(parse): output, left operand, right operand.

dds(x, packed, plan)    x @ S.T         x [T, k] -> [T, n]; transposed: x @ S, [T, n] -> [T, k]
dsd(packed, plan, x)    S @ x           x [k, T] -> [n, T]; transposed: S.T @ x, [n, T] -> [k, T]
sdd(a, b, plan)         blocks of a @ b      a [n, T], b [T, k] -> packed [blocks, h, w]

S [n, k] holds packed [blocks, h, w] where the plan stores blocks and 0 elsewhere.  All that is stored
counts, padding inside of the matrix too: kept weights come and go by `pack` and `plan.slot`.  The
gradients of dds and dsd are dds or dsd and sdd, those of sdd are dds, so all can be differentiated
again.  On the CPU, S is made dense.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..device import PLAIN, gpu_kernel
from .plan import BlockPlan
from .products import (
    block_forward,
    block_grad_input,
    block_grad_packed,
    check_packed,
    stored_blocks,
    unpack,
)

# --- Operations -------------------------------------------------------------------------------------


@torch.library.custom_op("sparsecore::block_dds", mutates_args=(), device_types=PLAIN)
def _dds(
    x: Tensor, packed: Tensor, lists: list[Tensor], sides: list[int], transposed: bool
) -> Tensor:
    dense = unpack(packed, BlockPlan.unflatten(lists, sides))
    with torch.autocast("cpu", enabled=False):  # types are what the arguments have, as on a GPU
        return x @ (dense if transposed else dense.T)


@gpu_kernel(_dds)
def _(x, packed, lists, sides, transposed):
    plan = BlockPlan.unflatten(lists, sides)
    if transposed:
        return block_grad_input(x, packed, plan, [], [])
    return block_forward(x, packed, None, plan, [])


@_dds.register_fake
def _(x, packed, lists, sides, transposed):
    return x.new_empty(x.shape[0], BlockPlan.unflatten(lists, sides).shape[int(transposed)])


@torch.library.custom_op("sparsecore::block_sdd", mutates_args=(), device_types=PLAIN)
def _sdd(dy: Tensor, x: Tensor, lists: list[Tensor], sides: list[int]) -> Tensor:
    """Blocks of dy.T @ x, for dy [T, n] and x [T, k]."""
    with torch.autocast("cpu", enabled=False):
        return stored_blocks(dy.T @ x, BlockPlan.unflatten(lists, sides))


@gpu_kernel(_sdd)
def _(dy, x, lists, sides):
    return block_grad_packed(dy, x, BlockPlan.unflatten(lists, sides), [], x.dtype)


@_sdd.register_fake
def _(dy, x, lists, sides):
    plan = BlockPlan.unflatten(lists, sides)
    return x.new_empty(plan.blocks, *plan.block)


def _keep_dds(ctx, inputs, output) -> None:
    x, packed, ctx.lists, ctx.sides, ctx.transposed = inputs
    ctx.save_for_backward(x, packed)


def _dds_gradients(ctx, dy: Tensor):
    x, packed = ctx.saved_tensors
    dx = dpacked = None
    if ctx.needs_input_grad[0]:
        dx = _dds(dy, packed, ctx.lists, ctx.sides, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        outputs, inputs = (x, dy) if ctx.transposed else (dy, x)
        dpacked = _sdd(outputs, inputs, ctx.lists, ctx.sides)
    return dx, dpacked, [None] * len(ctx.lists), None, None


def _keep_sdd(ctx, inputs, output) -> None:
    dy, x, ctx.lists, ctx.sides = inputs
    ctx.save_for_backward(dy, x)


def _sdd_gradients(ctx, dpacked: Tensor):
    dy, x = ctx.saved_tensors
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = _dds(x, dpacked, ctx.lists, ctx.sides, False)
    if ctx.needs_input_grad[1]:
        dx = _dds(dy, dpacked, ctx.lists, ctx.sides, True)
    return ddy, dx, [None] * len(ctx.lists), None


_dds.register_autograd(_dds_gradients, setup_context=_keep_dds)
_sdd.register_autograd(_sdd_gradients, setup_context=_keep_sdd)


# --- Public functions -------------------------------------------------------------------------------


def dds(
    x: Float[Tensor, "t k"],
    packed: Float[Tensor, "blocks h w"],
    plan: BlockPlan,
    *,
    transposed: bool = False,
) -> Float[Tensor, "t n"]:
    """x @ S.T, or x @ S if transposed, in the dtype that x and packed have.

    Errors: ValueError for a plan of a convolution and for other shapes, dtypes or devices.
    """
    _check_matrix(x, "x", (None, plan.shape[0 if transposed else 1]), plan)
    check_packed(x, plan, packed)
    return _dds(x, packed, *plan.flatten(), transposed)


def dsd(
    packed: Float[Tensor, "blocks h w"],
    plan: BlockPlan,
    x: Float[Tensor, "k t"],
    *,
    transposed: bool = False,
) -> Float[Tensor, "n t"]:
    """S @ x, or S.T @ x if transposed; the result has strides (1, n), and x best has its like."""
    _check_matrix(x, "x", (plan.shape[0 if transposed else 1], None), plan)
    check_packed(x, plan, packed)
    return _dds(x.T, packed, *plan.flatten(), transposed).T


def sdd(
    a: Float[Tensor, "n t"], b: Float[Tensor, "t k"], plan: BlockPlan
) -> Float[Tensor, "blocks h w"]:
    """The plan's blocks of a @ b, 0 past the matrix's edges; a best has strides (1, n)."""
    _check_matrix(a, "a", (plan.shape[0], None), plan)
    _check_matrix(b, "b", (a.shape[1], plan.shape[1]), plan)
    check_packed(b, plan)
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"expected a and b of one dtype and device, got {a.dtype} on {a.device} and "
            f"{b.dtype} on {b.device}"
        )
    return _sdd(a.T, b, *plan.flatten())


def _check_matrix(
    x: Tensor, name: str, expected: tuple[int | None, int | None], plan: BlockPlan
) -> None:
    if len(plan.shape) != 2:
        raise ValueError(f"expected a plan of a matrix, got one of a convolution's {plan.shape}")
    sides = zip(x.shape, expected, strict=False)
    if x.ndim != 2 or any(want is not None and side != want for side, want in sides):
        shape = tuple("T" if side is None else side for side in expected)
        raise ValueError(f"expected {name} {shape} for S {plan.shape}, got {tuple(x.shape)}")
