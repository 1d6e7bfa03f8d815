"""The device side of `segments`: reading the table, and what the kernels of a step share."""

from ..dsl import tl, triton
from . import segments

WEIGHT = tl.constexpr(segments.WEIGHT)
LOGITS = tl.constexpr(segments.LOGITS)
OUT = tl.constexpr(segments.OUT)
FACTOR = tl.constexpr(segments.FACTOR)
FIRST_MOMENT = tl.constexpr(segments.FIRST_MOMENT)
SECOND_MOMENT = tl.constexpr(segments.SECOND_MOMENT)
NUMEL = tl.constexpr(segments.NUMEL)
UNITS = tl.constexpr(segments.UNITS)
ROWS = tl.constexpr(segments.ROWS)
INPUTS = tl.constexpr(segments.INPUTS)
TAPS = tl.constexpr(segments.TAPS)
STRIDE_N = tl.constexpr(segments.STRIDE_N)
STRIDE_K = tl.constexpr(segments.STRIDE_K)
STRIDE_TAP = tl.constexpr(segments.STRIDE_TAP)
HEIGHT = tl.constexpr(segments.HEIGHT)
WIDTH = tl.constexpr(segments.WIDTH)
COLUMN_UNITS = tl.constexpr(segments.COLUMN_UNITS)
LAYER = tl.constexpr(segments.LAYER)
GROUP = tl.constexpr(segments.GROUP)
FIRST_CHUNK = tl.constexpr(segments.FIRST_CHUNK)
LAST_CHUNK = tl.constexpr(segments.LAST_CHUNK)
COLUMNS = tl.constexpr(segments.COLUMNS)
FLAT = tl.constexpr(segments.FLAT_BLOCK)


@triton.jit
def chunk_of(chunk_ptr, table_ptr):
    """(segment, first block, last block + 1, the segment's row) of this program."""
    chunk = chunk_ptr + 3 * tl.program_id(0)
    segment = tl.load(chunk)
    start, stop = tl.load(chunk + 1).to(tl.int64), tl.load(chunk + 2).to(tl.int64)
    return segment, start, stop, table_ptr + segment * COLUMNS


@triton.jit
def tensor_of(base, row, NAME: tl.constexpr, ALIGNED: tl.constexpr):
    """This segment's tensor of a role."""
    offset = tl.load(row + NAME)
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return base + offset


@triton.jit
def gain_of(gain_ptr, segment, GAIN: tl.constexpr):
    """exp of the segment's log-gain."""
    gain = 1.0
    if GAIN:
        gain = tl.exp(tl.load(gain_ptr + segment).to(tl.float32))
    return gain


@triton.jit
def advance(step_ptr, control_ptr, gain_ptr, segment, start, segments_count, groups_count,
             GAIN: tl.constexpr):  # fmt: skip
    """Begins a step: copies the state from [0], what a step starts from, to [1], what it reads.

    The balanced step writes [0] alone, and everything between reads [1]: no launch reads what it writes.
    """
    if tl.program_id(0) == 0:
        tl.store(step_ptr + 1, tl.load(step_ptr) + 1)
        for group in range(groups_count):
            tl.store(control_ptr + groups_count + group, tl.load(control_ptr + group))
    if GAIN:  # known when compiled
        if start == 0:  # this segment's first program
            tl.store(gain_ptr + segments_count + segment, tl.load(gain_ptr + segment))


@triton.jit
def store_sums(partial_ptr, task, kept, pull, dot):
    """This program's row of `partials`."""
    partial = partial_ptr + 4 * tl.program_id(0)
    tl.store(partial, tl.sum(task))
    tl.store(partial + 1, tl.sum(kept))
    tl.store(partial + 2, tl.sum(pull))
    tl.store(partial + 3, tl.sum(dot))
