"""A decided mask in panels: V rows of a matrix share a list of columns, and each column of it is stored whole.

A matrix [n, k] is cut into panels of V rows.  A column of a panel that has a kept weight is a vector
of V stored ones: packed [vectors, V], by panel and in it by column.  Beside kept weights it holds 0;
the last panel is filled up.  A product gathers rows of xT by such a list, so a panel may choose any
columns and still be a dense operand of tensor cores: 64 x 1 vectors are as fast as 64 x 64 blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ragged import longest_first, pieces_of, starts_of

HEIGHTS = (16, 32, 64, 128)  # of panels; a tile of a product is one panel high


def tile_of(height: int) -> int:
    """Vectors that one tile of the backward products covers."""
    return 128 if height >= 64 else 64


@dataclass(frozen=True, eq=False)
class PanelPlan:
    """Index tensors of one mask, on the mask's device, computed once by `from_mask`.

    columns: int32 [vectors], ascending in a panel.  start: int32 [panels + 1], where each begins.
    rank: int32 [panels], the panels, longest first, so that the last programs to start are short.
    transposed: int32 [vectors], the vectors by column and in it by panel; column_start: int32 [k + 1].
    tiles: int32 [tiles, 2], (panel, first vector) of every `tile_of(V)` vectors of each panel.
    source: [vectors * V], for each packed element the index of its weight among the kept ones in
        row-major order of the mask, -1 where there is none.
    slot: [nnz], its inverse.  Both int32, or int64 for a mask of 2**31 weights (edges filled up).

    Law: from_mask(m, V).to_mask() == m.
    """

    columns: Tensor
    start: Tensor
    rank: Tensor
    transposed: Tensor
    column_start: Tensor
    tiles: Tensor
    source: Tensor
    slot: Tensor
    shape: tuple[int, int]
    height: int

    @classmethod
    def from_mask(cls, mask: Tensor, height: int) -> "PanelPlan":
        """Errors: ValueError for a mask or height that cannot be."""
        if mask.dtype != torch.bool or mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(
                f"expected a boolean mask [n, k], got {mask.dtype} {tuple(mask.shape)}; "
                "use `weight != 0` of a linear layer"
            )
        if height not in HEIGHTS:
            raise ValueError(
                f"expected panels of {HEIGHTS} rows, got {height}; lower ones fill no tensor core: "
                "multiply the masked weight instead"
            )
        (n, k), device = mask.shape, mask.device
        panels = -(-n // height)
        narrow = torch.int32 if max(mask.numel(), panels * k * height) < 2**31 else torch.int64
        at = mask.flatten().nonzero().flatten().to(narrow)  # row-major, so ascending
        row = at // k
        column = at - row * k
        vector = row // height * k + column  # among all, [panels, k]
        stored = torch.zeros(panels * k, dtype=torch.bool, device=device)
        stored[vector] = True
        index = stored.cumsum(0, dtype=narrow) - 1
        kept = stored.nonzero().flatten()
        slot = index[vector] * height + row % height
        source = torch.full((len(kept) * height,), -1, dtype=narrow, device=device)
        source[slot] = torch.arange(len(slot), dtype=narrow, device=device)
        counts = torch.bincount(kept // k, minlength=panels)
        start = starts_of(counts)
        columns = kept % k
        return cls(
            columns.int(),
            start,
            longest_first(counts),
            torch.argsort(columns, stable=True).int(),
            starts_of(torch.bincount(columns, minlength=k)),
            pieces_of(start, tile_of(height)),
            source,
            slot,
            (n, k),
            height,
        )

    def to_mask(self) -> Tensor:
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.slot.device)
        mask.view(-1)[self.positions()] = True
        return mask

    def positions(self) -> Tensor:
        """int64 [nnz]: flat index in the mask of each kept weight, ascending."""
        slot = self.slot.long()
        counts = self.start.diff()
        panel = torch.arange(len(counts), device=slot.device)
        panel = panel.repeat_interleave(counts, output_size=self.vectors)
        vector = slot // self.height
        row = panel[vector] * self.height + slot % self.height
        return row * self.shape[1] + self.columns[vector]

    @property
    def vectors(self) -> int:
        return len(self.columns)

    @property
    def nnz(self) -> int:
        return len(self.slot)

    @property
    def fill(self) -> float:
        """Kept weights over stored ones; 1 if nothing is stored."""
        return self.nnz / len(self.source) if self.vectors else 1.0

    def same(self, other: "PanelPlan") -> bool:
        (mine, sides), (theirs, others) = self.flatten(), other.flatten()
        return sides == others and all(map(torch.equal, mine, theirs))

    def flatten(self) -> tuple[list[Tensor], list[int]]:
        """What an operator of PyTorch can be given; `unflatten` makes a plan of it again."""
        lists = [self.columns, self.start, self.rank, self.transposed, self.column_start]
        return [*lists, self.tiles, self.source, self.slot], [self.height, *self.shape]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], ints: Sequence[int]) -> "PanelPlan":
        height, n, k = ints
        return cls(*tensors, shape=(n, k), height=height)

    def to(self, device: torch.device | str) -> "PanelPlan":
        tensors, ints = self.flatten()
        return PanelPlan.unflatten([tensor.to(device) for tensor in tensors], ints)
