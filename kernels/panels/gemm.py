"""Kernels of products with panels: rows of feature-major activations, gathered by a panel's list of columns.

Letters: T tokens, N outputs, K inputs, V rows of a panel, C vectors of packed [vectors, V] in a tile.
Activations are feature-major, xT [K, T] with rows of unit stride, so that a column of the weight is a
row of x: gathering keeps whole 16-byte copies whatever the columns are, if T is a multiple of 8.

dX scatters: each column of a panel adds to a row of dxT of its own.  A list of panels per column, with
its products formed there, would leave tensor cores one row to multiply; atomics would make the sum
depend on their order.  So `_outer_kernel` writes the product of each vector, and `_gather_kernel` adds
those of a column in the order of the panels.  That costs 8 bytes of traffic for each vector and token,
as much as atomics do, which the launcher keeps within the cache by taking the tokens in turns, a tile of them at least.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import PROGRAMS, token_splits
from .plan import PanelPlan, tile_of

GATHER_BLOCK = 512
_SHARED = 96 * 1024  # bytes of tiles in flight that fit the smallest GPU with asynchronous copies
# Products of vectors at a time: 64 MiB of float32, about what a large GPU caches; more if there are so many
# vectors that one tile of tokens takes more.
_WORKSPACE = 2**24

# --- Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _fwd_kernel(
    y_ptr, x_ptr, packed_ptr, bias_ptr, column_ptr, start_ptr, rank_ptr, T, N, panels, XK,
    PRECISION: tl.constexpr, SWAP: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """yT [N, T].  Panels run fastest, so that programs in flight share the tokens of x."""
    panel = tl.load(rank_ptr + tl.program_id(0) % panels)
    first = tl.load(start_ptr + panel)
    count = tl.load(start_ptr + panel + 1) - first
    t = tl.program_id(0) // panels * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (t < T)[None, :]
    lane = tl.arange(0, BLOCK_C)
    column_ptr += first
    packed_ptr += first.to(tl.int64) * V
    acc = tl.zeros([V if SWAP else BLOCK_T, BLOCK_T if SWAP else V], tl.float32)
    # Read a step ahead: a list inside the pipeline would take half of its stages.  Lanes past the end
    # repeat the last column, whose x reaches y anyway, so that no other x can.
    following = tl.load(column_ptr + tl.minimum(lane, count - 1), mask=lane * 0 < count, other=0)
    for i in range(tl.cdiv(count, BLOCK_C)):
        column = following  # [BLOCK_C]
        following = tl.load(column_ptr + tl.minimum((i + 1) * BLOCK_C + lane, count - 1))
        c = i * BLOCK_C + lane
        x_at = x_ptr + column.to(tl.int64)[:, None] * XK + t[None, :]
        x = tl.load(x_at, mask=inside, other=0.0)  # [BLOCK_C, BLOCK_T]
        at = packed_ptr + c[:, None] * V + tl.arange(0, V)[None, :]
        w = tl.load(at, mask=(c < count)[:, None], other=0.0)  # [BLOCK_C, V]
        if SWAP:
            acc = tl.dot(tl.trans(w), x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(x), w, acc, input_precision=PRECISION)
    if not SWAP:
        acc = tl.trans(acc)
    n = panel * V + tl.arange(0, V)
    stored = (n < N)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + n.to(tl.int64)[:, None] * T + t[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=stored & inside)


@triton.jit
def _outer_kernel(
    out_ptr, dy_ptr, packed_ptr, start_ptr, tile_ptr, T, N, DN, span,
    PRECISION: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [vectors, span] = packed @ dyT of each vector's panel; dy starts at the first of T tokens."""
    panel = tl.load(tile_ptr + 2 * tl.program_id(0))
    first = tl.load(tile_ptr + 2 * tl.program_id(0) + 1)
    left = tl.load(start_ptr + panel + 1) - first
    c = tl.arange(0, BLOCK_C)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    packed_ptr += first.to(tl.int64) * V
    out = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        n = panel * V + v
        at = packed_ptr + (c[:, None] * V + v[None, :])
        w = tl.load(at, mask=(c < left)[:, None], other=0.0)  # [BLOCK_C, BLOCK_V]
        at = dy_ptr + n.to(tl.int64)[:, None] * DN + t[None, :]
        dy = tl.load(at, mask=(n < N)[:, None] & (t < T)[None, :], other=0.0)  # [BLOCK_V, BLOCK_T]
        out = tl.dot(w, dy, out, input_precision=PRECISION)
    at = out_ptr + (first + c).to(tl.int64)[:, None] * span + t[None, :]
    tl.store(at, out, mask=(c < left)[:, None] & (t < T)[None, :])


@triton.jit
def _gather_kernel(
    dx_ptr, part_ptr, order_ptr, start_ptr, T, DXK, span, BLOCK: tl.constexpr
):  # fmt: skip
    """dxT [K, T] = sums of the parts [vectors, span] of each column, in the order of the panels."""
    k = tl.program_id(0)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = t < T
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(start_ptr + k), tl.load(start_ptr + k + 1)):
        vector = tl.load(order_ptr + i).to(tl.int64)
        total += tl.load(part_ptr + vector * span + t, mask=inside, other=0.0)
    tl.store(dx_ptr + k.to(tl.int64) * DXK + t, total.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dvalues_kernel(
    dvalues_ptr, x_ptr, dy_ptr, source_ptr, column_ptr, start_ptr, tile_ptr,
    T, N, XK, DN, span, split_stride,
    PRECISION: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Vectors of one tile over tokens [split * span, (split + 1) * span), stored through `source`."""
    panel = tl.load(tile_ptr + 2 * tl.program_id(0))
    first = tl.load(tile_ptr + 2 * tl.program_id(0) + 1)
    split = tl.program_id(1)
    left = tl.load(start_ptr + panel + 1) - first
    c = tl.arange(0, BLOCK_C)
    column = tl.load(column_ptr + first + tl.minimum(c, left - 1))  # [BLOCK_C]
    v = tl.arange(0, V)
    n = tl.minimum(panel * V + v, N - 1)
    x_at = x_ptr + column.to(tl.int64)[:, None] * XK
    dy_at = dy_ptr + n.to(tl.int64)[:, None] * DN
    stop = tl.minimum((split + 1) * span, T)
    acc = tl.zeros([BLOCK_C, V], tl.float32)
    for start in range(split * span, stop, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < stop)[None, :]
        x = tl.load(x_at + t[None, :], mask=inside, other=0.0)  # [BLOCK_C, BLOCK_T]
        dy = tl.load(dy_at + t[None, :], mask=inside, other=0.0)  # [V, BLOCK_T]
        acc = tl.dot(x, tl.trans(dy), acc, input_precision=PRECISION)
    at = source_ptr + first.to(tl.int64) * V + (c[:, None] * V + v[None, :])
    source = tl.load(at, mask=(c < left)[:, None], other=-1)
    dvalues_ptr += tl.cast(split, tl.int64) * split_stride
    tl.store(dvalues_ptr + source, acc.to(dvalues_ptr.dtype.element_ty), mask=source >= 0)


# --- Launchers --------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """One product as the kernels see it: tokens, outputs, inputs, rows of a panel, bytes of an element."""

    tokens: int
    n: int
    k: int
    height: int
    size: int


def _stages(step: int) -> int:
    return max(2, min(4, _SHARED // step))


def fwd_options(shape: Shape, precision: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, compiler options) of `_fwd_kernel`.

    Panels of 64 rows are the left operand, since tensor cores take 64 rows on the left; narrower
    ones would leave rows empty.
    """
    v, size = shape.height, shape.size
    c, t = (64, 128) if size == 2 else (32, 64)
    # Fewer tokens a tile where the tiles would not fill two waves of a large GPU.
    if t > 64 and triton.cdiv(shape.tokens, t) * triton.cdiv(shape.n, v) < PROGRAMS:
        t //= 2
    constants = {"PRECISION": precision, "SWAP": v >= 64, "V": v, "BLOCK_T": t, "BLOCK_C": c}
    warps = 8 if v == 128 else 4
    return constants, {"num_warps": warps, "num_stages": _stages(c * (t + v) * size)}


def outer_options(shape: Shape, precision: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, compiler options) of `_outer_kernel`."""
    # Without tensor cores a long row of V would stand in registers whole.
    c, t, v = tile_of(shape.height), *((128, shape.height) if shape.size == 2 else (64, 16))
    constants = {"V": shape.height, "BLOCK_V": v, "BLOCK_T": t, "BLOCK_C": c}
    constants["PRECISION"] = precision
    return constants, {"num_warps": 8 if c == 128 else 4, "num_stages": 2}


def dvalues_options(shape: Shape, precision: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, compiler options) of `_dvalues_kernel`."""
    v, size = shape.height, shape.size
    c, t = tile_of(v), 64 if size == 2 else 32
    constants = {"PRECISION": precision, "V": v, "BLOCK_T": t, "BLOCK_C": c}
    return constants, {"num_warps": 8 if c == 128 else 4, "num_stages": _stages(t * (c + v) * size)}


def launch_fwd(
    y: Tensor, x: Tensor, packed: Tensor, bias: Tensor | None, plan: PanelPlan,
    precision: str = "ieee",
) -> None:  # fmt: skip
    """Fills y [T, n] of strides (1, T); x [T, k] has unit stride over tokens."""
    (tokens, n), panels = y.shape, len(plan.rank)
    shape = Shape(tokens, n, x.shape[1], plan.height, x.element_size())
    constants, options = fwd_options(shape, precision)
    _fwd_kernel[(panels * triton.cdiv(tokens, constants["BLOCK_T"]),)](
        y, x, packed, bias, plan.columns, plan.start, plan.rank, tokens, n, panels, x.stride(1),
        **constants, **options,
    )  # fmt: skip


def launch_dx(
    dx: Tensor, dy: Tensor, packed: Tensor, plan: PanelPlan, precision: str = "ieee"
) -> None:
    """Fills dx [T, k] of strides (1, T); dy [T, n] has unit stride over tokens."""
    (tokens, k), n = dx.shape, dy.shape[1]
    shape = Shape(tokens, n, k, plan.height, dy.element_size())
    constants, options = outer_options(shape, precision)
    turn = constants["BLOCK_T"]
    span = min(max(turn, _WORKSPACE // max(64, plan.vectors) // turn * turn), tokens)
    parts = torch.empty(plan.vectors, span, dtype=torch.float32, device=dy.device)
    for first in range(0, tokens, span):
        size = min(span, tokens - first)
        if plan.vectors:
            _outer_kernel[(len(plan.tiles), triton.cdiv(size, turn))](
                parts, dy[first:], packed, plan.start, plan.tiles, size, n, dy.stride(1), span,
                **constants, **options,
            )  # fmt: skip
        _gather_kernel[(k, triton.cdiv(size, GATHER_BLOCK))](
            dx[first:], parts, plan.transposed, plan.column_start, size, dx.stride(1), span,
            BLOCK=GATHER_BLOCK, num_warps=4,
        )  # fmt: skip


def launch_dvalues(
    out: Tensor, x: Tensor, dy: Tensor, plan: PanelPlan, precision: str = "ieee",
    splits: int | None = None,
) -> None:  # fmt: skip
    """Fills out [nnz]; x [T, k] and dy [T, n] have unit stride over tokens.

    splits: over tokens; None chooses by the number of tiles.
    """
    (tokens, n), tiles = dy.shape, len(plan.tiles)
    shape = Shape(tokens, n, x.shape[1], plan.height, x.element_size())
    constants, options = dvalues_options(shape, precision)
    splits, span = token_splits(tokens, tiles, constants["BLOCK_T"], splits)
    # Splits write apart and are added in order: no atomics, so the result is always the same.
    parts = out
    if splits > 1:
        parts = torch.empty(splits, len(out), dtype=torch.float32, device=x.device)
    _dvalues_kernel[(tiles, splits)](
        parts, x, dy, plan.source, plan.columns, plan.start, plan.tiles,
        tokens, n, x.stride(1), dy.stride(1), span, len(out), **constants, **options,
    )  # fmt: skip
    if splits > 1:
        out.copy_(parts.sum(0))
