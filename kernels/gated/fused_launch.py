"""Launches of the fused kernels: addresses, tile sizes, parts of sums; also as values to compile offline."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..device import on_its_device
from ..reference import CONCRETE, HARD_CONCRETE, GateSpec
from ..static import StaticCase
from .fused_kernels import _dlogits_kernel, _dx_kernel, _fwd_kernel


class Gated(NamedTuple):
    """A gated weight: what W * z is drawn from, and how it slides over the input."""

    weight: Tensor  # [n, k] or [n, k, r, s]
    logits: Tensor
    gain: Tensor | None
    seed: Tensor
    step: Tensor
    layer: int
    gate: GateSpec
    conv: tuple[int, ...] = (1, 1, 0, 0, 1, 1)  # stride, padding, dilation


class Tiles(NamedTuple):
    """How a launch is cut up; `split` parts of the summed dimension, none of which may be empty."""

    t: int
    n: int
    k: int
    split: int = 1
    warps: int = 4
    stages: int = 3
    slices: int = 2


class Call(NamedTuple):
    """A launch as a value, so that it can also be compiled where there is no device."""

    kernel: Any
    grid: tuple[int, int, int]
    args: dict[str, Any]
    tiles: Tiles

    def __call__(self) -> None:
        options = {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages}
        self.kernel[self.grid](**self.args, **options)


_PROGRAMS = 256  # about two on every multiprocessor of a large GPU


def _config(kind: str, t: int, n: int, k: int, taps: int, dtype: torch.dtype) -> Tiles:
    """Tiles of "fwd", "dx" (t input pixels) or "dlogits", from the shape and the compute dtype alone."""
    wide = dtype == torch.float32
    if kind == "dlogits":
        # Large tiles read the activations less often, where there are enough of them.
        large = not wide and triton.cdiv(n, 128) * triton.cdiv(k, 128) * taps >= _PROGRAMS // 2
        tiles = Tiles(64, 128, 128, warps=8, slices=4) if large else Tiles(64, 64, 64)
        if wide:
            tiles = tiles._replace(t=32)
        count = triton.cdiv(n, tiles.n) * triton.cdiv(k, tiles.k) * taps
        # Every part draws its gates again: split only what cannot fill the device.
        split = min(_PROGRAMS // count, triton.cdiv(t, 4 * tiles.t))
        return tiles._replace(split=max(1, split))
    many = not wide and t > 128
    block_t = 256 if many else min(max(16, triton.next_power_of_2(t)), 64 if wide else 128)
    # A Philox for each weight, without quads, takes the registers that a longer tile would need.
    depth = 32 if wide or many or taps > 1 else 64
    rows, total = (n, k * taps) if kind == "fwd" else (k, n * taps)
    count = triton.cdiv(t, block_t) * triton.cdiv(rows, 64)
    # Parts travel as float32 [t, rows]: never more of them than there are weights.
    split = max(1, min(_PROGRAMS // count, total // (2 * depth), total // t))
    block_n, block_k = (64, depth) if kind == "fwd" else (depth, 64)
    return Tiles(block_t, block_n, block_k, split, warps=8 if many or wide else 4)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, 0 for axes of one element, whose stride means nothing."""
    return tuple(0 if m == 1 else s for m, s in zip(tensor.shape, tensor.stride(), strict=True))


def _as_conv(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 4 else tensor[:, :, None, None]


def _rows(tensor: Tensor) -> Tensor:
    """[T, C] view of a dense channels-last [B, C, H, W] tensor."""
    return tensor if tensor.ndim == 2 else tensor.permute(0, 2, 3, 1).view(-1, tensor.shape[1])


def _problem(rows: Tensor, g: Gated) -> tuple[int, int, int, int]:
    """T, N, K, taps: what `_config` asks for."""
    n, k, r, s = _as_conv(g.weight).shape
    return len(rows), n, k, r * s


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


def _normal(g: Gated) -> Gated:
    """Weight and logits dense and strided alike; a copy only if they are not."""
    weight, logits = g.weight, g.logits
    layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=layout)):
        weight = weight.contiguous()
    if _strides(logits) != _strides(weight):
        logits = torch.empty_like(weight, dtype=logits.dtype).copy_(logits)
    return g._replace(weight=weight, logits=logits)


def _args(g: Gated, x: Tensor, oh: int, ow: int, tiles: Tiles, precision: str) -> dict[str, Any]:
    """What all three kernels take; x [B, K, H, W] gives the input's size and the compute dtype."""
    n, k, r, s = _as_conv(g.weight).shape
    w_n, w_k, w_r, w_s = _strides(_as_conv(g.weight))
    one_tap = r * s == 1 and tuple(g.conv[:4]) == (1, 1, 0, 0)
    return {
        "w_ptr": g.weight, "s_ptr": g.logits, "gain_ptr": g.gain,
        "seed_ptr": g.seed, "step_ptr": g.step, "layer": g.layer,
        "N": n, "K": k, "H": x.shape[2], "W": x.shape[3], "OH": oh, "OW": ow,
        "w_n": w_n, "w_k": w_k, "w_r": w_r, "w_s": w_s,
        "CONV": None if one_tap else tuple(g.conv), "TAPS": r * s, "S": s,
        "QUAD": w_k == 1 and all(m % 4 == 0 for m in (k, w_n, w_r, w_s)), "GATE": tuple(g.gate),
        # About 2 ulp of float32 are far below a half's rounding.
        "FAST": x.dtype != torch.float32, "PRECISION": precision, "SPLIT": tiles.split,
        "BLOCK_T": tiles.t, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
    }  # fmt: skip


def _x_args(x: Tensor, g: Gated, args: dict[str, Any]) -> dict[str, Any]:
    """`args` with x's address; one tap needs spatial arithmetic only if pixels are unevenly spaced."""
    x_b, x_k, x_h, x_w = _strides(x)
    if args["CONV"] is None:
        even = _pixel_stride(x)
        if even is None:
            args = args | {"CONV": tuple(g.conv)}
        else:
            x_b, x_h, x_w = 0, 0, even
    return args | {"x_ptr": x, "x_b": x_b, "x_h": x_h, "x_w": x_w, "x_k": x_k}


def _forward_call(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    g: Gated,
    oh: int,
    ow: int,
    tiles: Tiles,
    precision: str,
) -> Call:
    """y [split, T, N] or [T, N]."""
    x = _as_conv(x)
    args = _x_args(x, g, _args(g, x, oh, ow, tiles, precision))
    t, n = y.shape[-2:]
    grid = (triton.cdiv(t, tiles.t), triton.cdiv(n, tiles.n), tiles.split)
    return Call(_fwd_kernel, grid, args | {"y_ptr": y, "bias_ptr": bias, "T": t}, tiles)


def _dx_call(
    dx: Tensor, dy: Tensor, x: Tensor, g: Gated, oh: int, ow: int, tiles: Tiles, precision: str
) -> Call:
    """dx [split, T, K] or [T, K]; dy dense; of x only the shape and the dtype."""
    args = _args(g, _as_conv(x), oh, ow, tiles, precision)
    t, k = dx.shape[-2:]
    grid = (triton.cdiv(t, tiles.t), triton.cdiv(k, tiles.k), tiles.split)
    return Call(_dx_kernel, grid, args | {"dx_ptr": dx, "dy_ptr": dy, "T": t}, tiles)


def _dlogits_call(
    ds: Tensor, dw: Tensor | None, dgain: Tensor | None, dy: Tensor, x: Tensor, g: Gated,
    oh: int, ow: int, tiles: Tiles, precision: str,
) -> Call:  # fmt: skip
    """ds, dw strided as the weight, or [split, ...] of such."""
    x = _as_conv(x)
    args = _x_args(x, g, _args(g, x, oh, ow, tiles, precision))
    grid = _dlogits_grid(g, tiles)
    args |= {"ds_ptr": ds, "dw_ptr": dw, "dgain_ptr": dgain, "dy_ptr": dy}
    args |= {"T": x.shape[0] * oh * ow, "SLICES": tiles.slices}
    return Call(_dlogits_kernel, grid, args, tiles)


def _dlogits_grid(g: Gated, tiles: Tiles) -> tuple[int, int, int]:
    n, k, r, s = _as_conv(g.weight).shape
    return triton.cdiv(n, tiles.n), triton.cdiv(k, tiles.k) * r * s, tiles.split


def _parts(rows: Tensor, split: int) -> Tensor:
    """Where the parts of a sum go: the output itself, or a float32 buffer [split, T, channels]."""
    return rows if split == 1 else rows.new_empty(split, *rows.shape, dtype=torch.float32)


@on_its_device
def _launch_forward(
    y: Tensor, x: Tensor, bias: Tensor | None, g: Gated,
    *, tiles: Tiles | None = None, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Fills y, [T, n] or dense channels-last [B, n, oh, ow]."""
    g, rows, (oh, ow) = _normal(g), _rows(y), _as_conv(y).shape[2:]
    tiles = tiles or _config("fwd", *_problem(rows, g), x.dtype)
    parts = _parts(rows, tiles.split)
    _forward_call(parts, x, bias, g, oh, ow, tiles, precision)()
    if tiles.split > 1:
        rows.copy_(parts.sum(0))
    return y


@on_its_device
def _launch_dx(
    dx: Tensor, dy: Tensor, x: Tensor, g: Gated,
    *, tiles: Tiles | None = None, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Fills dx, [T, k] or dense channels-last [B, k, h, w]; dy dense likewise."""
    g, rows, (oh, ow) = _normal(g), _rows(dx), _as_conv(dy).shape[2:]
    tiles = tiles or _config("dx", *_problem(rows, g), x.dtype)
    parts = _parts(rows, tiles.split)
    _dx_call(parts, dy, x, g, oh, ow, tiles, precision)()
    if tiles.split > 1:
        rows.copy_(parts.sum(0))
    return dx


@on_its_device
def _launch_dlogits(
    ds: Tensor, dw: Tensor | None, dgain: Tensor | None, dy: Tensor, x: Tensor, g: Gated,
    *, tiles: Tiles | None = None, precision: str = "ieee",
) -> None:  # fmt: skip
    """Fills ds, and dw and dgain (one element) where given; dy dense, as `_launch_forward` makes y."""
    g, (oh, ow) = _normal(g), _as_conv(dy).shape[2:]
    tiles = tiles or _config("dlogits", *_problem(_rows(dy), g), x.dtype)

    def buffer(out: Tensor) -> Tensor:
        if tiles.split == 1 and _strides(out) == _strides(g.weight):
            return out
        shape, strides = (tiles.split, *out.shape), (out.numel(), *g.weight.stride())
        return torch.empty_strided(shape, strides, dtype=torch.float32, device=out.device)

    s_parts = buffer(ds)
    w_parts = None if dw is None else buffer(dw)
    sums = None
    if dgain is not None:
        programs = math.prod(_dlogits_grid(g, tiles))
        sums = torch.empty(programs, dtype=torch.float32, device=dgain.device)
    _dlogits_call(s_parts, w_parts, sums, dy, x, g, oh, ow, tiles, precision)()
    for out, parts in ((ds, s_parts), (dw, w_parts)):
        if out is not None and parts is not None and parts is not out:
            out.copy_(parts.sum(0))
    if dgain is not None and sums is not None:
        dgain.copy_(sums.sum())


# --- Compiling without a device ---------------------------------------------------------------------

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def _static(call: Call, config: str) -> StaticCase:
    """The launch as the compiler sees it on aligned tensors."""
    signature, constants, attributes = {}, {}, {}
    for position, param in enumerate(call.kernel.params):
        value = call.args[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = _TYPES[value.dtype]
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
        if param.name != "layer" and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    tiles = call.tiles
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    name = "fused_" + call.kernel.__name__.strip("_").removesuffix("_kernel")
    gates = tiles.n * tiles.k // (32 * tiles.warps)
    return StaticCase(name, config, call.kernel, signature, constants, attributes, options, gates)


def static_cases() -> list[StaticCase]:
    """Launches at their real tile sizes, for the compiler to judge without a device."""
    half, single, plain = torch.bfloat16, torch.float32, (1, 1, 0, 0, 1, 1)
    concrete, hard = GateSpec(CONCRETE, 1.0), GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1)
    image, filters, slide = (16, 256, 14, 14), (256, 256, 3, 3), (1, 1, 1, 1, 1, 1)
    shapes = {  # x, weight, conv, gate, compute dtype
        "linear t64 concrete bf16": ((64, 4096), (4096, 4096), plain, concrete, half),
        "linear t64 hard-concrete bf16": ((64, 4096), (4096, 4096), plain, hard, half),
        "linear t64 concrete fp32": ((64, 4096), (4096, 4096), plain, concrete, single),
        "linear t128 hard-concrete bf16": ((128, 1024), (1024, 1024), plain, hard, half),
        "linear t512 concrete bf16": ((512, 1024), (4096, 1024), plain, concrete, half),
        "linear t512 hard-concrete bf16": ((512, 1024), (4096, 1024), plain, hard, half),
        "conv 3x3 concrete bf16": (image, filters, slide, concrete, half),
        "conv 3x3 hard-concrete bf16": (image, filters, slide, hard, half),
    }
    found = []
    for config, (x_shape, w_shape, conv, gate, dtype) in shapes.items():
        layout = torch.channels_last if len(x_shape) == 4 else torch.contiguous_format
        meta = {"device": "meta", "memory_format": layout}
        x = torch.empty(x_shape, dtype=dtype, **meta)
        w = torch.empty(w_shape, dtype=dtype, **meta)
        s = torch.empty(w_shape, **meta)
        y = torch.empty((len(x), len(w), *x_shape[2:]), dtype=dtype, **meta)
        one = torch.empty(1, dtype=torch.int64, device="meta")
        g = Gated(w, s, s.sum(), one, one, 3, gate, conv)
        (oh, ow), problem = _as_conv(y).shape[2:], (*_problem(_rows(y), g), dtype)
        fwd, dx, ds = (_config(kind, *problem) for kind in ("fwd", "dx", "dlogits"))
        # Parts of sums are float32 in place of the output's type.
        y_out, dx_out = _parts(_rows(y), fwd.split), _parts(_rows(x), dx.split)
        calls = (
            _forward_call(y_out, x, w[:, 0].flatten(), g, oh, ow, fwd, "ieee"),
            _dx_call(dx_out, y, x, g, oh, ow, dx, "ieee"),
            _dlogits_call(s, w, s.sum(), y, x, g, oh, ow, ds, "ieee"),
        )
        found += [_static(call, config) for call in calls]
    return found
