"""Sampling and its backward where every weight has a gate: a stream through memory, block by block.

The formulas are in `launch`, which launches these kernels.
"""

from ..dsl import tl, triton
from ..philox import interleave4, uniform_words
from .formulas import gate_density, gate_slope, load_block, sample_gate, store_block
from .segment_math import (
    FACTOR,
    FLAT,
    LAYER,
    LOGITS,
    NUMEL,
    OUT,
    WEIGHT,
    advance,
    chunk_of,
    gain_of,
    store_sums,
    tensor_of,
)


@triton.jit
def _sample_block(
    w_ptr, s_ptr, out_ptr, q_ptr, first, numel, gain, seed, step, layer,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
    STORE_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    index = first + tl.arange(0, FLAT).to(tl.int64)  # [FLAT]
    w = gain * load_block(w_ptr, index, numel, MASKED)
    s = load_block(s_ptr, index, numel, MASKED)
    z = _sample(first, s, seed, step, layer, KIND, A, B, C, FAST)
    store_block(out_ptr, index, w * z, numel, MASKED)
    if STORE_Q:
        store_block(q_ptr, index, w * gate_slope(z, s, KIND, A, B, C, FAST), numel, MASKED)


@triton.jit
def _sample(
    first, s, seed, step, layer,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z of the block whose first gate is `first`."""
    counter = (first >> 2) + tl.arange(0, FLAT // 4).to(tl.int64)
    a, b, c, d = uniform_words(counter, seed, step, layer)
    return sample_gate(interleave4(a, b, c, d), s, KIND, A, B, C, FAST)


@triton.jit
def sample_flat_kernel(
    w_ptr, s_ptr, out_ptr, q_ptr, gain_ptr, seed_ptr, step_ptr, control_ptr, table_ptr, chunk_ptr,
    segments_count, groups_count,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr,
    GAIN: tl.constexpr, STORE_Q: tl.constexpr, ADVANCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One gate per weight: w_eff (and q), in memory order."""
    segment, start, stop, row = chunk_of(chunk_ptr, table_ptr)
    seed, step = tl.load(seed_ptr + (segment if ADVANCE else 0)), tl.load(step_ptr)
    gain = gain_of(gain_ptr, segment, GAIN)
    if ADVANCE:
        step += 1
        advance(step_ptr, control_ptr, gain_ptr, segment, start, segments_count, groups_count, GAIN)
    layer, numel = tl.load(row + LAYER), tl.load(row + NUMEL)
    w_ptr, s_ptr = tensor_of(w_ptr, row, WEIGHT, ALIGNED), tensor_of(s_ptr, row, LOGITS, ALIGNED)
    out_ptr = tensor_of(out_ptr, row, OUT, ALIGNED)
    q_ptr = tensor_of(q_ptr, row, FACTOR, ALIGNED)
    whole = tl.minimum(stop, numel // FLAT)
    for block in range(start, whole):
        _sample_block(
            w_ptr, s_ptr, out_ptr, q_ptr, block * FLAT, numel, gain, seed, step, layer,
            KIND, A, B, C, FAST, STORE_Q, False,
        )  # fmt: skip
    if whole < stop:  # the tensor's last block
        _sample_block(
            w_ptr, s_ptr, out_ptr, q_ptr, whole * FLAT, numel, gain, seed, step, layer,
            KIND, A, B, C, FAST, STORE_Q, True,
        )  # fmt: skip


@triton.jit
def _backward_block(
    grad_ptr, w_ptr, s_ptr, out_ptr, q_ptr, ds_ptr, dw_ptr, first, numel, gain, seed, step, layer,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
    FAST: tl.constexpr, LOAD_Q: tl.constexpr, STORE_DW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores ds (and dw); the four quantities to sum, [FLAT] each."""
    index = first + tl.arange(0, FLAT).to(tl.int64)  # [FLAT]
    grad = load_block(grad_ptr, index, numel, MASKED)
    s = load_block(s_ptr, index, numel, MASKED)
    if LOAD_Q:
        ds = grad * load_block(q_ptr, index, numel, MASKED)
        w_eff = load_block(out_ptr, index, numel, MASKED)
    else:
        w = gain * load_block(w_ptr, index, numel, MASKED)
        z = _sample(first, s, seed, step, layer, KIND, A, B, C, FAST)
        ds = grad * w * gate_slope(z, s, KIND, A, B, C, FAST)
        w_eff = w * z
        if STORE_DW:
            store_block(dw_ptr, index, grad * gain * z, numel, MASKED)
    ds = ds.to(ds_ptr.dtype.element_ty).to(tl.float32)  # the norm is of what is stored
    store_block(ds_ptr, index, ds, numel, MASKED)
    density, slope = gate_density(s, KIND, A, B, C, SHIFT, FAST)
    if MASKED:
        density = tl.where(index < numel, density, 0.0)
        slope = tl.where(index < numel, slope, 0.0)
    return ds * ds, density, slope * slope, grad * w_eff


@triton.jit
def backward_flat_kernel(
    grad_ptr, grad_offset_ptr, w_ptr, s_ptr, out_ptr, q_ptr, gain_ptr, seed_ptr, step_ptr,
    ds_ptr, dw_ptr, partial_ptr, table_ptr, chunk_ptr,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
    FAST: tl.constexpr, GAIN: tl.constexpr, LOAD_Q: tl.constexpr, STORE_DW: tl.constexpr,
    MULTI: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One gate per weight: ds (which may lie where grad lies) and this program's sums."""
    segment, start, stop, row = chunk_of(chunk_ptr, table_ptr)
    seed, step = tl.load(seed_ptr + (segment if MULTI else 0)), tl.load(step_ptr)
    gain = gain_of(gain_ptr, segment, GAIN)
    layer, numel = tl.load(row + LAYER), tl.load(row + NUMEL)
    grad_offset = tl.load(grad_offset_ptr + segment)
    if ALIGNED:
        grad_offset = tl.multiple_of(grad_offset, 8)
    grad_ptr, ds_ptr = grad_ptr + grad_offset, ds_ptr + grad_offset
    w_ptr, s_ptr = tensor_of(w_ptr, row, WEIGHT, ALIGNED), tensor_of(s_ptr, row, LOGITS, ALIGNED)
    out_ptr = tensor_of(out_ptr, row, OUT, ALIGNED)
    if STORE_DW:
        dw_ptr = tensor_of(dw_ptr, row, OUT, ALIGNED)
    q_ptr = tensor_of(q_ptr, row, FACTOR, ALIGNED)
    zero = tl.zeros([FLAT], dtype=tl.float32)
    task, kept, pull, dot = zero, zero, zero, zero
    whole = tl.minimum(stop, numel // FLAT)
    for block in range(start, whole):
        sums = _backward_block(
            grad_ptr, w_ptr, s_ptr, out_ptr, q_ptr, ds_ptr, dw_ptr, block * FLAT, numel, gain,
            seed, step, layer, KIND, A, B, C, SHIFT, FAST, LOAD_Q, STORE_DW, False,
        )  # fmt: skip
        task, kept, pull, dot = task + sums[0], kept + sums[1], pull + sums[2], dot + sums[3]
    if whole < stop:  # the tensor's last block
        sums = _backward_block(
            grad_ptr, w_ptr, s_ptr, out_ptr, q_ptr, ds_ptr, dw_ptr, whole * FLAT, numel, gain,
            seed, step, layer, KIND, A, B, C, SHIFT, FAST, LOAD_Q, STORE_DW, True,
        )  # fmt: skip
        task, kept, pull, dot = task + sums[0], kept + sums[1], pull + sums[2], dot + sums[3]
    store_sums(partial_ptr, task, kept, pull, dot)
