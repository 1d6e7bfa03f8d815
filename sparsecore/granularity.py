"""What one gate, score or mask entry covers: a weight, a block, an output channel, or a weight under N:M.

A weight is [n, k] (linear) or [n, k, *taps] (convolution); blocks tile the [n, k] plane of every tap.
Each granularity maps between the weight's shape and its units' shape; the laws are
`gather(apply(W, z) * G)` is the gradient of `<apply(W, z), G>` in z, and `sizes` sums to the number of weights.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


class Granularity(ABC):
    """Maps a weight's shape to the shape of its units; abstract, all subclasses are final values."""

    @abstractmethod
    def units(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the tensor that holds one entry per unit."""

    @abstractmethod
    def apply(self, weight: Tensor, z: Tensor) -> Tensor:
        """weight * (z of the unit that each weight belongs to), without a weight-sized copy of z."""

    @abstractmethod
    def gather(self, values: Tensor) -> Tensor:
        """Sums weight-shaped values over each unit: the adjoint of `spread`."""

    def spread(self, z: Tensor, shape: Sequence[int]) -> Tensor:
        """Each unit's value at each of its weights, as a new tensor of the weight's shape."""
        ones = torch.ones(tuple(shape), dtype=z.dtype, device=z.device)
        return self.apply(ones, z)

    def sizes(self, shape: Sequence[int]) -> Tensor:
        """Number of weights in each unit, int64."""
        return self.gather(torch.ones(tuple(shape), dtype=torch.int64))

    def allowed(self, values: Tensor) -> Tensor:
        """Boolean mask of the units that may be non-zero together when ranked by `values`."""
        return torch.ones_like(values, dtype=torch.bool)

    def project(self, values: Tensor) -> Tensor:
        """`values` with 0 where the pattern forbids a unit (only N:M forbids any)."""
        return values


@dataclass(frozen=True)
class Weight(Granularity):
    """One unit per weight (unstructured)."""

    def units(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size(shape)

    def apply(self, weight: Tensor, z: Tensor) -> Tensor:
        return weight * z

    def gather(self, values: Tensor) -> Tensor:
        return values

    def __str__(self) -> str:
        return "weight"


@dataclass(frozen=True)
class Block(Granularity):
    """One unit per h x w block of the [n, k] plane (per tap); edge blocks may be smaller."""

    h: int
    w: int

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1:
            raise ValueError(f"block: expected sides of at least 1, got {self.h}x{self.w}")

    def units(self, shape: Sequence[int]) -> torch.Size:
        n, k, *taps = shape
        return torch.Size((-(-n // self.h), -(-k // self.w), *taps))

    def apply(self, weight: Tensor, z: Tensor) -> Tensor:
        n, k = weight.shape[:2]
        if n % self.h or k % self.w:
            rows = z.repeat_interleave(self.h, 0)[:n]
            return weight * rows.repeat_interleave(self.w, 1)[:, :k]
        tiles = self._tiles(weight) * z[:, None, :, None]  # [n/h, h, k/w, w, *taps]
        return tiles.reshape(weight.shape)

    def gather(self, values: Tensor) -> Tensor:
        n, k = values.shape[:2]
        # F.pad counts from the last dimension: no padding for the taps, then k, then n.
        pad = [0, 0] * (values.ndim - 2) + [0, -k % self.w, 0, -n % self.h]
        return self._tiles(F.pad(values, pad) if any(pad) else values).sum((1, 3))

    def _tiles(self, weight: Tensor) -> Tensor:
        n, k, *taps = weight.shape
        return weight.reshape(n // self.h, self.h, k // self.w, self.w, *taps)

    def __str__(self) -> str:
        return f"vector:{self.h}" if self.w == 1 else f"block:{self.h}x{self.w}"


@dataclass(frozen=True)
class Channel(Granularity):
    """One unit per output row or channel."""

    def units(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size((shape[0], *[1] * (len(shape) - 1)))

    def apply(self, weight: Tensor, z: Tensor) -> Tensor:
        return weight * z

    def gather(self, values: Tensor) -> Tensor:
        return values.sum(tuple(range(1, values.ndim)), keepdim=True)

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class NM(Granularity):
    """One unit per weight, at most n non-zero in every m consecutive inputs (dimension 1)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"N:M: expected 1 <= N < M, got {self.n}:{self.m}")

    def units(self, shape: Sequence[int]) -> torch.Size:
        return torch.Size(shape)

    def apply(self, weight: Tensor, z: Tensor) -> Tensor:
        return weight * z

    def gather(self, values: Tensor) -> Tensor:
        return values

    def allowed(self, values: Tensor) -> Tensor:
        k = values.shape[1]
        lanes = values.detach().movedim(1, -1)  # [n, *taps, k]
        pad = -k % self.m
        groups = F.pad(lanes, (0, pad), value=-torch.inf).unflatten(-1, (-1, self.m))
        # A stable sort makes the lower index win a tie, as everywhere else.
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(groups, dtype=torch.bool)
        keep.scatter_(-1, order[..., : self.n], True)
        return keep.flatten(-2)[..., :k].movedim(-1, 1)

    def project(self, values: Tensor) -> Tensor:
        return values * self.allowed(values)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse_granularity(text: str) -> Granularity:
    """`weight`, `channel`, `block:HxW`, `vector:V` (V x 1) or `N:M`; the inverse of `str`."""
    if text == "weight":
        return Weight()
    if text == "channel":
        return Channel()
    if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"vector:(\d+)", text):
        return Block(int(match[1]), 1)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    raise ValueError(
        f"granularity: expected weight, channel, block:HxW, vector:V or N:M, got {text!r}"
    )
