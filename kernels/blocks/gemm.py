"""Products that skip what is closed: forward and dX over lists of open blocks or rows, or of stored blocks.

y = x @ (gain * W * z).T + bias.  Closed blocks (z exactly 0) are neither read nor multiplied.  The
open ones are scaled by z and rounded to x's dtype once, by `weights.scale`, at the price of
about 6 bytes a kept weight: scaling inside the product would be repeated for every tile of tokens
and put registers between copy and tensor core, which then wait for each other.  What is left is the
pipeline of a dense product with one indirection.

Letters: T tokens or output pixels, P input pixels (T for a linear layer), N outputs, K inputs, TAPS of
the filter.  Activations are rows of unit stride, i.e. channels last; scaled weights are [N, TAPS, K].
A unit covers UNIT_N x UNIT_K.  ROWS means channel gates: lists then hold output rows.

PACKED means a decided mask: weights are packed [blocks, UNIT_N, UNIT_K] and lists are those of a
`BlockPlan`, where K counts the inputs of one of GROUPS.  Programs take long rows of blocks first.
"""

from torch import Tensor

from ..conv_tiles import input_pixel, output_pixel, pixel_at
from ..device import SHARED, shared_memory
from ..dsl import tl, triton
from ..launching import Launch, remembered
from .lists import Lists
from .plan import Walk
from .problem import (
    ROW_TILE,
    Config,
    Problem,
    config_of,
    entries_per_row,
    image_strides,
    shape_constants,
    whole,
)

# --- Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _entry(order_ptr, count, i, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Step i over a list, BLOCK lanes at a time: the entries (-1 past the end) and lanes inside the unit.

    A scalar entry where a unit holds whole steps, else [BLOCK] with several entries side by side.
    """
    lane = tl.arange(0, BLOCK)
    if UNIT >= BLOCK:
        parts: tl.constexpr = UNIT // BLOCK
        slot = i // parts
        entry = tl.load(order_ptr + slot, mask=slot < count, other=-1)
        return entry, i % parts * BLOCK + lane
    else:  # noqa: RET505 - the two returns differ in type, so the compiler must see one only
        slot = i * (BLOCK // UNIT) + lane // UNIT
        entry = tl.load(order_ptr + slot, mask=slot < count, other=-1)
        return tl.max_constancy(entry, UNIT), lane % UNIT


@triton.jit
def _steps(count, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """How many steps `_entry` takes over a list."""
    if UNIT >= BLOCK:
        return count * (UNIT // BLOCK)
    else:  # noqa: RET505
        return tl.cdiv(count, BLOCK // UNIT)


@triton.jit
def _packed(i, inner, UNIT_N: tl.constexpr, UNIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where inputs `inner` of step i stand in a row of packed blocks, which follow each other."""
    if UNIT_K >= BLOCK_K:
        return i // (UNIT_K // BLOCK_K) * (UNIT_N * UNIT_K) + inner
    else:  # noqa: RET505
        slot = i * (BLOCK_K // UNIT_K) + tl.arange(0, BLOCK_K) // UNIT_K
        return slot * (UNIT_N * UNIT_K) + inner


@triton.jit
def input_tile(
    x_ptr, t, tap, k, real, H, W, OH, OW, XB, XH, XW, CONV: tl.constexpr, EVEN: tl.constexpr,
    TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
):  # fmt: skip
    """x [BLOCK_T, BLOCK_K] that output pixels t read at a tap, inputs k; 0 in padding and where not `real`."""
    if CONV:
        b, oh, ow = pixel_at(t[:, None], OH, OW)
        r, c = tap // TAPS_W, tap % TAPS_W
        _, _, inside = input_pixel(
            oh, ow, r, c, H, W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W
        )
        if EVEN == 0:
            inside = inside & real[None, :]
        # A part of the pixel and a part of the tap, so that the whole tile needs one addition.
        # int32 inside an image (the launcher checks), int64 across the batch.
        pixel = b.to(tl.int64) * XB + (oh * (STRIDE_H * XH) + ow * (STRIDE_W * XW))
        shift = (r * DIL_H - PAD_H) * XH + (c * DIL_W - PAD_W) * XW + k[None, :]
        at = pixel + shift
        return tl.load(x_ptr + at, mask=inside, other=0.0)
    at = t.to(tl.int64)[:, None] * XW + k[None, :]
    if EVEN:
        return tl.load(x_ptr + at)
    return tl.load(x_ptr + at, mask=real[None, :], other=0.0)


@triton.jit
def _fwd_kernel(
    y_ptr, x_ptr, w_ptr, bias_ptr, gain_ptr, order_ptr, count_ptr, rank_ptr,
    T, N, K, entries, H, W, OH, OW, XB, XH, XW,
    PACKED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, UNIT_N: tl.constexpr,
    UNIT_K: tl.constexpr, TAPS: tl.constexpr, CONV: tl.constexpr, EVEN: tl.constexpr,
    TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, PRECISION: tl.constexpr,
    SWAP: tl.constexpr, WALK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [T, N].  Rows of blocks run fastest, so that programs in flight share the tile of x.

    A program walks over WALK tiles of tokens: with few blocks in a row, finding them takes as long as a tile.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) % tiles
    if PACKED:
        tile = tl.load(rank_ptr + tile)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = n < N
    if ROWS:
        count = tl.load(count_ptr)
        lane = n
        n = tl.load(order_ptr + tl.minimum(lane, N - 1))
        is_open = lane < count
        n_read = tl.load(order_ptr + tl.maximum(tl.minimum(lane, count - 1), 0))
        steps = tl.where(tile * BLOCK_N < count, entries, 0)
    elif PACKED:
        first = tl.load(count_ptr + tile)
        count = tl.load(count_ptr + tile + 1) - first
        order_ptr += first
        steps = _steps(count, UNIT_K, BLOCK_K)
        if GROUPS > 1:
            x_ptr += tile // (tiles // GROUPS) * K
    else:
        count = tl.load(count_ptr + tile)
        order_ptr += tile.to(tl.int64) * entries
        n_read = tl.minimum(n, N - 1)
        steps = _steps(count, UNIT_K, BLOCK_K)
    if PACKED:
        w_ptr += first.to(tl.int64) * (UNIT_N * UNIT_K)
        rows = w_ptr + tl.arange(0, BLOCK_N) * UNIT_K
    else:
        rows = w_ptr + n_read.to(tl.int64) * (TAPS * K)
    if ROWS == 0:
        earliest, earliest_inner = _entry(order_ptr, count, 0, UNIT_K, BLOCK_K)
    start = tl.program_id(0) // tiles * (WALK * BLOCK_T)
    walks = 1
    if WALK > 1:
        walks = tl.minimum(WALK, tl.cdiv(T - start, BLOCK_T))
    for walk in tl.range(walks, flatten=True):
        t = start + walk * BLOCK_T + tl.arange(0, BLOCK_T)
        # Lanes past an edge read the last row in their place: cheaper than a mask, and never stored.
        t_read = tl.minimum(t, T - 1)
        acc = tl.zeros([BLOCK_N if SWAP else BLOCK_T, BLOCK_T if SWAP else BLOCK_N], tl.float32)
        if ROWS == 0:
            following, following_inner = earliest, earliest_inner
        for i in range(steps):
            if ROWS:
                entry = i
                inner = tl.arange(0, BLOCK_K)
            else:
                # Read a step ahead: a list inside the pipeline would take half of its stages.
                entry, inner = following, following_inner
                following, following_inner = _entry(order_ptr, count, i + 1, UNIT_K, BLOCK_K)
            tap = entry % TAPS
            if UNIT_K < BLOCK_K:
                tap = tap[None, :]  # several entries side by side
            k = entry // TAPS * UNIT_K + inner  # [BLOCK_K]
            real = (entry >= 0) & (k < K)
            x = input_tile(
                x_ptr, t_read, tap, k, real, H, W, OH, OW, XB, XH, XW, CONV, EVEN,
                TAPS_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W,
            )  # fmt: skip
            if PACKED:
                at = rows[:, None] + _packed(i, inner, UNIT_N, UNIT_K, BLOCK_K)[None, :]
            else:
                at = rows[:, None] + (tap * K + k[None, :])  # [BLOCK_N, BLOCK_K]
            w = tl.load(at) if EVEN else tl.load(at, mask=real[None, :], other=0.0)
            if SWAP:
                acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if SWAP:
            acc = tl.trans(acc)
        if ROWS:
            acc = tl.where(is_open[None, :], acc, 0.0)
        if gain_ptr is not None:
            acc *= tl.load(gain_ptr).to(tl.float32)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=stored, other=0.0).to(tl.float32)[None, :]
        at = t.to(tl.int64)[:, None] * N + n[None, :]
        mask = (t < T)[:, None] & stored[None, :]
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dx_kernel(
    dx_ptr, dy_ptr, w_ptr, gain_ptr, order_ptr, count_ptr, rank_ptr, slot_ptr,
    P, N, K, entries, DN, H, W, OH, OW,
    PACKED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, UNIT_N: tl.constexpr,
    UNIT_K: tl.constexpr, TAPS: tl.constexpr, CONV: tl.constexpr, EVEN: tl.constexpr,
    TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, PRECISION: tl.constexpr,
    SWAP: tl.constexpr, WALK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx [P, K] = gain * dy @ (W * z), over the transposed lists, or over the open rows and all taps.

    dy [T, DN]: of all outputs, or (ROWS) of the open ones in the order of the list, filled up by finite values.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    if GROUPS > 1:
        tiles *= GROUPS
    tile = tl.program_id(0) % tiles
    if PACKED:
        tile = tl.load(rank_ptr + tile)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    if GROUPS > 1:
        group = tile // (tiles // GROUPS)
        k -= group * (tiles // GROUPS) * BLOCK_K
    real_k = k < K  # a mask here, since a minimum would hide that the columns are contiguous
    lane = tl.arange(0, BLOCK_N)
    if ROWS:
        count = tl.load(count_ptr)
        steps = tl.cdiv(count, BLOCK_N) * TAPS
        earliest = tl.load(order_ptr + lane, mask=lane < count, other=0)
    else:
        if PACKED:
            first = tl.load(count_ptr + tile)
            count = tl.load(count_ptr + tile + 1) - first
            order_ptr += first
            slot_ptr += first
            earliest_slot, _ = _entry(slot_ptr, count, 0, UNIT_N, BLOCK_N)
        else:
            count = tl.load(count_ptr + tile)
            order_ptr += tile.to(tl.int64) * entries
        steps = _steps(count, UNIT_N, BLOCK_N)
        earliest, earliest_inner = _entry(order_ptr, count, 0, UNIT_N, BLOCK_N)
    start = tl.program_id(0) // tiles * (WALK * BLOCK_T)
    walks = 1
    if WALK > 1:
        walks = tl.minimum(WALK, tl.cdiv(P - start, BLOCK_T))
    for walk in tl.range(walks, flatten=True):
        p = start + walk * BLOCK_T + tl.arange(0, BLOCK_T)
        p_read = tl.minimum(p, P - 1)
        acc = tl.zeros([BLOCK_K if SWAP else BLOCK_T, BLOCK_T if SWAP else BLOCK_K], tl.float32)
        following = earliest
        if ROWS == 0:
            following_inner = earliest_inner
        if PACKED:
            following_slot = earliest_slot
        for i in range(steps):
            if ROWS:
                column = i // TAPS * BLOCK_N + lane  # of dy, which has the open rows side by side
                n = following  # [BLOCK_N]
                filters = i % TAPS
                tap = filters
                real = column < count
                slot = (i + 1) // TAPS * BLOCK_N + lane
                following = tl.load(order_ptr + slot, mask=slot < count, other=0)
            else:
                entry, inner = following, following_inner
                following, following_inner = _entry(order_ptr, count, i + 1, UNIT_N, BLOCK_N)
                n = entry // TAPS * UNIT_N + inner  # [BLOCK_N]
                column = n
                real = (entry >= 0) & (n < N)
                filters = entry % TAPS
                tap = filters
                if UNIT_N < BLOCK_N:
                    tap = tap[None, :]  # several entries side by side
            if CONV:
                b, h, w_pixel = pixel_at(p_read[:, None], H, W)
                r, c = tap // TAPS_W, tap % TAPS_W
                oh, ow, inside = output_pixel(
                    h, w_pixel, r, c, OH, OW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W
                )
                if EVEN == 0 and ROWS == 0:
                    inside = inside & real[None, :]
                # int32 inside an image (the launcher checks), int64 across the batch
                at = b.to(tl.int64) * (OH * OW * DN)
                if STRIDE_H == 1 and STRIDE_W == 1:  # a part of the pixel and a part of the tap
                    at += (h * OW + w_pixel) * DN
                    at += ((PAD_H - r * DIL_H) * OW + PAD_W - c * DIL_W) * DN + column[None, :]
                else:
                    at += (oh * OW + ow) * DN + column[None, :]
                dy = tl.load(dy_ptr + at, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_N]
            else:
                at = dy_ptr + (p_read.to(tl.int64)[:, None] * DN + column[None, :])
                dy = tl.load(at) if EVEN or ROWS else tl.load(at, mask=real[None, :], other=0.0)
            if PACKED:
                rows = following_slot.to(tl.int64) * (UNIT_N * UNIT_K) + inner * UNIT_K
                following_slot, _ = _entry(slot_ptr, count, i + 1, UNIT_N, BLOCK_N)
                columns = tl.arange(0, BLOCK_K)
            else:
                rows = (n.to(tl.int64) * TAPS + filters) * K
                columns = k
            mask = real_k[None, :] if EVEN else real[:, None] & real_k[None, :]
            at = w_ptr + (rows[:, None] + columns[None, :])  # [BLOCK_N, BLOCK_K]
            w = tl.load(at, mask=mask, other=0.0)
            if SWAP:
                acc = tl.dot(tl.trans(w), tl.trans(dy), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        if SWAP:
            acc = tl.trans(acc)
        if gain_ptr is not None:
            acc *= tl.load(gain_ptr).to(tl.float32)
        if GROUPS > 1:
            at = p.to(tl.int64)[:, None] * (K * GROUPS) + (group * K + k)[None, :]
        else:
            at = p.to(tl.int64)[:, None] * K + k[None, :]
        mask = (p < P)[:, None] & real_k[None, :]
        tl.store(dx_ptr + at, acc.to(dx_ptr.dtype.element_ty), mask=mask)


# --- Launchers --------------------------------------------------------------------------------------


def _ends(lists: Lists | Walk) -> tuple[Tensor, Tensor | None]:
    """Where the lists end, and in which order programs take them."""
    return (lists.start, lists.rank) if isinstance(lists, Walk) else (lists.count, None)


def _options(problem: Problem, config: Config, even: bool, precision: str) -> tuple[dict, dict]:
    stored = {"PACKED": problem.packed, "GROUPS": problem.groups, "EVEN": even}
    how = {"PRECISION": precision, "SWAP": config.swap, "WALK": config.walk}
    return config.onto({**stored, **shape_constants(problem, config.k), **how})


def fwd_options(
    problem: Problem, size: int, precision: str, shared: int = SHARED
) -> tuple[dict, dict]:
    """(constants, compiler options) of `_fwd_kernel` for elements of `size` bytes."""
    side = problem.unit.h if problem.unit.w else ROW_TILE
    tiles = triton.cdiv(problem.n, side)
    config = config_of("fwd", problem.unit, size, problem.tokens, tiles, problem.tile, shared)
    unit = shape_constants(problem, config.k)["UNIT_K"]
    return _options(problem, config, whole(problem.k, unit, config.k), precision)


def launch_fwd(
    y: Tensor, x: Tensor, scaled: Tensor, bias: Tensor | None, gain: Tensor | None,
    lists: Lists | Walk, problem: Problem, precision: str = "ieee",
) -> None:  # fmt: skip
    """Fills y, of contiguous rows [T, n]; x [T, k] or [B, k, H, W] of unit channel stride."""
    launch = _fwd(problem, x.element_size(), precision, image_strides(x), shared_memory(x.device))
    launch(y, x, scaled, bias, gain, lists.order, *_ends(lists))


@remembered
def _fwd(
    problem: Problem, size: int, precision: str, strides: tuple[int, int, int], shared: int
) -> Launch:
    constants, options = fwd_options(problem, size, precision, shared)
    tiles = triton.cdiv(problem.n, constants["BLOCK_N"])
    grid = (tiles * triton.cdiv(problem.tokens, constants["BLOCK_T"] * constants["WALK"]),)
    entries = entries_per_row(problem, constants["UNIT_K"])
    numbers = (problem.tokens, problem.n, problem.k, entries)
    numbers += (*problem.image[1:], *problem.out[1:], *strides)
    return Launch(_fwd_kernel, grid, numbers, constants, options)


def dx_options(
    problem: Problem, size: int, precision: str, shared: int = SHARED
) -> tuple[dict, dict]:
    """(constants, compiler options) of `_dx_kernel` for elements of `size` bytes."""
    tiles = triton.cdiv(problem.k, problem.unit.w or ROW_TILE) * problem.groups
    config = config_of("dx", problem.unit, size, problem.pixels, tiles, problem.tile, shared)
    even = not problem.rows and whole(problem.n, problem.unit.h, config.n)
    return _options(problem, config, even, precision)


def launch_dx(
    dx: Tensor, dy: Tensor, scaled: Tensor, gain: Tensor | None, lists: Lists | Walk,
    problem: Problem, precision: str = "ieee",
) -> None:  # fmt: skip
    """Fills dx, of contiguous rows [P, groups * k], from such a dy.

    Blocks: dy [T, n], or images of n channels, and transposed lists.  Rows: dy from `weights.open_columns`,
    lists as drawn.
    """
    launch = _dx(problem, dy.element_size(), precision, dy.shape[1], shared_memory(dy.device))
    slot = lists.slot if isinstance(lists, Walk) else None
    launch(dx, dy, scaled, gain, lists.order, *_ends(lists), slot)


@remembered
def _dx(problem: Problem, size: int, precision: str, width: int, shared: int) -> Launch:
    constants, options = dx_options(problem, size, precision, shared)
    tiles = triton.cdiv(problem.k, constants["BLOCK_K"]) * problem.groups
    grid = (tiles * triton.cdiv(problem.pixels, constants["BLOCK_T"] * constants["WALK"]),)
    entries = triton.cdiv(problem.n, problem.unit.h) * constants["TAPS"]
    numbers = (problem.pixels, problem.n, problem.k, entries, width)
    numbers += (*problem.image[1:], *problem.out[1:])
    return Launch(_dx_kernel, grid, numbers, constants, options)
