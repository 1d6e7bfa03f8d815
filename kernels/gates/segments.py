"""Multi-tensor launches: which stretch of which tensor each program works on.

One launch covers a list of tensors.  A kernel gets, for each role (weights, logits, ...), the first
tensor of the list as its base pointer; the others are reached by element offsets from it, kept on
the device in `table` [segments, columns] int64.  `chunks` [programs, 3] int32 holds (segment, first
block, last block + 1): one program loops over its blocks, so that its sums are few and their order
is fixed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..units import Unit, unit_shape

# Columns of `table`.
WEIGHT, LOGITS, OUT, FACTOR, FIRST_MOMENT, SECOND_MOMENT = range(6)  # element offsets
NUMEL, UNITS, ROWS, INPUTS, TAPS, STRIDE_N, STRIDE_K, STRIDE_TAP = range(6, 14)
HEIGHT, WIDTH, COLUMN_UNITS, LAYER, GROUP, FIRST_CHUNK, LAST_CHUNK = range(14, 21)
COLUMNS = 21

_PROGRAMS = 1056  # 8 for each of an H200's 132 multiprocessors: one wave, and sums short to add up
FLAT_BLOCK = 1024  # weights that a program handles at a time where there is one gate per weight
TILE = 1024  # units times elements of a unit that a program handles at a time otherwise


class Geometry(NamedTuple):
    """How a weight's units lie in memory."""

    shape: tuple[int, ...]  # [n, k, *taps]
    channels_last: bool
    layer: int
    group: int = 0


class Hints(NamedTuple):
    """What lets memory move in 16-byte vectors."""

    aligned: bool = False  # every offset is a multiple of 8 elements
    vector: int = 1  # and every row, unit and tap of so many: 8, 4 or 1


class Programs(NamedTuple):
    """How many there are of each kind."""

    segments: int
    groups: int
    weights: int  # programs over weights
    logits: int  # programs over logits


class Segments(NamedTuple):
    """The plan of a launch over some weights and of one over their logits."""

    table: Tensor  # int64 [segments, COLUMNS]
    chunks: Tensor  # int32 [programs, 3], blocks of weights (or of units, where several weights share one)
    unit_chunks: Tensor  # int32 [programs, 3], blocks of logits
    groups: Tensor  # int32 [groups, 2]: each group's first and last + 1 program in `chunks`
    hints: Hints

    @property
    def programs(self) -> Programs:
        tensors = (self.table, self.groups, self.chunks, self.unit_chunks)
        return Programs(*(t.shape[0] for t in tensors))


def is_channels_last(t: Tensor) -> bool:
    """Whether a dense 4-d tensor lies in memory as [n, *taps, k] and not as [n, k, *taps]."""
    return (
        t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    )


def is_dense(t: Tensor) -> bool:
    """Whether a tensor lies without gaps in one of the two orders that kernels know."""
    return t.is_contiguous() or is_channels_last(t)


def laid_out_as(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the memory order of `like`, a dense tensor of its shape; copied only where that is another one."""
    strides = zip(t.shape, t.stride(), like.stride(), strict=True)
    if any(mine != wanted for size, mine, wanted in strides if size > 1):
        t = torch.empty_like(like, dtype=t.dtype, device=t.device).copy_(t)
    return t


def tile_of(unit: Unit) -> tuple[int, int]:
    """(units, elements of each) of a program's tile, powers of 2."""
    wide = 256 if unit.w == 0 else 1
    while unit.w and wide < min(unit.h * unit.w, TILE):
        wide *= 2
    return TILE // wide, wide


def plan(
    geometries: Sequence[Geometry],
    unit: Unit,
    offsets: Sequence[Sequence[int]],
    device: torch.device,
) -> Segments:
    """`offsets`: for each segment its element offsets WEIGHT ... SECOND_MOMENT.  Groups are contiguous."""
    rows, blocks, unit_blocks = [], [], []
    for g, offset in zip(geometries, offsets, strict=True):
        n, k, *taps = g.shape
        tap_count = 1
        for t in taps:
            tap_count *= t
        numel = n * k * tap_count
        units = unit_shape(g.shape, unit).numel()
        height, width = unit.h, unit.w
        stride_k, stride_tap = (1, k) if g.channels_last else (tap_count, 1)
        stride_n = k * tap_count
        inputs = k
        if unit.w == 0:  # a row's inputs and taps are one stretch of memory
            inputs, tap_count, stride_k, stride_tap, width = stride_n, 1, 1, 1, stride_n
        columns = -(-inputs // width)
        rows.append(
            [
                *(*offset, numel, units, n, inputs, tap_count, stride_n, stride_k, stride_tap),
                *(height, width, columns, g.layer, g.group, 0, 0),
            ]
        )
        if unit.single and not unit.keep:
            blocks.append(-(-numel // FLAT_BLOCK))
        else:
            # N:M groups are the tiles' units although every weight has a logit.
            tiles = n * columns * tap_count if unit.keep else units
            blocks.append(-(-tiles // tile_of(unit)[0]))
        unit_blocks.append(-(-units // FLAT_BLOCK))
    if max(row[UNITS] for row in rows) >= 2**31:
        raise ValueError(
            f"gates: expected fewer than 2^31 in a layer, got {max(r[UNITS] for r in rows)}"
        )
    chunks = _chunks(blocks)
    for segment, row in enumerate(rows):
        mine = [i for i, (s, _, _) in enumerate(chunks) if s == segment]
        row[FIRST_CHUNK], row[LAST_CHUNK] = mine[0], mine[-1] + 1
    groups = []
    for group in range(max(g.group for g in geometries) + 1):
        members = [row for row in rows if row[GROUP] == group]
        groups.append([members[0][FIRST_CHUNK], members[-1][LAST_CHUNK]])
    return Segments(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(chunks, dtype=torch.int32, device=device),
        torch.tensor(_chunks(unit_blocks), dtype=torch.int32, device=device),
        torch.tensor(groups, dtype=torch.int32, device=device),
        _hints(rows, unit, all(o % 8 == 0 for offset in offsets for o in offset)),
    )


def _hints(rows: Sequence[Sequence[int]], unit: Unit, aligned: bool) -> Hints:
    # Inputs must lie side by side: a linear layer's, channels_last's, a whole row's.
    if not aligned or any(row[STRIDE_K] != 1 for row in rows):
        return Hints(aligned)
    strides = [value for row in rows for value in (row[INPUTS], row[STRIDE_N])]
    strides += [row[STRIDE_TAP] for row in rows if row[TAPS] > 1]
    together = math.gcd(*strides, unit.w or 8, 8)
    return Hints(True, together if together >= 4 else 1)


def _chunks(blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(segment, first block, last block + 1) of about `_PROGRAMS` equal stretches; none spans two segments."""
    size = max(1, -(-sum(blocks) // _PROGRAMS))
    return [
        (segment, start, min(start + size, count))
        for segment, count in enumerate(blocks)
        for start in range(0, max(count, 1), size)
    ]


def offsets_of(tensors: Sequence[Tensor]) -> list[int]:
    """Element offsets of tensors of one dtype from the first of them."""
    base, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(t.data_ptr() - base) // size for t in tensors]
