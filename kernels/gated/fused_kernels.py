"""The kernels behind `fused`: products whose left operand is a weight tile gated in registers.

Letters: T tokens or pixels, N outputs, K inputs, R x S taps.  Activations are channels-last inside.
Constants: CONV is None (one tap, no spatial arithmetic) or (stride, padding, dilation) as six
integers; GATE is a `GateSpec`; QUAD says that four neighbours in k share a Philox counter; SPLIT parts
of a sum go to separate buffers, which the host adds up in a fixed order.

No part is empty, and the loops say so: with a way around a loop, on which the sum is zero, the
assembler waits for every single wgmma in it (ptxas C7515), whatever the compiler above it scheduled.
"""

import triton
import triton.language as tl

from ..conv_tiles import input_pixel, output_pixel, pixel_at
from ..gates.formulas import gate_slope, sample_gate, uniform_at
from ..philox import uniform_words


@triton.jit
def _noise(row, k0, w_k, seed, step, layer, BLOCK_K: tl.constexpr, QUAD: tl.constexpr):
    """u of BLOCK_K columns from k0 of rows that begin at `row` (int64 [BLOCK_N]) in the logits' memory."""
    if QUAD:  # columns side by side, in fours
        counter = ((row + k0) >> 2)[:, None] + tl.arange(0, BLOCK_K // 4)[None, :]
        a, b, c, d = uniform_words(counter, seed, step, layer)  # [BLOCK_N, BLOCK_K / 4] each
        # join puts the new axis last, and (a, c), (b, d) pairs flatten to a b c d
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [row.shape[0], BLOCK_K])
    k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
    return uniform_at(row[:, None] + (k * w_k)[None, :], seed, step, layer)


@triton.jit
def _gated_tile(
    w_ptr, s_ptr, n, k0, tap, N, K, w_n, w_k, w_r, w_s, seed, step, layer,
    BLOCK_K: tl.constexpr, TAPS: tl.constexpr, S: tl.constexpr, QUAD: tl.constexpr,
    GATE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(offsets, whether they exist, weights, logits, z) of rows n and BLOCK_K columns at a tap, float32."""
    k = k0 + tl.arange(0, BLOCK_K)
    row = n * w_n + (tap // S * w_r + tap % S * w_s)
    at = row[:, None] + (k.to(tl.int64) * w_k)[None, :]  # [BLOCK_N, BLOCK_K]
    exists = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + at, mask=exists, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + at, mask=exists, other=0.0)
    u = _noise(row, k0, w_k, seed, step, layer, BLOCK_K, QUAD)
    return at, exists, w, s, sample_gate(u, s, GATE[0], GATE[1], GATE[2], GATE[3], FAST)


@triton.jit(do_not_specialize=["layer"])
def _fwd_kernel(
    y_ptr,  # [SPLIT, T, N]
    x_ptr,  # [B, H, W, K] through strides; without CONV [T, K], T strided by x_w
    bias_ptr,  # [N] or None
    w_ptr,  # [N, K, R, S] through strides
    s_ptr,  # logits, float32, strided as w
    gain_ptr,  # float32 scalar or None
    seed_ptr, step_ptr, layer,
    T, N, K, H, W, OH, OW, x_b, x_h, x_w, x_k, w_n, w_k, w_r, w_s,
    CONV: tl.constexpr, TAPS: tl.constexpr, S: tl.constexpr, QUAD: tl.constexpr, GATE: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(seed_ptr), tl.load(step_ptr)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    if CONV is not None:
        b, oh, ow = pixel_at(t, OH, OW)
        image = b.to(tl.int64) * x_b
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    steps = tl.cdiv(K, BLOCK_K) * TAPS
    # Taps vary fastest: their pixels, and the weights of an [n, k, r, s] layout, share cache lines.
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    tl.assume(first < last)
    for i in range(first, last):
        block = i // TAPS
        tap, k0 = i - block * TAPS, block * BLOCK_K
        _, _, w, _, z = _gated_tile(
            w_ptr, s_ptr, n, k0, tap, N, K, w_n, w_k, w_r, w_s, seed, step, layer,
            BLOCK_K, TAPS, S, QUAD, GATE, FAST,
        )  # fmt: skip
        if CONV is not None:
            h, v, real = input_pixel(
                oh, ow, tap // S, tap % S, H, W,
                CONV[0], CONV[1], CONV[2], CONV[3], CONV[4], CONV[5],
            )  # fmt: skip
            pixel = image + h.to(tl.int64) * x_h + v.to(tl.int64) * x_w  # [BLOCK_T]
            real &= t < T
        else:
            pixel, real = t.to(tl.int64) * x_w, t < T
        k = k0 + tl.arange(0, BLOCK_K)
        x_at = pixel[None, :] + (k.to(tl.int64) * x_k)[:, None]  # [BLOCK_K, BLOCK_T]
        x = tl.load(x_ptr + x_at, mask=real[None, :] & (k < K)[:, None], other=0.0)
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
def _dx_kernel(
    dx_ptr,  # [SPLIT, T, K], T input pixels
    dy_ptr,  # [B, OH, OW, N], dense
    w_ptr, s_ptr, gain_ptr, seed_ptr, step_ptr, layer,
    T, N, K, H, W, OH, OW, w_n, w_k, w_r, w_s,
    CONV: tl.constexpr, TAPS: tl.constexpr, S: tl.constexpr, QUAD: tl.constexpr, GATE: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(seed_ptr), tl.load(step_ptr)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k0 = tl.program_id(1) * BLOCK_K
    part = tl.program_id(2)
    if CONV is not None:
        b, h, v = pixel_at(t, H, W)
    acc = tl.zeros([BLOCK_K, BLOCK_T], tl.float32)
    steps = tl.cdiv(N, BLOCK_N) * TAPS
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    tl.assume(first < last)
    for i in range(first, last):
        block = i // TAPS
        tap = i - block * TAPS
        n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        _, _, w, _, z = _gated_tile(
            w_ptr, s_ptr, n, k0, tap, N, K, w_n, w_k, w_r, w_s, seed, step, layer,
            BLOCK_K, TAPS, S, QUAD, GATE, FAST,
        )  # fmt: skip
        if CONV is not None:
            oh, ow, real = output_pixel(
                h, v, tap // S, tap % S, OH, OW,
                CONV[0], CONV[1], CONV[2], CONV[3], CONV[4], CONV[5],
            )  # fmt: skip
            pixel = (b * OH + oh) * OW + ow
            real &= t < T
        else:
            pixel, real = t, t < T
        dy_at = pixel.to(tl.int64)[None, :] * N + n[:, None]  # [BLOCK_N, BLOCK_T]
        dy = tl.load(dy_ptr + dy_at, mask=real[None, :] & (n < N)[:, None], other=0.0)
        acc = tl.dot(tl.trans((w * z).to(dy.dtype)), dy, acc, input_precision=PRECISION)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr)
    k = k0 + tl.arange(0, BLOCK_K)
    dx_at = (part.to(tl.int64) * T + t)[None, :] * K + k[:, None]  # [BLOCK_K, BLOCK_T]
    exists = (k < K)[:, None] & (t < T)[None, :]
    tl.store(dx_ptr + dx_at, acc.to(dx_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _halves(x):
    """Left and right columns of [M, N], without moving them between threads."""
    pairs = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit(do_not_specialize=["layer"])
def _dlogits_kernel(
    ds_ptr,  # [SPLIT, *logits]
    dw_ptr,  # [SPLIT, *weight], or None where weights do not train
    dgain_ptr,  # [programs], or None
    x_ptr, dy_ptr, w_ptr, s_ptr, gain_ptr, seed_ptr, step_ptr, layer,
    T, N, K, H, W, OH, OW, x_b, x_h, x_w, x_k, w_n, w_k, w_r, w_s,
    CONV: tl.constexpr, TAPS: tl.constexpr, S: tl.constexpr, QUAD: tl.constexpr, GATE: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    seed, step = tl.load(seed_ptr), tl.load(step_ptr)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, k0 = tl.program_id(1) % TAPS, tl.program_id(1) // TAPS * BLOCK_K
    part = tl.program_id(2)
    k = k0 + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    steps = tl.cdiv(T, BLOCK_T)
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    tl.assume(first < last)
    for i in range(first, last):
        t = i * BLOCK_T + tl.arange(0, BLOCK_T)
        real = t < T
        dy_at = t.to(tl.int64)[None, :] * N + n[:, None]  # [BLOCK_N, BLOCK_T]
        dy = tl.load(dy_ptr + dy_at, mask=(n < N)[:, None] & real[None, :], other=0.0)
        if CONV is not None:
            b, oh, ow = pixel_at(t, OH, OW)
            h, v, inside = input_pixel(
                oh, ow, tap // S, tap % S, H, W,
                CONV[0], CONV[1], CONV[2], CONV[3], CONV[4], CONV[5],
            )  # fmt: skip
            pixel = b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + v.to(tl.int64) * x_w
            real &= inside
        else:
            pixel = t.to(tl.int64) * x_w
        x_at = pixel[:, None] + (k.to(tl.int64) * x_k)[None, :]  # [BLOCK_T, BLOCK_K]
        x = tl.load(x_ptr + x_at, mask=real[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    gain = 1.0
    if gain_ptr is not None:
        gain = tl.load(gain_ptr)
    # Weights, logits and samples of a whole tile do not fit in registers beside it: by slices.
    left, right = _halves(acc)
    if SLICES == 4:
        a, b = _halves(left)
        c, d = _halves(right)
        slices = (a, b, c, d)
    else:
        slices = (left, right)
    out = part.to(tl.int64) * N * K * TAPS
    total = tl.zeros([], tl.float32)
    for i in tl.static_range(SLICES):  # pyright: ignore[reportGeneralTypeIssues]
        at, exists, w, s, z = _gated_tile(
            w_ptr, s_ptr, n, k0 + i * (BLOCK_K // SLICES), tap, N, K, w_n, w_k, w_r, w_s,
            seed, step, layer, BLOCK_K // SLICES, TAPS, S, QUAD, GATE, FAST,
        )  # fmt: skip
        dw = slices[i]
        slope = gate_slope(z, s, GATE[0], GATE[1], GATE[2], GATE[3], FAST)
        tl.store(ds_ptr + out + at, dw * w * slope * gain, mask=exists)
        if dw_ptr is not None:
            dweight = (dw * z * gain).to(dw_ptr.dtype.element_ty)
            tl.store(dw_ptr + out + at, dweight, mask=exists)
        if dgain_ptr is not None:
            total += tl.sum(dw * w * z)
    if dgain_ptr is not None:
        program = (part * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0)
        tl.store(dgain_ptr + program + tl.program_id(0), total)
