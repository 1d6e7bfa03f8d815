"""Sampling and its backward where weights share a gate (blocks, channels) or compete for one (N:M).

The formulas are in `launch`, which launches these kernels.
"""

from ..dsl import tl, triton
from .formulas import gate_density, gate_slope, sample_gate, uniform_at
from .segment_math import (
    COLUMN_UNITS,
    FACTOR,
    HEIGHT,
    INPUTS,
    LAYER,
    LOGITS,
    OUT,
    ROWS,
    STRIDE_K,
    STRIDE_N,
    STRIDE_TAP,
    TAPS,
    UNITS,
    WEIGHT,
    WIDTH,
    advance,
    chunk_of,
    gain_of,
    store_sums,
    tensor_of,
)


@triton.jit
def _tile(row, unit, element, WIDE: tl.constexpr, VECTOR: tl.constexpr):
    """(offsets in the weight, which are real) of elements [1, E] of units [U, 1]; int64.

    WIDE: the units' width where it is the same in all layers, else 0.  VECTOR > 1: inputs lie side by side,
    and every row, width and tap is a multiple of so many: memory moves in vectors.
    """
    columns, taps = tl.load(row + COLUMN_UNITS).to(tl.int32), tl.load(row + TAPS).to(tl.int32)
    height, inputs = tl.load(row + HEIGHT).to(tl.int32), tl.load(row + INPUTS).to(tl.int32)
    stride_n, stride_k = tl.load(row + STRIDE_N), tl.load(row + STRIDE_K)
    stride_tap = tl.load(row + STRIDE_TAP)
    if WIDE > 0:
        width: tl.constexpr = WIDE
        down, across = element // width, element % width
        in_unit = down < height
    else:  # whole rows
        width = inputs
        down, across = 0, element
        in_unit = element < inputs
    tap = unit % taps
    n = unit // (taps * columns) * height + down
    left = unit // taps % columns * width
    if VECTOR > 1:
        inputs = tl.multiple_of(inputs, VECTOR)
        stride_n, stride_tap = tl.multiple_of(stride_n, VECTOR), tl.multiple_of(stride_tap, VECTOR)
        offset = n * stride_n + (tap * stride_tap + left) + across
    else:
        offset = n * stride_n + tap * stride_tap + (left + across) * stride_k
    rows = tl.load(row + ROWS).to(tl.int32)
    return offset, (n < rows) & (left + across < inputs) & in_unit


@triton.jit
def _project(z, real, KEEP: tl.constexpr):
    """z [U, E] with all but the KEEP largest of each row set to 0; the lower index wins a tie."""
    wide: tl.constexpr = z.shape[1]
    lane = tl.arange(0, wide)
    ranked = tl.where(real, z, -1.0)
    mine, other = tl.expand_dims(ranked, 2), tl.expand_dims(ranked, 1)  # [U, E, 1], [U, 1, E]
    before = tl.expand_dims(tl.expand_dims(lane, 0) < tl.expand_dims(lane, 1), 0)  # [1, E, E]
    ahead = (other > mine) | ((other == mine) & before)
    rank = tl.sum(ahead.to(tl.int32), axis=2)
    return tl.where(rank < KEEP, z, 0.0)


@triton.jit
def sample_tiled_kernel(
    w_ptr, s_ptr, out_ptr, gain_ptr, seed_ptr, step_ptr, control_ptr, table_ptr, chunk_ptr,
    segments_count, groups_count,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
    GAIN: tl.constexpr, ADVANCE: tl.constexpr, KEEP: tl.constexpr,
    U: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Units of several weights, or N:M: w_eff, a tile of units [U] by their elements [E] at a time."""
    segment, start, stop, row = chunk_of(chunk_ptr, table_ptr)
    seed, step = tl.load(seed_ptr + (segment if ADVANCE else 0)), tl.load(step_ptr)
    gain = gain_of(gain_ptr, segment, GAIN)
    if ADVANCE:
        step += 1
        advance(step_ptr, control_ptr, gain_ptr, segment, start, segments_count, groups_count, GAIN)
    layer, units = tl.load(row + LAYER), tl.load(row + UNITS)
    elements = (tl.load(row + HEIGHT) * tl.load(row + WIDTH)).to(tl.int32)
    w_ptr, s_ptr = (
        tensor_of(w_ptr, row, WEIGHT, VECTOR > 1),
        tensor_of(s_ptr, row, LOGITS, VECTOR > 1),
    )
    out_ptr = tensor_of(out_ptr, row, OUT, VECTOR > 1)
    for block in range(start, stop):
        unit = tl.expand_dims((block * U + tl.arange(0, U)).to(tl.int32), 1)  # [U, 1]
        if KEEP == 0:
            s = tl.load(s_ptr + unit, mask=unit < units, other=0.0).to(tl.float32)
            z = sample_gate(
                uniform_at(unit.to(tl.int64), seed, step, layer), s, KIND, A, B, C, FAST
            )
        for e in range(0, elements, E):
            element = tl.expand_dims(e + tl.arange(0, E), 0)  # [1, E]
            offset, real = _tile(row, unit, element, WIDE, VECTOR)
            w = tl.load(w_ptr + offset, mask=real, other=0.0).to(tl.float32) * gain
            if KEEP > 0:
                s = tl.load(s_ptr + offset, mask=real, other=0.0).to(tl.float32)
                z = sample_gate(uniform_at(offset, seed, step, layer), s, KIND, A, B, C, FAST)
                z = _project(z, real, KEEP)
            tl.store(out_ptr + offset, (w * z).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def backward_tiled_kernel(
    grad_ptr, grad_offset_ptr, w_ptr, s_ptr, gain_ptr, seed_ptr, step_ptr,
    ds_ptr, dw_ptr, partial_ptr, table_ptr, chunk_ptr,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
    FAST: tl.constexpr, GAIN: tl.constexpr, STORE_DW: tl.constexpr, MULTI: tl.constexpr,
    KEEP: tl.constexpr, U: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Units of several weights, or N:M: ds [units] (in the logits' layout) and this program's sums."""
    segment, start, stop, row = chunk_of(chunk_ptr, table_ptr)
    seed, step = tl.load(seed_ptr + (segment if MULTI else 0)), tl.load(step_ptr)
    gain = gain_of(gain_ptr, segment, GAIN)
    layer, units = tl.load(row + LAYER), tl.load(row + UNITS)
    elements = (tl.load(row + HEIGHT) * tl.load(row + WIDTH)).to(tl.int32)
    grad_offset = tl.load(grad_offset_ptr + segment)
    if VECTOR > 1:
        grad_offset = tl.multiple_of(grad_offset, 8)
    grad_ptr += grad_offset
    w_ptr = tensor_of(w_ptr, row, WEIGHT, VECTOR > 1)
    if STORE_DW:
        dw_ptr = tensor_of(dw_ptr, row, OUT, VECTOR > 1)
    # One gate per weight: ds may lie where grad lies.  Otherwise it is small and has its own place.
    ds_ptr += grad_offset if KEEP > 0 else tl.load(row + FACTOR)
    s_ptr = tensor_of(s_ptr, row, LOGITS, VECTOR > 1)
    task = tl.zeros([U, 1], dtype=tl.float32)
    kept = tl.zeros([U, 1], dtype=tl.float32)
    pull = tl.zeros([U, 1], dtype=tl.float32)
    dot = tl.zeros([U, 1], dtype=tl.float32)
    for block in range(start, stop):
        unit = tl.expand_dims((block * U + tl.arange(0, U)).to(tl.int32), 1)  # [U, 1]
        live = unit < units
        if KEEP == 0:
            s = tl.load(s_ptr + unit, mask=live, other=0.0).to(tl.float32)
            z = sample_gate(
                uniform_at(unit.to(tl.int64), seed, step, layer), s, KIND, A, B, C, FAST
            )
        through = tl.zeros([U, 1], dtype=tl.float32)  # sum of w dR/dw_eff over each unit
        size = tl.zeros([U, 1], dtype=tl.float32)
        for e in range(0, elements, E):
            element = tl.expand_dims(e + tl.arange(0, E), 0)  # [1, E]
            offset, real = _tile(row, unit, element, WIDE, VECTOR)
            grad = tl.load(grad_ptr + offset, mask=real, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + offset, mask=real, other=0.0).to(tl.float32) * gain
            if KEEP > 0:
                s = tl.load(s_ptr + offset, mask=real, other=0.0).to(tl.float32)
                z = sample_gate(uniform_at(offset, seed, step, layer), s, KIND, A, B, C, FAST)
                z = _project(z, real, KEEP)
                ds = grad * w * gate_slope(z, s, KIND, A, B, C, FAST)
                tl.store(ds_ptr + offset, ds.to(ds_ptr.dtype.element_ty), mask=real)
                density, slope = gate_density(s, KIND, A, B, C, SHIFT, FAST)
                task += tl.sum(ds * ds, axis=1, keep_dims=True)
                kept += tl.sum(tl.where(real, density, 0.0), axis=1, keep_dims=True)
                pull += tl.sum(tl.where(real, slope * slope, 0.0), axis=1, keep_dims=True)
                dot += tl.sum(grad * w * z, axis=1, keep_dims=True)
            else:
                through += tl.sum(grad * w, axis=1, keep_dims=True)
                size += tl.sum(real.to(tl.float32), axis=1, keep_dims=True)
            if STORE_DW:
                dw = (grad * gain * z).to(dw_ptr.dtype.element_ty)
                tl.store(dw_ptr + offset, dw, mask=real)
        if KEEP == 0:
            ds = through * gate_slope(z, s, KIND, A, B, C, FAST)
            tl.store(ds_ptr + unit, ds.to(ds_ptr.dtype.element_ty), mask=live)
            density, slope = gate_density(s, KIND, A, B, C, SHIFT, FAST)
            task += tl.where(live, ds * ds, 0.0)
            kept += size * density
            pull += size * size * slope * slope
            dot += through * z
    store_sums(partial_ptr, task, kept, pull, dot)
