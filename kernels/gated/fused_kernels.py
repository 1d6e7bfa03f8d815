"""The kernels behind `fused`: one pass over the weights forward, one backward, their gates drawn in registers.

All T tokens fit in one tile, so that each weight is read and its gate drawn once.  SPLIT parts of a sum
go to separate buffers, which the host adds up in a fixed order.

No part is empty, and the loops say so: with a way around a loop, on which the sum is zero, the
assembler waits for every single wgmma in it (ptxas C7515), whatever the compiler above it scheduled.
"""

from ..dsl import tl, triton
from ..gates.formulas import gate_slope
from .tile import gated_tile


@triton.jit(do_not_specialize=["layer"])
def _fwd_kernel(
    y_ptr,  # [SPLIT, T, N]
    x_ptr,  # [T, K] through strides
    bias_ptr,  # [N] or None
    w_ptr,  # [N, K]
    s_ptr,  # logits, float32 [N, K]
    gain_ptr,  # float32 scalar or None
    seed_ptr, step_ptr, layer, T, N, K, x_t, x_k,
    QUAD: tl.constexpr, GATE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(seed_ptr), tl.load(step_ptr)
    t = tl.arange(0, BLOCK_T)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    tl.assume(first < last)
    for i in range(first, last):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        _, _, w, _, z = gated_tile(
            w_ptr, s_ptr, n * K, n < N, i * BLOCK_K, K, 1, seed, step, layer,
            BLOCK_K, QUAD, GATE, FAST,
        )  # fmt: skip
        x_at = (t.to(tl.int64) * x_t)[None, :] + (k.to(tl.int64) * x_k)[:, None]
        x = tl.load(x_ptr + x_at, mask=(t < T)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot((w * z).to(x.dtype), x, acc, input_precision=PRECISION)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=(n < N) & (part == 0), other=0.0).to(tl.float32)
        acc += bias[:, None]
    y_at = (part.to(tl.int64) * T + t)[None, :] * N + n[:, None]  # [BLOCK_N, BLOCK_T]
    exists = (n < N)[:, None] & (t < T)[None, :]
    tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["layer"])
def _bwd_kernel(
    dx_ptr,  # [SPLIT, T, K], or None where x has no gradient
    ds_ptr,  # [N, K], or None where x alone has one
    dw_ptr,  # [N, K], or None where weights do not train
    dgain_ptr,  # [programs], or None
    x_ptr,  # [T, K] through strides
    dy_ptr,  # [T, N]
    w_ptr, s_ptr, gain_ptr, seed_ptr, step_ptr, layer, T, N, K, x_t, x_k,
    QUAD: tl.constexpr, GATE: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of inputs and a part of the outputs: all gradients from one read of w and s and one draw of z."""
    seed, step = tl.load(seed_ptr), tl.load(step_ptr)
    gain = 1.0
    if gain_ptr is not None:
        gain = tl.load(gain_ptr)
    t = tl.arange(0, BLOCK_T)
    k0, part = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    k = k0 + tl.arange(0, BLOCK_K)
    x_at = (k.to(tl.int64) * x_k)[:, None] + (t.to(tl.int64) * x_t)[None, :]
    x = tl.load(x_ptr + x_at, mask=(k < K)[:, None] & (t < T)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_K, BLOCK_T], tl.float32)  # of dx
    total = tl.zeros([], tl.float32)
    steps = tl.cdiv(N, BLOCK_N)
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    tl.assume(first < last)
    for i in range(first, last):
        n = (i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        at, exists, w, s, z = gated_tile(
            w_ptr, s_ptr, n * K, n < N, k0, K, 1, seed, step, layer, BLOCK_K, QUAD, GATE, FAST
        )
        dy_at = (t.to(tl.int64) * N)[None, :] + n[:, None]
        dy = tl.load(dy_ptr + dy_at, mask=(n < N)[:, None] & (t < T)[None, :], other=0.0)
        if ds_ptr is not None:
            dw = tl.trans(tl.dot(x, tl.trans(dy), input_precision=PRECISION))  # [BLOCK_N, BLOCK_K]
            slope = gate_slope(z, s, GATE[0], GATE[1], GATE[2], GATE[3], FAST)
            tl.store(ds_ptr + at, dw * (w * slope * gain), mask=exists)
            if dw_ptr is not None:
                tl.store(dw_ptr + at, (dw * z * gain).to(dw_ptr.dtype.element_ty), mask=exists)
            if dgain_ptr is not None:
                total += tl.sum(dw * w * z)
        if dx_ptr is not None:
            acc = tl.dot(tl.trans((w * z).to(dy.dtype)), dy, acc, input_precision=PRECISION)
    if dgain_ptr is not None:
        tl.store(dgain_ptr + part * tl.num_programs(0) + tl.program_id(0), total)
    if dx_ptr is not None:
        dx_at = (part.to(tl.int64) * T + t)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_T]
        real = (k < K)[:, None] & (t < T)[None, :]
        tl.store(dx_ptr + dx_at, (acc * gain).to(dx_ptr.dtype.element_ty), mask=real)
