"""Kept weights of a `BlockPlan`: into packed storage, and the gradient of the stored blocks alone.

Letters as in `gemm`.  A plan's `source` says for each packed element which kept weight it is, so
padding is filled with 0 on the way in and dropped on the way out.
"""

import torch
from torch import Tensor

from ..device import token_splits
from ..dsl import tl, triton
from ..launching import Launch, remembered
from .gemm import input_tile
from .plan import BlockPlan
from .problem import Problem, config_of, image_strides, shape_constants

# --- Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _dvalues_kernel(
    dvalues_ptr, x_ptr, dy_ptr, source_ptr, order_ptr, start_ptr, tile_ptr,
    T, N, K, span, split_stride, H, W, OH, OW, XB, XH, XW,
    GROUPS: tl.constexpr, UNIT_N: tl.constexpr, UNIT_K: tl.constexpr, TAPS: tl.constexpr,
    CONV: tl.constexpr, EVEN: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Blocks of one tile of dW, over tokens [split * span, (split + 1) * span), stored at split * split_stride.

    dvalues: the vector of kept weights through `source`, or without it packed blocks.  Those are 0 past
    the edges, where x and dy are read as 0.
    """
    row = tl.load(tile_ptr + 2 * tl.program_id(0))
    first = tl.load(tile_ptr + 2 * tl.program_id(0) + 1)
    split = tl.program_id(1)
    left = tl.load(start_ptr + row + 1) - first
    lane = tl.arange(0, BLOCK_K)
    part = lane // UNIT_K
    # Lanes past the end of the row repeat a block, so that x needs no mask; what they make is dropped.
    entry = tl.load(order_ptr + first + tl.where(part < left, part, 0))
    entry = tl.max_constancy(entry, UNIT_K)
    k = entry // TAPS * UNIT_K + lane % UNIT_K  # [BLOCK_K]
    real_k = k < K
    tap = (entry % TAPS)[None, :]
    n = row * UNIT_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    real_n = n < N
    if GROUPS > 1:
        x_ptr += row // (tl.cdiv(N, UNIT_N) // GROUPS) * K
    stop = tl.minimum((split + 1) * span, T)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(split * span, stop, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        # One zero factor is enough at the end: x may repeat its last row.
        x = input_tile(
            x_ptr, tl.minimum(t, T - 1), tap, k, real_k, H, W, OH, OW, XB, XH, XW, CONV, EVEN,
            TAPS_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W,
        )  # fmt: skip
        at = dy_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
        dy = tl.load(at, mask=(t < stop)[:, None] & real_n[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
    base = first.to(tl.int64) * (UNIT_N * UNIT_K)
    at = part[None, :] * (UNIT_N * UNIT_K) + lane[None, :] % UNIT_K
    at += tl.arange(0, BLOCK_N)[:, None] * UNIT_K  # [BLOCK_N, BLOCK_K]
    inside = (part < left)[None, :]
    dw = tl.trans(acc)
    dvalues_ptr += tl.cast(split, tl.int64) * split_stride
    if source_ptr is None:
        tl.store(dvalues_ptr + base + at, dw.to(dvalues_ptr.dtype.element_ty), mask=inside)
    else:
        source = tl.load(source_ptr + base + at, mask=inside, other=-1)
        dw = dw.to(dvalues_ptr.dtype.element_ty)
        tl.store(dvalues_ptr + source, dw, mask=source >= 0)


# --- Launchers --------------------------------------------------------------------------------------


def dvalues_options(problem: Problem, size: int, precision: str) -> tuple[dict, dict]:
    """(constants, compiler options) of `_dvalues_kernel` for elements of `size` bytes."""
    config = config_of("dgate", problem.unit, size, problem.tokens, 0)
    if config.k == 128:  # two groups of warps on the left, so that sources and addresses find room
        config = config._replace(warps=8)
    shape = shape_constants(problem, config.k)
    del shape["ROWS"]
    even = problem.k % shape["UNIT_K"] == 0
    return config.onto({"GROUPS": problem.groups, **shape, "EVEN": even, "PRECISION": precision})


def launch_dvalues(
    out: Tensor, x: Tensor, dy: Tensor, plan: BlockPlan, problem: Problem, precision: str = "ieee",
    splits: int | None = None,
) -> None:  # fmt: skip
    """Fills out, of kept weights [nnz] or of packed blocks [blocks, h, w], from contiguous dy [T, n].

    splits: over tokens; None chooses by the number of tiles.
    """
    source, tiles = plan.source if out.ndim == 1 else None, plan.tiles
    launch = _dvalues(
        problem, x.element_size(), precision, image_strides(x), tiles.shape[0], out.numel(), splits
    )
    splits = launch.grid[1]
    if splits == 1:
        launch(out, x, dy, source, plan.rows.order, plan.rows.start, tiles)
        return
    # Splits write apart and are added in order: no atomics, so the result is always the same.
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)
    launch(parts, x, dy, source, plan.rows.order, plan.rows.start, tiles)
    if out.dtype == torch.float32:
        torch.sum(parts, 0, out=out)
    else:
        out.copy_(parts.sum(0))


@remembered
def _dvalues(
    problem: Problem, size: int, precision: str, strides: tuple[int, int, int], tiles: int,
    stride: int, splits: int | None,
) -> Launch:  # fmt: skip
    constants, options = dvalues_options(problem, size, precision)
    splits, span = token_splits(
        problem.tokens, tiles, constants["BLOCK_T"], splits, finer=problem.tile
    )
    numbers = (problem.tokens, problem.n, problem.k, span, stride)
    numbers += (*problem.image[1:], *problem.out[1:], *strides)
    return Launch(_dvalues_kernel, (tiles, splits), numbers, constants, options)
