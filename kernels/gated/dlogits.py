"""The kernel behind `epilogue`: dlogits at the end of the product dW = dY^T X, of a linear layer or a convolution.

Letters: T tokens or pixels, N outputs, K inputs, R x S taps.  Activations are channels-last inside.
CONV is None (one tap, no spatial arithmetic) or (stride, padding, dilation) as six integers; SPLIT parts
of the sum over T go to separate buffers, which the host adds up in a fixed order.

No part is empty, and the loop says so: with a way around it, on which the sum is zero, the assembler
waits for every single wgmma in it (ptxas C7515), whatever the compiler above it scheduled.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..conv_tiles import input_pixel, pixel_at
from ..device import on_its_device
from ..dsl import tl, triton
from ..gates.formulas import gate_slope
from ..reference import CONCRETE, HARD_CONCRETE, GateSpec
from ..static import StaticCase
from .tile import Call, Gated, Tiles, gated_tile, static_call, strides


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
    x_ptr,  # [B, H, W, K] through strides; without CONV [T, K], T strided by x_w
    dy_ptr,  # [T, N]
    w_ptr,  # [N, K, R, S] through strides
    s_ptr,  # logits, float32, strided as w
    gain_ptr,  # float32 scalar or None
    seed_ptr, step_ptr, layer,
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
    row = n * w_n + (tap // S * w_r + tap % S * w_s)
    out = part.to(tl.int64) * N * K * TAPS
    total = tl.zeros([], tl.float32)
    for i in tl.static_range(SLICES):  # pyright: ignore[reportGeneralTypeIssues]
        at, exists, w, s, z = gated_tile(
            w_ptr, s_ptr, row, n < N, k0 + i * (BLOCK_K // SLICES), K, w_k, seed, step, layer,
            BLOCK_K // SLICES, QUAD, GATE, FAST,
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


# --- Launch -----------------------------------------------------------------------------------------

_PROGRAMS = 256  # about two on every multiprocessor of a large GPU


def _config(t: int, n: int, k: int, taps: int, dtype: torch.dtype) -> Tiles:
    wide = dtype == torch.float32
    # Large tiles read the activations less often, where there are enough of them.
    large = not wide and triton.cdiv(n, 128) * triton.cdiv(k, 128) * taps >= _PROGRAMS // 2
    tiles = Tiles(64, 128, 128, warps=8, slices=4) if large else Tiles(64, 64, 64)
    if wide:
        tiles = tiles._replace(t=32)
    count = triton.cdiv(n, tiles.n) * triton.cdiv(k, tiles.k) * taps
    # Every part draws its gates again: split only what cannot fill the device.
    split = min(_PROGRAMS // count, triton.cdiv(t, 4 * tiles.t))
    return tiles._replace(split=max(1, split))


def _as_conv(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 4 else tensor[:, :, None, None]


def _pixel_stride(x: Tensor) -> int | None:
    """Elements between neighbouring pixels of [B, K, H, W], or None if they are unevenly spaced."""
    step, span = None, 1
    for axis in (3, 2, 0):
        if x.shape[axis] > 1:
            if step is None:
                step = x.stride(axis)
            elif x.stride(axis) != step * span:
                return None
            span *= x.shape[axis]
    return x.shape[1] if step is None else step


def _call(
    ds: Tensor, dw: Tensor | None, dgain: Tensor | None, dy: Tensor, x: Tensor, g: Gated,
    conv: Sequence[int], tiles: Tiles, precision: str,
) -> Call:  # fmt: skip
    """ds, dw strided as the weight, or [split, ...] of such; dy [T, n] or channels-last [B, n, oh, ow]."""
    x, dy, weight = _as_conv(x), _as_conv(dy), _as_conv(g.weight)
    n, k, r, s = weight.shape
    w_n, w_k, w_r, w_s = strides(weight)
    x_b, x_k, x_h, x_w = strides(x)
    # One tap needs spatial arithmetic only if pixels are unevenly spaced.
    even = _pixel_stride(x) if r * s == 1 and tuple(conv[:4]) == (1, 1, 0, 0) else None
    if even is not None:
        x_b, x_h, x_w = 0, 0, even
    args = g.args(x.dtype) | {
        "ds_ptr": ds, "dw_ptr": dw, "dgain_ptr": dgain, "x_ptr": x, "dy_ptr": dy,
        "T": dy.numel() // n, "H": x.shape[2], "W": x.shape[3], "OH": dy.shape[2], "OW": dy.shape[3],
        "x_b": x_b, "x_h": x_h, "x_w": x_w, "x_k": x_k,
        "w_n": w_n, "w_k": w_k, "w_r": w_r, "w_s": w_s,
        "CONV": tuple(conv) if even is None else None, "TAPS": r * s, "S": s,
        "QUAD": w_k == 1 and all(m % 4 == 0 for m in (k, w_n, w_r, w_s)),
        "PRECISION": precision, "SPLIT": tiles.split, "SLICES": tiles.slices,
        "BLOCK_T": tiles.t, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
    }  # fmt: skip
    return Call(_dlogits_kernel, _grid(g, tiles), args, tiles)


def _grid(g: Gated, tiles: Tiles) -> tuple[int, int, int]:
    n, k, r, s = _as_conv(g.weight).shape
    return triton.cdiv(n, tiles.n), triton.cdiv(k, tiles.k) * r * s, tiles.split


@on_its_device
def launch_dlogits(
    ds: Tensor, dw: Tensor | None, dgain: Tensor | None, dy: Tensor, x: Tensor, g: Gated,
    *, conv: Sequence[int], tiles: Tiles | None = None, precision: str = "ieee",
) -> None:  # fmt: skip
    """Fills ds, and dw and dgain (one element) where given.

    dy is [T, n] or channels-last [B, n, oh, ow], dense; `conv` is stride, padding and dilation.
    """
    g = g.normal
    n, k, r, s = _as_conv(g.weight).shape
    tiles = tiles or _config(dy.numel() // n, n, k, r * s, x.dtype)

    def buffer(out: Tensor) -> Tensor:
        if tiles.split == 1 and strides(out) == strides(g.weight):
            return out
        shape, places = (tiles.split, *out.shape), (out.numel(), *g.weight.stride())
        return torch.empty_strided(shape, places, dtype=torch.float32, device=out.device)

    s_parts = buffer(ds)
    w_parts = None if dw is None else buffer(dw)
    sums = None
    if dgain is not None:
        sums = torch.empty(math.prod(_grid(g, tiles)), dtype=torch.float32, device=dgain.device)
    _call(s_parts, w_parts, sums, dy, x, g, conv, tiles, precision)()
    for out, parts in ((ds, s_parts), (dw, w_parts)):
        if out is not None and parts is not None and parts is not out:
            out.copy_(parts.sum(0))
    if dgain is not None and sums is not None:
        dgain.copy_(sums.sum())


# --- Compiling without a device ---------------------------------------------------------------------


def static_cases() -> list[StaticCase]:
    """Launches at their real tile sizes, for the compiler to judge without a device."""
    half, single = torch.bfloat16, torch.float32
    gates = {
        "concrete": GateSpec(CONCRETE, 1.0),
        "hard-concrete": GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1),
    }
    shapes = {  # x, weight, compute dtype
        "linear t512": ((512, 1024), (4096, 1024), half),
        "linear t512 narrow": ((512, 1024), (512, 1024), half),
        "linear t512 fp32": ((512, 1024), (4096, 1024), single),
        "conv 3x3": ((16, 256, 14, 14), (256, 256, 3, 3), half),
    }
    found = []
    for what, (x_shape, w_shape, dtype) in shapes.items():
        for name, gate in gates.items():
            layout = torch.channels_last if len(x_shape) == 4 else torch.contiguous_format
            meta = {"device": "meta", "memory_format": layout}
            x = torch.empty(x_shape, dtype=dtype, **meta)
            w, s = torch.empty(w_shape, **meta), torch.empty(w_shape, **meta)
            dy = torch.empty((len(x), len(w), *x_shape[2:]), dtype=dtype, **meta)
            one = torch.empty(1, dtype=torch.int64, device="meta")
            g = Gated(w, s, s.sum(), one, one, 3, gate)
            n, k, r, s_taps = _as_conv(w).shape
            tiles = _config(dy.numel() // n, n, k, r * s_taps, dtype)
            conv = (1, 1, r // 2, s_taps // 2, 1, 1)
            call = _call(s, w, s.sum(), dy, x, g, conv, tiles, "ieee")
            found.append(static_call(call, "epilogue", f"{what} {name}"))
    return found
