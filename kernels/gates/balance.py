"""The balanced step (K2b): lambda, its moving average and Adam over all logits and gains, in one launch.

With g = dR/ds, p = size d density/ds, target T, percent c = 100 / T:

    excess  = c sum(size density) - 100,      ratio = ||g|| / (c ||p||) where excess > 0, else 0
    lambda <- keep lambda + follow ratio                       (the first step: lambda = ratio if follow > 0)
    s      <- Adam(s, g + lambda c p),        log_gain <- Adam(log_gain, <dR/dw_eff, w_eff>)
    lambda <- lambda + (ascend + share lr) excess              (lr: the logits' rate by now)

GradBalance (arXiv 2512.07142, algorithm 1) is (keep, follow) = (0.99, 0.01), gradient ascent on lambda (1, 0)
with a rate of its own (ascend) or one that falls with the logits' (share), a fixed penalty (1, 0) alone.
With a band the ratio is averaged on both sides of the target, and what pulls is that average times
excess / band, from 0 at the target to 1 at the band's end.
Every program adds up its group's partial sums itself, in the same order, so that nothing waits for
anything; one program a group stores the new average.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dsl import tl, triton
from ..launching import Launch, remembered
from ..reference import CONCRETE, GateSpec
from ..static import StaticCase, static_case
from ..units import Unit
from .formulas import gate_density, load_block, store_block
from .segment_math import (
    COLUMN_UNITS,
    FIRST_CHUNK,
    FIRST_MOMENT,
    FLAT,
    GROUP,
    HEIGHT,
    INPUTS,
    LAST_CHUNK,
    LOGITS,
    ROWS,
    SECOND_MOMENT,
    TAPS,
    UNITS,
    WIDTH,
    chunk_of,
)
from .segments import FLAT_BLOCK, Programs, Segments

_BETA1, _BETA2, _ADAM_EPS = (tl.constexpr(v) for v in (0.9, 0.999, 1e-8))
_LOG_BETA1 = tl.constexpr(-0.10536051565782628)
_LOG_BETA2 = tl.constexpr(-0.0010005003335835335)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class Rule(NamedTuple):
    """average <- keep average + follow ratio; lambda is it, or the part of it that `band` lets pull.

    What the next step starts from is average + (ascend + share lr) excess, lr being the logits' rate.
    `band`: percent above the target; 0: none, lambda is the average.
    """

    keep: float
    follow: float
    ascend: float
    band: float = 0.0
    share: float = 0.0


@triton.jit
def _sum(partial_ptr, first, last, NAME: tl.constexpr):
    """A column's partial sums over the programs first ... last - 1, in a fixed order."""
    total = tl.zeros([1024], dtype=tl.float32)
    for start in range(first, last, 1024):
        row = start + tl.arange(0, 1024)
        total += tl.load(partial_ptr + 4 * row + NAME, mask=row < last, other=0.0)
    return tl.sum(total)


@triton.jit
def _corrections(lr, t):
    """lr / (1 - beta1^t) and sqrt(1 - beta2^t), in float64: 1 - 0.999^t has three digits less than its terms."""
    t = t.to(tl.float64)
    root = tl.sqrt(1.0 - tl.exp(t * _LOG_BETA2)).to(tl.float32)
    return lr / (1.0 - tl.exp(t * _LOG_BETA1)).to(tl.float32), root


@triton.jit
def _adam(value, grad, m, v, rate, root):
    """torch.optim.Adam's update with its default betas; (value, m, v)."""
    m = _BETA1 * m + (1.0 - _BETA1) * grad
    v = _BETA2 * v + (1.0 - _BETA2) * grad * grad
    return value - rate * m / (tl.sqrt(v) / root + _ADAM_EPS), m, v


@triton.jit
def _adam_block(
    s_ptr, g_ptr, m_ptr, v_ptr, row, first, units, pull_weight, rate, root,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
    FAST: tl.constexpr, SIZED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    index = first + tl.arange(0, FLAT).to(tl.int64)  # [FLAT]
    s = load_block(s_ptr, index, units, MASKED)
    g = load_block(g_ptr, index, units, MASKED)
    m = load_block(m_ptr, index, units, MASKED)
    v = load_block(v_ptr, index, units, MASKED)
    _, slope = gate_density(s, KIND, A, B, C, SHIFT, FAST)
    if SIZED:  # blocks at an edge hold fewer weights
        taps, columns = tl.load(row + TAPS), tl.load(row + COLUMN_UNITS)
        height, width = tl.load(row + HEIGHT), tl.load(row + WIDTH)
        n, k = index // (taps * columns) * height, index // taps % columns * width
        tall = tl.minimum(tl.load(row + ROWS) - n, height)
        wide = tl.minimum(tl.load(row + INPUTS) - k, width)
        slope *= (tall * wide).to(tl.float32)
    s, m, v = _adam(s, g + pull_weight * slope, m, v, rate, root)
    store_block(s_ptr, index, s, units, MASKED)
    store_block(m_ptr, index, m, units, MASKED)
    store_block(v_ptr, index, v, units, MASKED)


@triton.jit
def _balanced_step_kernel(
    s_ptr, g_ptr, g_offset_ptr, m_ptr, v_ptr, gain_ptr, partial_ptr, step_ptr, control_ptr,
    target_ptr, lr_ptr, table_ptr, chunk_ptr, group_ptr, segments_count, groups_count,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
    FAST: tl.constexpr, KEEP: tl.constexpr, FOLLOW: tl.constexpr, ASCEND: tl.constexpr,
    BAND: tl.constexpr, SHARE: tl.constexpr, GAIN: tl.constexpr, SIZED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    segment, start, stop, row = chunk_of(chunk_ptr, table_ptr)
    group = tl.load(row + GROUP)
    t = tl.load(step_ptr + 1)

    first, last = tl.load(group_ptr + 2 * group), tl.load(group_ptr + 2 * group + 1)
    percent = 100.0 / tl.load(target_ptr + group)
    task = tl.sqrt(_sum(partial_ptr, first, last, 0))
    excess = percent * _sum(partial_ptr, first, last, 1) - 100.0
    pull = percent * tl.sqrt(_sum(partial_ptr, first, last, 2))
    ratio = task / tl.maximum(pull, _TINY)
    if BAND == 0.0:
        ratio = tl.where(excess > 0.0, ratio, 0.0)
    weight = KEEP * tl.load(control_ptr + groups_count + group) + FOLLOW * ratio
    if FOLLOW > 0.0:
        weight = tl.where(t == 1, ratio, weight)
    begins = start == 0
    leads = begins & (tl.load(row + FIRST_CHUNK) == first)  # this group's first program
    lr = tl.load(lr_ptr)
    tl.store(control_ptr + group, weight + (ASCEND + SHARE * lr) * excess, mask=leads)
    if BAND > 0.0:
        weight *= tl.clamp(excess / BAND, 0.0, 1.0)
    tl.store(step_ptr, t, mask=tl.program_id(0) == 0)
    if GAIN:
        if begins:  # this segment's first program
            dot = _sum(partial_ptr, tl.load(row + FIRST_CHUNK), tl.load(row + LAST_CHUNK), 3)
            state = gain_ptr + segment
            value = tl.load(state + segments_count)
            m, v = tl.load(state + 2 * segments_count), tl.load(state + 3 * segments_count)
            rate, root = _corrections(tl.load(lr_ptr + 1), t)
            value, m, v = _adam(value, dot, m, v, rate, root)
            tl.store(state, value)
            tl.store(state + 2 * segments_count, m)
            tl.store(state + 3 * segments_count, v)

    units, pull_weight = tl.load(row + UNITS), weight * percent
    s_offset, g_offset = tl.load(row + LOGITS), tl.load(g_offset_ptr + segment)
    m_offset, v_offset = tl.load(row + FIRST_MOMENT), tl.load(row + SECOND_MOMENT)
    if ALIGNED:
        s_offset, g_offset = tl.multiple_of(s_offset, 8), tl.multiple_of(g_offset, 8)
        m_offset, v_offset = tl.multiple_of(m_offset, 8), tl.multiple_of(v_offset, 8)
    s_ptr, g_ptr, m_ptr, v_ptr = (
        s_ptr + s_offset,
        g_ptr + g_offset,
        m_ptr + m_offset,
        v_ptr + v_offset,
    )
    rate, root = _corrections(lr, t)
    whole = tl.minimum(stop, units // FLAT)
    for block in range(start, whole):
        _adam_block(
            s_ptr, g_ptr, m_ptr, v_ptr, row, block * FLAT, units, pull_weight, rate, root,
            KIND, A, B, C, SHIFT, FAST, SIZED, False,
        )  # fmt: skip
    if whole < stop:  # the tensor's last block, masked
        _adam_block(
            s_ptr, g_ptr, m_ptr, v_ptr, row, whole * FLAT, units, pull_weight, rate, root,
            KIND, A, B, C, SHIFT, FAST, SIZED, True,
        )  # fmt: skip


def launch_balanced_step(
    plan: Segments, spec: GateSpec, unit: Unit, rule: Rule, *, logits: Tensor, grad: Tensor,
    grad_offsets: Tensor, m: Tensor, v: Tensor, log_gain: Tensor | None, partials: Tensor,
    step: Tensor, control: Tensor, targets: Tensor, lr: Tensor, fast: bool = True,
) -> None:  # fmt: skip
    """K2b.  Tensors are the first of each role.

    log_gain: fp32 [4, segments] (next, present, Adam's two moments); step int64 [2] and control fp32
    [2, groups] (next, present); targets fp32 [groups], weights to keep; lr fp32 [2] (logits, gains).
    """
    mode = (log_gain is not None, not unit.single, plan.hints.aligned)
    _balanced_step(plan.programs, spec, rule, fast, *mode)(
        logits, grad, grad_offsets, m, v, step if log_gain is None else log_gain, partials, step,
        control, targets, lr, plan.table, plan.unit_chunks, plan.groups,
    )  # fmt: skip


@remembered
def _balanced_step(
    programs: Programs,
    spec: GateSpec,
    rule: Rule,
    fast: bool,
    gain: bool,
    sized: bool,
    aligned: bool,
) -> Launch:
    constants = {
        "KIND": spec.kind, "A": spec.a, "B": spec.b, "C": spec.c, "SHIFT": spec.shift, "FAST": fast,
        "KEEP": rule.keep, "FOLLOW": rule.follow, "ASCEND": rule.ascend, "BAND": rule.band,
        "SHARE": rule.share, "GAIN": gain, "SIZED": sized, "ALIGNED": aligned,
    }  # fmt: skip
    numbers = (programs.segments, programs.groups)
    kernel = _balanced_step_kernel
    return Launch(kernel, (programs.logits,), numbers, constants, {"num_warps": 4})


def static_cases() -> list[StaticCase]:
    """K2b with GradBalance, gradients in the search's bf16, within a band, and over blocks."""
    types = {
        "s_ptr": "*fp32", "g_ptr": "*bf16", "g_offset_ptr": "*i64", "m_ptr": "*fp32",
        "v_ptr": "*fp32", "gain_ptr": "*fp32", "partial_ptr": "*fp32", "step_ptr": "*i64",
        "control_ptr": "*fp32", "target_ptr": "*fp32", "lr_ptr": "*fp32", "table_ptr": "*i64",
        "chunk_ptr": "*i32", "group_ptr": "*i32", "segments_count": "i32", "groups_count": "i32",
    }  # fmt: skip
    concrete = GateSpec(CONCRETE)
    constants = {
        "KIND": concrete.kind, "A": concrete.a, "B": concrete.b, "C": concrete.c, "SHIFT": 0.0,
        "FAST": True, "KEEP": 0.99, "FOLLOW": 0.01, "ASCEND": 0.0, "SHARE": 0.0, "GAIN": True,
        "ALIGNED": True,
    }  # fmt: skip
    per_thread = FLAT_BLOCK // (4 * 32)
    return [
        static_case(
            _balanced_step_kernel, label, types | {"g_ptr": grad},
            constants | {"SIZED": sized, "BAND": band}, gates=per_thread,
        )
        for label, grad, sized, band in (
            ("weight", "*bf16", False, 0.0),
            ("weight band", "*bf16", False, 3.0),
            ("block", "*fp32", True, 0.0),
        )
    ]  # fmt: skip
