"""Gates of blocks and channels, drawn on the device, and the lists of the open ones.

A list is what a product loops over, so its length is the work.  Everything has a static shape and
stays on the device (no synchronisation), so it can be captured in a CUDA graph.

Blocks: the gates of a weight [n, k, *taps] are z [NB, KB, taps]; entry e = kb * taps + tap of row nb
stands in `order[nb, : count[nb]]` if z[nb, e] != 0, ascending.  The transposed lists hold
nb * taps + tap for each kb.  Channels (`Unit(h, 0)`): `order` is a permutation of the n output rows,
the open ones first and ascending, and `count` has one element.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dsl import tl, triton
from ..gates.formulas import gate_slope, sample_gate, uniform_at
from ..reference import GateSpec
from ..units import Unit

SIDES = (16, 32, 64, 128)  # what a tensor core multiplies without waste; a tile is at most 128 wide


class Lists(NamedTuple):
    """z: float32, one per unit.  order, count: int32, as the module describes."""

    z: Tensor
    order: Tensor
    count: Tensor


def check_unit(unit: Unit) -> None:
    """Errors: ValueError for a unit that skipping does not pay for."""
    if unit.keep or (unit.w and (unit.h not in SIDES or unit.w not in SIDES)) or unit.h < 1:
        raise ValueError(
            f"expected blocks with sides among {SIDES} or whole output rows Unit(h, 0), got {unit}; "
            "smaller units gain nothing from skipping: apply their gates to the weight instead"
        )


# --- Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _units_kernel(
    z_ptr,
    order_ptr,
    count_ptr,
    logits_ptr,
    seed_ptr,
    step_ptr,
    layer,
    entries,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program nb draws row nb of z [NB, entries] and lists its open units."""
    seed = tl.load(seed_ptr)
    step = tl.load(step_ptr)
    start = tl.program_id(0).to(tl.int64) * entries
    count = tl.program_id(0) * 0
    for first in range(0, entries, BLOCK):
        e = first + tl.arange(0, BLOCK)  # [BLOCK]
        inside = e < entries
        s = tl.load(logits_ptr + start + e, mask=inside, other=0.0).to(tl.float32)
        z = sample_gate(uniform_at(start + e, seed, step, layer), s, KIND, A, B, C, FAST)
        tl.store(z_ptr + start + e, z, mask=inside)
        # Not equal, rather than above: a NaN must reach the output.
        is_open = inside & (z != 0.0)
        flag = is_open.to(tl.int32)
        slot = count + tl.cumsum(flag, 0) - flag
        tl.store(order_ptr + start + slot, e, mask=is_open)
        count += tl.sum(flag, 0)
    tl.store(count_ptr + tl.program_id(0), count)


@triton.jit
def _columns_kernel(
    order_ptr, count_ptr, z_ptr, rows, columns, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program kb lists nb * TAPS + tap of the open units in column kb of z [rows, columns, TAPS]."""
    kb = tl.program_id(0)
    entries = rows * TAPS
    start = kb.to(tl.int64) * entries
    count = kb * 0
    for first in range(0, entries, BLOCK):
        e = first + tl.arange(0, BLOCK)  # [BLOCK]
        inside = e < entries
        unit = ((e // TAPS).to(tl.int64) * columns + kb) * TAPS + e % TAPS
        is_open = inside & (tl.load(z_ptr + unit, mask=inside, other=0.0) != 0.0)
        flag = is_open.to(tl.int32)
        slot = count + tl.cumsum(flag, 0) - flag
        tl.store(order_ptr + start + slot, e, mask=is_open)
        count += tl.sum(flag, 0)
    tl.store(count_ptr + kb, count)


@triton.jit
def _channels_kernel(
    z_ptr,
    order_ptr,
    count_ptr,
    logits_ptr,
    seed_ptr,
    step_ptr,
    layer,
    N,
    UNIT_N: tl.constexpr,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program draws z [cdiv(N, UNIT_N)] and orders the N rows, open ones first."""
    seed = tl.load(seed_ptr)
    step = tl.load(step_ptr)
    count = tl.program_id(0)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)  # [BLOCK]
        inside = n < N
        unit = n // UNIT_N
        s = tl.load(logits_ptr + unit, mask=inside, other=0.0).to(tl.float32)
        z = sample_gate(uniform_at(unit.to(tl.int64), seed, step, layer), s, KIND, A, B, C, FAST)
        tl.store(z_ptr + unit, z, mask=inside & (n % UNIT_N == 0))
        is_open = inside & (z != 0.0)
        flag = is_open.to(tl.int32)
        before = count + tl.cumsum(flag, 0) - flag
        # Closed rows fill the end, backwards: how many are open is not known yet.
        slot = tl.where(is_open, before, N - 1 - (n - before))
        tl.store(order_ptr + slot, n, mask=inside)
        count += tl.sum(flag, 0)
    tl.store(count_ptr, count)


@triton.jit
def _dlogits_kernel(
    dlogits_ptr,
    dz_ptr,
    partial_ptr,
    z_ptr,
    logits_ptr,
    gain_ptr,
    units,
    parts,
    width,
    UNIT_N: tl.constexpr,
    SKIP: tl.constexpr,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz [units] = sums of partial [parts, width] over parts and over UNIT_N columns a unit, in order.

    dlogits = gain * dz * slope.  With SKIP nothing is read for closed units: their entries are unset.
    """
    u = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = u < units
    z = tl.load(z_ptr + u, mask=inside, other=0.0)
    s = tl.load(logits_ptr + u, mask=inside, other=0.0).to(tl.float32)
    dz = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        for row in range(UNIT_N):
            column = u * UNIT_N + row
            read = inside & (column < width)
            if SKIP:
                read = read & (z != 0.0)
            offset = tl.cast(part, tl.int64) * width + column
            dz += tl.load(partial_ptr + offset, mask=read, other=0.0)
    tl.store(dz_ptr + u, dz, mask=inside)
    slope = gate_slope(z, s, KIND, A, B, C, FAST)
    if gain_ptr is not None:
        slope *= tl.load(gain_ptr).to(tl.float32)
    tl.store(dlogits_ptr + u, (dz * slope).to(dlogits_ptr.dtype.element_ty), mask=inside)


# --- Launchers --------------------------------------------------------------------------------------


def _int32(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=like.device)


def draw(
    logits: Tensor, seed: Tensor, step: Tensor, layer: int, gate: GateSpec, unit: Unit, n: int
) -> Lists:
    """Samples z and lists the open units of each row of blocks, or orders the n rows by channel gates."""
    spec = {"KIND": gate.kind, "A": gate.a, "B": gate.b, "C": gate.c, "FAST": False}
    logits = logits.contiguous()
    z = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if unit.w == 0:
        lists = Lists(z, _int32(n, like=z), _int32(1, like=z))
        _channels_kernel[(1,)](
            *lists, logits, seed, step, layer, n, UNIT_N=unit.h, **spec, BLOCK=1024, num_warps=8
        )
        return lists
    rows, entries = logits.shape[0], logits[0].numel()
    lists = Lists(z, _int32(rows, entries, like=z), _int32(rows, like=z))
    block = min(1024, max(128, triton.next_power_of_2(entries)))
    _units_kernel[(rows,)](
        *lists, logits, seed, step, layer, entries, **spec, BLOCK=block, num_warps=4
    )
    return lists


def transposed(lists: Lists) -> Lists:
    """The lists of each column of blocks."""
    rows, columns, taps = lists.z.flatten(2).shape if lists.z.ndim > 2 else (*lists.z.shape, 1)
    order, count = _int32(columns, rows * taps, like=lists.z), _int32(columns, like=lists.z)
    block = min(1024, max(128, triton.next_power_of_2(rows * taps)))
    _columns_kernel[(columns,)](
        order, count, lists.z, rows, columns, TAPS=taps, BLOCK=block, num_warps=4
    )
    return Lists(lists.z, order, count)


def logit_gradients(
    partial: Tensor,
    z: Tensor,
    logits: Tensor,
    gain: Tensor | None,
    gate: GateSpec,
    unit_n: int,
    skip: bool,
) -> tuple[Tensor, Tensor]:
    """(dlogits, dz without the gain) from partial sums [parts, width]; the second phase of the gates' gradient."""
    logits = logits.contiguous()
    dlogits, dz = torch.empty_like(logits), torch.empty_like(z)
    _dlogits_kernel[(triton.cdiv(z.numel(), 256),)](
        dlogits,
        dz,
        partial,
        z,
        logits,
        gain,
        z.numel(),
        *partial.shape,
        UNIT_N=unit_n,
        SKIP=skip,
        KIND=gate.kind,
        A=gate.a,
        B=gate.b,
        C=gate.c,
        FAST=False,
        BLOCK=256,
        num_warps=4,
    )
    return dlogits, dz
