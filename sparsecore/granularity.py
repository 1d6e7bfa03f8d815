"""What one gate, score or mask entry covers: a weight, a block, an output channel, or a weight under N:M.

A weight is [n, k] (linear) or [n, k, *taps] (convolution); blocks tile the [n, k] plane of every tap.
The laws: `gather(apply(W, z) * G)` is the gradient of `<apply(W, z), G>` in z, and `sizes` sums to the
number of weights.  The algebra itself is `kernels.units`; a granularity names a case of it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .kinds import check_fields

_WIDEST = 2**31 - 1  # the kernels' arithmetic is of 32 bits within a row


class Granularity(ABC):
    """Maps a weight's shape to the shape of its units; abstract, all subclasses are final values."""

    @property
    @abstractmethod
    def unit(self) -> kernels.Unit:
        """The extent of one unit."""

    def units(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the tensor that holds one entry per unit."""
        return kernels.unit_shape(shape, self.unit)

    def apply(self, weight: Tensor, z: Tensor) -> Tensor:
        """weight * (z of the unit that each weight belongs to), without a weight-sized copy of z."""
        return kernels.apply_ref(weight, z, self.unit)

    def gather(self, values: Tensor) -> Tensor:
        """Sums weight-shaped values over each unit: the adjoint of `spread`."""
        return kernels.gather_ref(values, self.unit)

    def spread(self, z: Tensor, shape: Sequence[int]) -> Tensor:
        """Each unit's value at each of its weights, as a new tensor of the weight's shape."""
        ones = torch.ones(tuple(shape), dtype=z.dtype, device=z.device)
        return self.apply(ones, z)

    def sizes(self, shape: Sequence[int]) -> Tensor:
        """Number of weights in each unit, int64."""
        return self.gather(torch.ones(tuple(shape), dtype=torch.int64))

    def mean(self, values: Tensor) -> Tensor:
        """Each unit's mean over its weights."""
        return self.gather(values) / self.sizes(values.shape).to(values.device)

    def allowed(self, values: Tensor) -> Tensor:
        """Boolean mask of the units that may be non-zero together when ranked by `values`."""
        return kernels.allowed_ref(values, self.unit)

    def project(self, values: Tensor) -> Tensor:
        """`values` with 0 where the pattern forbids a unit (only N:M forbids any)."""
        return kernels.project_ref(values, self.unit)


@dataclass(frozen=True)
class Weight(Granularity):
    """One unit per weight (unstructured)."""

    @property
    def unit(self) -> kernels.Unit:
        return kernels.Unit()

    def __str__(self) -> str:
        return "weight"


@dataclass(frozen=True)
class Block(Granularity):
    """One unit per h x w block of the [n, k] plane (per tap); edge blocks may be smaller."""

    h: int
    w: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not (1 <= self.h <= _WIDEST and 1 <= self.w <= _WIDEST):
            raise ValueError(f"block: expected sides of 1 to {_WIDEST:,}, got {self.h}x{self.w}")

    @property
    def unit(self) -> kernels.Unit:
        return kernels.Unit(self.h, self.w)

    def __str__(self) -> str:
        return f"vector:{self.h}" if self.w == 1 else f"block:{self.h}x{self.w}"


@dataclass(frozen=True)
class Channel(Granularity):
    """One unit per output row or channel."""

    @property
    def unit(self) -> kernels.Unit:
        return kernels.Unit(1, 0)

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class NM(Granularity):
    """One unit per weight, at most n non-zero in every m consecutive inputs (dimension 1)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.n < self.m <= _WIDEST:
            raise ValueError(f"N:M: expected 1 <= N < M <= {_WIDEST:,}, got {self.n}:{self.m}")

    @property
    def unit(self) -> kernels.Unit:
        return kernels.Unit(1, self.m, self.n)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


_SIDE = "([0-9]{1,30})"  # Python makes no number of thousands of digits


def parse_granularity(text: str) -> Granularity:
    """`weight`, `channel`, `block:HxW`, `vector:V` (V x 1) or `N:M`; the inverse of `str`.

    Errors: ValueError for another text, sides and groups that are none or beyond 32 bits.
    """
    if text == "weight":
        return Weight()
    if text == "channel":
        return Channel()
    if match := re.fullmatch(rf"block:{_SIDE}x{_SIDE}", text):
        return Block(int(match[1]), int(match[2]))
    if match := re.fullmatch(rf"vector:{_SIDE}", text):
        return Block(int(match[1]), 1)
    if match := re.fullmatch(rf"{_SIDE}:{_SIDE}", text):
        return NM(int(match[1]), int(match[2]))
    raise ValueError(
        f"granularity: expected weight, channel, block:HxW, vector:V or N:M, as in block:8x8, got {text!r}"
    )
