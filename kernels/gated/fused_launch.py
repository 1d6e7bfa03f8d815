"""Launches of the fused kernels: tile sizes, parts of sums, buffers; also as values to compile offline."""

from typing import Any

import torch
from torch import Tensor

from ..device import PROGRAMS, on_its_device
from ..dsl import triton
from ..reference import CONCRETE, HARD_CONCRETE, GateSpec
from ..static import StaticCase
from .fused_kernels import _bwd_kernel, _fwd_kernel
from .tile import Call, Gated, Tiles, static_call

TOKENS = 128  # at most: a tile of more would leave no registers for the gates


def _config(kind: str, t: int, n: int, k: int, dtype: torch.dtype) -> Tiles:
    """Tiles of "fwd" (programs by outputs, sums over inputs) or "bwd" (the reverse).

    Chosen by what the compiler makes of them: no spills, and two programs fit a multiprocessor.
    """
    wide = dtype == torch.float32
    block_t = max(16, triton.next_power_of_2(t))
    if kind == "fwd":
        depth = 32 if wide or t > 64 else 64
        tiles = Tiles(block_t, 64, depth, warps=8 if wide else 4, stages=2 if wide else 3)
        rows, total, own, step = n, k, tiles.n, tiles.k
    else:
        # Without quads (k % 4) a Philox for each weight takes the registers of a larger tile.
        depth = 16 if wide or t > 64 or k % 4 else 32
        tiles = Tiles(block_t, depth, 32 if wide else 64)
        rows, total, own, step = k, n, tiles.k, tiles.n
    # Parts travel as float32 [t, rows]: never more than half as many of them as there are weights.
    split = max(1, min(PROGRAMS // triton.cdiv(rows, own), total // (2 * t)))
    steps = triton.cdiv(total, step)  # as many for every program, or one less
    return tiles._replace(split=triton.cdiv(steps, triton.cdiv(steps, split)))


def _args(g: Gated, x: Tensor, tiles: Tiles, precision: str) -> dict[str, Any]:
    t, k = x.shape
    return g.args(x.dtype) | {
        "x_ptr": x, "T": t, "x_t": x.stride(0), "x_k": x.stride(1), "QUAD": k % 4 == 0,
        "PRECISION": precision, "SPLIT": tiles.split,
        "BLOCK_T": tiles.t, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k,
    }  # fmt: skip


def _forward_call(
    y: Tensor, x: Tensor, bias: Tensor | None, g: Gated, tiles: Tiles, precision: str
) -> Call:
    """y [split, T, N] or [T, N]."""
    args = _args(g, x, tiles, precision) | {"y_ptr": y, "bias_ptr": bias}
    return Call(_fwd_kernel, (triton.cdiv(len(g.weight), tiles.n), tiles.split, 1), args, tiles)


def _backward_call(
    dx: Tensor | None, ds: Tensor | None, dw: Tensor | None, dgain: Tensor | None,
    dy: Tensor, x: Tensor, g: Gated, tiles: Tiles, precision: str,
) -> Call:  # fmt: skip
    """dx [split, T, K] or [T, K], dgain [programs]."""
    args = _args(g, x, tiles, precision) | {"dx_ptr": dx, "ds_ptr": ds, "dw_ptr": dw}
    args |= {"dgain_ptr": dgain, "dy_ptr": dy}
    return Call(_bwd_kernel, _backward_grid(x, tiles), args, tiles)


def _backward_grid(x: Tensor, tiles: Tiles) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[1], tiles.k), tiles.split, 1


def _parts(rows: Tensor, split: int) -> Tensor:
    """Where the parts of a sum go: the output itself, or a float32 buffer [split, T, channels]."""
    return rows if split == 1 else rows.new_empty(split, *rows.shape, dtype=torch.float32)


@on_its_device
def launch_forward(
    y: Tensor, x: Tensor, bias: Tensor | None, g: Gated,
    *, tiles: Tiles | None = None, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Fills y, [T, n] dense."""
    tiles = tiles or _config("fwd", len(x), *g.weight.shape, x.dtype)
    parts = _parts(y, tiles.split)
    _forward_call(parts, x, bias, g.normal, tiles, precision)()
    if tiles.split > 1:
        y.copy_(parts.sum(0))
    return y


@on_its_device
def launch_backward(
    dx: Tensor | None, ds: Tensor | None, dw: Tensor | None, dgain: Tensor | None,
    dy: Tensor, x: Tensor, g: Gated, *, tiles: Tiles | None = None, precision: str = "ieee",
) -> None:  # fmt: skip
    """Fills what is given of dx [T, k] (dense), ds, dw (with ds alone) and dgain (one element); dy dense."""
    tiles = tiles or _config("bwd", len(x), *g.weight.shape, x.dtype)
    g = g.normal
    # What is strided unlike the weight is copied: autograd gives each gradient its tensor's strides.
    s_out, w_out = (
        out if out is None or out.is_contiguous() else torch.empty_like(g.weight, dtype=out.dtype)
        for out in (ds, dw)
    )
    parts = None if dx is None else _parts(dx, tiles.split)
    sums = None
    if dgain is not None:
        blocks, split, _ = _backward_grid(x, tiles)
        sums = torch.empty(blocks * split, dtype=torch.float32, device=dgain.device)
    _backward_call(parts, s_out, w_out, sums, dy, x, g, tiles, precision)()
    if dx is not None and parts is not None and parts is not dx:
        dx.copy_(parts.sum(0))
    for out, made in ((ds, s_out), (dw, w_out)):
        if out is not None and made is not None and made is not out:
            out.copy_(made)
    if dgain is not None and sums is not None:
        dgain.copy_(sums.sum())


# --- Compiling without a device ---------------------------------------------------------------------


def static_cases() -> list[StaticCase]:
    """Launches at their real tile sizes, for the compiler to judge without a device."""
    half, single = torch.bfloat16, torch.float32
    concrete, hard = GateSpec(CONCRETE, 1.0), GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1)
    problems = [  # tokens, dtypes of x and weights, gate, whether weights and the gain train
        *((t, half, weights, concrete, False) for t in (16, 64, 128) for weights in (single, half)),
        *((t, half, single, hard, True) for t in (64, 128)),
        *((t, single, single, hard, True) for t in (64, 128)),
    ]
    names, meta, found = {half: "bf16", single: "fp32"}, {"device": "meta"}, []
    for t, dtype, weights, gate, trains in problems:
        config = f"t{t} {'concrete' if gate is concrete else 'hard-concrete'} {names[dtype]}"
        config += f", {names[weights]} weights" + ", trained" * trains
        x = torch.empty(t, 4096, dtype=dtype, **meta)
        w = torch.empty(4096, 4096, dtype=weights, **meta)
        s = torch.empty(4096, 4096, **meta)
        one, gain = torch.empty(1, dtype=torch.int64, **meta), s.sum() if trains else None
        g = Gated(w, s, gain, one, one, 3, gate)
        fwd, bwd = (_config(kind, t, 4096, 4096, dtype) for kind in ("fwd", "bwd"))
        # Parts of sums are float32 in place of the output's type.
        y, dx = _parts(x, fwd.split), _parts(x, bwd.split)
        forward = _forward_call(y, x, w[0] if trains else None, g, fwd, "ieee")
        backward = _backward_call(dx, s, w if trains else None, gain, x, x, g, bwd, "ieee")
        found.append(static_call(forward, "fused", config))
        # dlogits take the product that was just begun: it is waited for, and other programs go on meanwhile.
        found.append(static_call(backward, "fused", config, waive=["serialised_waits"]))
    return found
