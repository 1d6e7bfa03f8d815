"""A decided mask in blocks: which are stored, where, and the lists that products walk in both directions.

A weight [n, k] or [n, k, r, s] is cut into blocks of h x w, those of a convolution in the [n, k] plane
of each tap.  A block with a kept weight is stored whole, as packed[b] of packed [blocks, h, w]; what
it holds beside kept weights is 0, and edge blocks are filled up.  Storage is ordered by row of blocks
nb and in it by entry kb * taps + tap.  Letters as in `gemm`; with groups, k counts the inputs of
one group, as in a convolution's weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ragged import longest_first, pieces_of, starts_of
from .lists import SIDES

TILE = 64  # inputs that one tile of the gradient covers at least: narrower blocks share it


class Walk(NamedTuple):
    """The stored blocks by row (or by column) of blocks; int32.

    order [blocks]: entry of each, ascending in a row: kb * taps + tap (columns: nb * taps + tap).
    start [rows + 1]: where each row begins in `order`.
    rank [rows]: the rows, longest first, so that the last programs to start are short.
    slot [blocks]: packed block of each entry; in rows they stand as they are stored.
    """

    order: Tensor
    start: Tensor
    rank: Tensor
    slot: Tensor


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Index tensors of one mask, on the mask's device, computed once by `from_mask`.

    rows, columns: the lists of the forward product and of its transpose.  Columns count per group.
    tiles: int32 [tiles, 2], (row, first packed block) of each tile of the gradient: neighbours in a row
        that together are at least 64 inputs wide.
    source: [blocks * h * w], for each packed element the index of its weight among the kept ones in
        row-major order of the mask, -1 where there is none.
    slot: [nnz], its inverse.  Both int32, or int64 for a mask of 2**31 weights (edges filled up).
    tile: which of their tiles the products take; see `problem.config_of`.

    Laws: from_mask(m, b).to_mask() == m; from_mask(m.T, (w, h)).same(from_mask(m, (h, w)).T).
    """

    rows: Walk
    columns: Walk
    tiles: Tensor
    source: Tensor
    slot: Tensor
    shape: tuple[int, ...]
    block: tuple[int, int]
    groups: int
    tile: int = 0

    @classmethod
    def from_mask(cls, mask: Tensor, block: Sequence[int], groups: int = 1) -> "BlockPlan":
        """Errors: ValueError for a mask, sides or groups that cannot be."""
        h, w = _checked(mask, block, groups)
        n, k, *filters = mask.shape
        taps = filters[0] * filters[1] if filters else 1
        nb, kb = -(-n // h), -(-k // w)
        units = nb * kb * taps
        narrow = torch.int32 if units * h * w < 2**31 else torch.int64
        at = mask.flatten().nonzero().flatten().to(narrow)  # row-major, so ascending
        tap, plane = (at % taps, at // taps) if taps > 1 else (0, at)
        row = plane // k
        column = plane - row * k
        # Sides are powers of two.
        unit = ((row >> _log(h)) * kb + (column >> _log(w))) * taps + tap
        inner = ((row & (h - 1)) << _log(w)) + (column & (w - 1))
        stored = torch.zeros(units, dtype=torch.bool, device=mask.device)
        stored[unit] = True
        index = stored.cumsum(0, dtype=narrow) - 1
        slot = index[unit] * (h * w) + inner
        kept = stored.nonzero().flatten()
        source = torch.full((len(kept) * h * w,), -1, dtype=narrow, device=mask.device)
        source[slot] = torch.arange(len(slot), dtype=narrow, device=mask.device)
        entries = kb * taps
        rows = _walk(kept // entries, kept % entries, nb)
        # A column belongs to a group, and so do all of its rows.
        group = kept // entries // (nb // groups) if groups > 1 else 0
        column = group * kb + kept % entries // taps
        columns = _walk(column, kept // entries * taps + kept % taps, groups * kb)
        tiles = pieces_of(rows.start, max(1, TILE // w))
        return cls(rows, columns, tiles, source, slot, tuple(mask.shape), (h, w), groups)

    def to_mask(self) -> Tensor:
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.slot.device)
        mask.view(-1)[self.positions()] = True
        return mask

    def positions(self) -> Tensor:
        """int64 [nnz]: flat index in the mask of each kept weight, ascending."""
        h, w = self.block
        _, k, *_ = self.shape
        slot = self.slot.long()
        unit = self.units[slot // (h * w)]
        entries = -(-k // w) * self.taps
        n = unit // entries * h + slot % (h * w) // w
        kk = unit % entries // self.taps * w + slot % w
        return (n * k + kk) * self.taps + unit % self.taps

    @property
    def units(self) -> Tensor:
        """int64 [blocks]: flat index of each packed block in [rows of blocks, columns, taps]."""
        entries = -(-self.shape[1] // self.block[1]) * self.taps
        counts = self.rows.start.diff()
        row = torch.arange(len(counts), device=counts.device)
        row = row.repeat_interleave(counts, output_size=self.blocks)
        return row * entries + self.rows.order

    @property
    def T(self) -> "BlockPlan":
        """The plan of the transposed matrix.  Its values are in the transpose's row-major order."""
        if len(self.shape) != 2:
            raise ValueError(f"expected a plan of a matrix to transpose, got {self.shape}")
        return BlockPlan.from_mask(self.to_mask().T, self.block[::-1])

    @property
    def blocks(self) -> int:
        return self.rows.order.shape[0]

    @property
    def nnz(self) -> int:
        return self.slot.shape[0]

    @property
    def packed(self) -> tuple[int, int, int]:
        """The shape of packed blocks."""
        return (self.blocks, *self.block)

    @property
    def taps(self) -> int:
        return self.shape[2] * self.shape[3] if len(self.shape) == 4 else 1

    @property
    def fill(self) -> float:
        """Kept weights over stored ones; 1 if nothing is stored."""
        return self.nnz / max(1, len(self.source)) if self.blocks else 1.0

    def same(self, other: "BlockPlan") -> bool:
        (mine, sides), (theirs, others) = self.flatten(), other.flatten()
        return sides == others and all(map(torch.equal, mine, theirs))

    def flatten(self) -> tuple[list[Tensor], list[int]]:
        """What an operator of PyTorch can be given; `unflatten` makes a plan of it again."""
        tensors = [*self.rows, *self.columns, self.tiles, self.source, self.slot]
        return tensors, [*self.block, self.groups, self.tile, *self.shape]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], ints: Sequence[int]) -> "BlockPlan":
        rows, columns = Walk(*tensors[:4]), Walk(*tensors[4:8])
        h, w, groups, tile, *shape = ints
        return cls(rows, columns, *tensors[8:], tuple(shape), (h, w), groups, tile)

    def to(self, device: torch.device | str) -> "BlockPlan":
        tensors, ints = self.flatten()
        return BlockPlan.unflatten([tensor.to(device) for tensor in tensors], ints)


def _checked(mask: Tensor, block: Sequence[int], groups: int) -> tuple[int, int]:
    if mask.dtype != torch.bool or mask.ndim not in (2, 4):
        raise ValueError(
            f"expected a boolean mask [n, k] or [n, k, r, s], got {mask.dtype} {tuple(mask.shape)}; "
            "use `weight != 0` of one layer"
        )
    if 0 in mask.shape:
        raise ValueError(f"expected a mask of some weights, got {tuple(mask.shape)}")
    if isinstance(block, int) or len(block) != 2 or not all(side in SIDES for side in block):
        raise ValueError(
            f"expected a block (h, w) with sides among {SIDES}, got {block}; "
            "smaller blocks fill no tensor core: multiply the masked weight instead"
        )
    if mask[0].numel() * block[0] >= 2**31:
        raise ValueError(
            f"expected rows of blocks below 2**31 weights, as places in them are int32, got {tuple(mask.shape)}"
        )
    rows = mask.shape[0]
    if groups != 1 and mask.ndim == 2:
        raise ValueError(f"expected one group of a matrix, got {groups}")
    if groups < 1 or rows % groups or (groups > 1 and rows // groups % block[0]):
        raise ValueError(
            f"expected groups whose outputs are whole rows of blocks, got {rows} outputs in {groups} "
            f"groups and blocks {block[0]} high; take lower blocks or multiply the masked weight"
        )
    return block[0], block[1]


def _log(side: int) -> int:
    return side.bit_length() - 1


def _walk(row: Tensor, entry: Tensor, rows: int) -> Walk:
    """row, entry: int64 [blocks] in packed order, which is by row where that is the forward walk."""
    slot = torch.argsort(row, stable=True)  # entries ascend in a row already
    counts = torch.bincount(row, minlength=rows)
    return Walk(entry[slot].int(), starts_of(counts), longest_first(counts), slot.int())
