"""What touches the weights of a block-gated layer: scaling the open ones, and the gradients of both.

Letters as in `gemm`.  Closed units are not read, unless a gate's slope is not 0 there.
"""

import torch
from torch import Tensor

from ..device import token_splits
from ..dsl import tl, triton
from .gemm import input_tile
from .lists import Lists
from .problem import (
    ROW_TILE,
    Problem,
    config_of,
    entries_per_row,
    image_strides,
    shape_constants,
    weight_strides,
)

# --- Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _open_tile(
    order_ptr, count_ptr, N, K, entries, row, group, ROWS: tl.constexpr, UNIT_N: tl.constexpr,
    UNIT_K: tl.constexpr, TAPS: tl.constexpr, SKIP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (row, group) of the open weights: n [BLOCK_N], k and entry [BLOCK_K], which are real, how many.

    Blocks: `row` of blocks, `group` of BLOCK_K / UNIT_K entries.  Rows: `row` of BLOCK_N output rows of
    the list, `group` is the entry.  Without SKIP everything is open.  No lane is real where none is left.
    """
    n = row * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    if ROWS:
        count = N
        if SKIP:
            count = tl.load(count_ptr)
        left = count - row * BLOCK_N
        real_n = n < count
        n = tl.load(order_ptr + n, mask=real_n, other=0)
        entry = group + lane * 0
        inner = lane
    else:
        slot = group * (BLOCK_K // UNIT_K) + lane // UNIT_K
        count = entries
        # Lanes past the end repeat entry 0, so that x needs no mask; what they make is dropped.
        entry = tl.where(slot < entries, slot, 0)
        if SKIP:
            count = tl.load(count_ptr + row)
            at = order_ptr + tl.cast(row, tl.int64) * entries + slot
            entry = tl.load(at, mask=slot < count, other=0)
        left = count - group * (BLOCK_K // UNIT_K)
        entry = tl.max_constancy(entry, UNIT_K)
        real_n = n < N
        inner = lane % UNIT_K
    k = entry // TAPS * UNIT_K + inner
    real_k = k < K
    if ROWS == 0:
        real_k = real_k & (slot < count)
    return n, k, entry, real_n, real_k, left


@triton.jit
def _gate_at(z_ptr, n, entry, real_n, real_k, row, entries, ROWS: tl.constexpr, UNIT_N: tl.constexpr):  # fmt: skip
    """z of the weights of a tile, as [BLOCK_K, 1] or [1, BLOCK_N]."""
    if ROWS:
        return tl.load(z_ptr + n // UNIT_N, mask=real_n, other=0.0)[None, :]
    else:  # noqa: RET505
        at = z_ptr + tl.cast(row, tl.int64) * entries + entry
        return tl.load(at, mask=real_k, other=0.0)[:, None]


@triton.jit
def _scale_kernel(
    out_ptr, w_ptr, z_ptr, order_ptr, count_ptr, N, K, entries, groups, WN, WK, WTAP,
    ROWS: tl.constexpr, UNIT_N: tl.constexpr, UNIT_K: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, TAPS, K] = W * z in out's dtype, open units only: the rest is left unset."""
    row, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    n, k, entry, real_n, real_k, left = _open_tile(
        order_ptr, count_ptr, N, K, entries, row, group,
        ROWS, UNIT_N, UNIT_K, TAPS, True, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if left > 0:
        mask = real_k[:, None] & real_n[None, :]
        tap = (entry % TAPS)[:, None]
        n64 = n.to(tl.int64)[None, :]
        w = tl.load(w_ptr + n64 * WN + (k[:, None] * WK + tap * WTAP), mask=mask, other=0.0)
        z = _gate_at(z_ptr, n, entry, real_n, real_k, row, entries, ROWS, UNIT_N)
        out = (w.to(tl.float32) * z).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + n64 * (TAPS * K) + (tap * K + k[:, None]), out, mask=mask)


@triton.jit
def _columns_kernel(
    out_ptr, dy_ptr, order_ptr, count_ptr, T, N, width, groups, SKIP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [T, width] = dy [T, N] in the order of the list; 0 past its open part up to the end of a tile."""
    first = tl.program_id(0) % groups * BLOCK_N
    t = tl.program_id(0) // groups * BLOCK_T + tl.arange(0, BLOCK_T)
    count = N
    if SKIP:
        count = tl.load(count_ptr)
    if first < count:
        column = first + tl.arange(0, BLOCK_N)
        real = column < count
        n = tl.load(order_ptr + column, mask=real, other=0)
        inside = (t < T)[:, None]
        row = t.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + row * N + n[None, :], mask=inside & real[None, :], other=0.0)
        tl.store(out_ptr + row * width + column[None, :], dy, mask=inside)


@triton.jit
def _dgate_kernel(
    partial_ptr, dw_ptr, x_ptr, dy_ptr, w_ptr, z_ptr, gain_ptr, order_ptr, count_ptr,
    T, N, K, entries, groups, width, span, split_stride, DN, H, W, OH, OW, XB, XH, XW, WN, WK, WTAP,
    ROWS: tl.constexpr, UNIT_N: tl.constexpr, UNIT_K: tl.constexpr, TAPS: tl.constexpr,
    CONV: tl.constexpr, EVEN: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, PRECISION: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (row, group) of dW over tokens [split * span, (split + 1) * span), reduced to <dW_unit, W_unit>.

    partial: [splits, width = units] of blocks, or [splits * entries, width = N] of rows.  dw, if any:
    gain * z * dW of this split at offset split * split_stride.  Nothing is written for closed units.
    dy [T, DN] is of all outputs, or (ROWS) as `open_columns` leaves it.
    """
    row, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    split = tl.program_id(1)
    n, k, entry, real_n, real_k, left = _open_tile(
        order_ptr, count_ptr, N, K, entries, row, group,
        ROWS, UNIT_N, UNIT_K, TAPS, SKIP, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if left > 0:
        column = row * BLOCK_N + tl.arange(0, BLOCK_N)  # of dy, which has rows as listed
        tap = (entry % TAPS)[None, :]
        stop = tl.minimum((split + 1) * span, T)
        acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
        for first in range(split * span, stop, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            # One zero factor is enough at the end: x may repeat its last row.
            x = input_tile(
                x_ptr, tl.minimum(t, T - 1), tap, k, real_k, H, W, OH, OW, XB, XH, XW, CONV, EVEN,
                TAPS_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W,
            )  # fmt: skip
            at = dy_ptr + t.to(tl.int64)[:, None] * DN + column[None, :]
            mask = (t < stop)[:, None]
            if ROWS == 0:
                mask = mask & real_n[None, :]
            dy = tl.load(at, mask=mask, other=0.0)
            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
        mask = real_k[:, None] & real_n[None, :]
        n64 = n.to(tl.int64)[None, :]
        at = n64 * WN + (k[:, None] * WK + (entry % TAPS)[:, None] * WTAP)  # [BLOCK_K, BLOCK_N]
        product = acc * tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ROWS:
            offset = (tl.cast(split, tl.int64) * entries + group) * width + n
            tl.store(partial_ptr + offset, tl.sum(product, 0), mask=real_n)
        else:
            UNITS: tl.constexpr = BLOCK_K // UNIT_K
            sums = tl.sum(tl.reshape(tl.sum(product, 1), [UNITS, UNIT_K]), 1)  # [UNITS]
            slot = tl.where(real_k, entry, -1)
            unit = tl.max(tl.reshape(slot, [UNITS, UNIT_K]), 1)  # one value a row, -1 past the end
            offset = tl.cast(split, tl.int64) * width + tl.cast(row, tl.int64) * entries + unit
            tl.store(partial_ptr + offset, sums, mask=unit >= 0)
        if dw_ptr is not None:
            z = _gate_at(z_ptr, n, entry, real_n, real_k, row, entries, ROWS, UNIT_N)
            if gain_ptr is not None:
                z *= tl.load(gain_ptr).to(tl.float32)
            dw_ptr += tl.cast(split, tl.int64) * split_stride
            tl.store(dw_ptr + at, (acc * z).to(dw_ptr.dtype.element_ty), mask=mask)


# --- Launchers --------------------------------------------------------------------------------------


def scale_options(problem: Problem) -> tuple[dict, dict]:
    """(constants, compiler options) of `_scale_kernel`."""
    unit = problem.unit
    n, k = (unit.h, max(unit.w, 64)) if unit.w else (32, 128)
    shape = shape_constants(problem, k)
    constants = {name: shape[name] for name in ("ROWS", "UNIT_N", "UNIT_K", "TAPS")}
    return constants | {"BLOCK_N": n, "BLOCK_K": k}, {"num_warps": 8 if n * k > 8192 else 4}


def scale(weight: Tensor, lists: Lists, problem: Problem, dtype: torch.dtype) -> Tensor:
    """W * z as [n, taps, k] in dtype; unset where closed."""
    constants, options = scale_options(problem)
    out = torch.empty(problem.n, constants["TAPS"], problem.k, dtype=dtype, device=weight.device)
    entries = entries_per_row(problem, constants["UNIT_K"])
    groups = triton.cdiv(entries, constants["BLOCK_K"] // constants["UNIT_K"])
    _scale_kernel[(triton.cdiv(problem.n, constants["BLOCK_N"]) * groups,)](
        out, weight, *lists, problem.n, problem.k, entries, groups,
        *weight_strides(problem, weight), **constants, **options,
    )  # fmt: skip
    return out


def open_columns(dy: Tensor, lists: Lists, skip: bool) -> Tensor:
    """dy [T, n] as [T, width] in the order of the open rows, which tensor cores can then load.

    The width is n filled up to whole tiles; past the last tile with an open row it is left unset.
    skip: False takes all rows as open.
    """
    tokens, n = dy.shape
    groups = triton.cdiv(n, ROW_TILE)
    out = torch.empty(tokens, groups * ROW_TILE, dtype=dy.dtype, device=dy.device)
    _columns_kernel[(groups * triton.cdiv(tokens, 32),)](
        out, dy, lists.order, lists.count, tokens, n, out.shape[1], groups,
        SKIP=skip, BLOCK_T=32, BLOCK_N=ROW_TILE, num_warps=4,
    )  # fmt: skip
    return out


def dgate_options(problem: Problem, size: int, precision: str, skip: bool) -> tuple[dict, dict]:
    """(constants, compiler options) of `_dgate_kernel` for elements of `size` bytes."""
    config = config_of("dgate", problem.unit, size, problem.tokens, 0)
    shape = shape_constants(problem, config.k)
    even = problem.k % shape["UNIT_K"] == 0
    return config.onto({**shape, "EVEN": even, "PRECISION": precision, "SKIP": skip})


def launch_dgate(
    dw: Tensor | None, x: Tensor, dy: Tensor, weight: Tensor, gain: Tensor | None, lists: Lists,
    problem: Problem, skip: bool, precision: str = "ieee", splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Partial sums of <dW_unit, W_unit> for `logit_gradients`, and gain * z * dW into zero-filled `dw`.

    skip: leave closed units out; right for all gates whose slope is 0 there (not Bernoulli).
    splits: over tokens; None chooses by the number of tiles.
    """
    tokens = problem.tokens
    constants, options = dgate_options(problem, x.element_size(), precision, skip)
    entries = entries_per_row(problem, constants["UNIT_K"])
    groups = triton.cdiv(entries, constants["BLOCK_K"] // constants["UNIT_K"])
    tiles = triton.cdiv(problem.n, constants["BLOCK_N"]) * groups
    splits, span = token_splits(tokens, tiles, constants["BLOCK_T"], splits)
    partial_shape = (splits * entries, problem.n) if problem.rows else (splits, lists.z.numel())
    partial = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
    # Splits write apart and are added in order: no atomics, so the result is always the same.
    parts = dw
    if dw is not None and splits > 1:
        parts = torch.zeros(splits, *dw.shape, dtype=torch.float32, device=x.device)
    _dgate_kernel[(tiles, splits)](
        partial, parts, x, dy, weight, lists.z, gain, lists.order, lists.count,
        tokens, problem.n, problem.k, entries, groups, partial.shape[1], span,
        0 if dw is None else dw.numel(), dy.shape[1], *problem.image[1:], *problem.out[1:],
        *image_strides(x), *weight_strides(problem, weight), **constants, **options,
    )  # fmt: skip
    if dw is not None and splits > 1:
        dw.copy_(parts.as_strided((splits, *dw.shape), (dw.numel(), *dw.stride())).sum(0))
    return partial
