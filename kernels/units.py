"""What one gate covers, and the algebra between a weight's shape and its units' shape, in plain PyTorch.

A weight is [n, k] (linear) or [n, k, *taps] (convolution); blocks tile the [n, k] plane of every tap.
`gather_ref(spread_ref(z) * G)` is the gradient of `<spread_ref(z), G>` in z.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Unit(NamedTuple):
    """h x w weights of the [n, k] plane of each tap share a gate; edge blocks may be smaller.

    w = 0: h whole output rows, all their inputs and taps.  keep > 0 (N:M): one gate per weight, of
    which at most `keep` in every w consecutive inputs are non-zero.
    """

    h: int = 1
    w: int = 1
    keep: int = 0

    @property
    def single(self) -> bool:
        """Whether there is one gate per weight."""
        return self.keep > 0 or (self.h == 1 and self.w == 1)


def unit_shape(shape: Sequence[int], unit: Unit) -> torch.Size:
    """Shape of the tensor that holds one entry per unit."""
    if unit.single:
        return torch.Size(shape)
    n, k, *taps = shape
    if unit.w == 0:
        return torch.Size((-(-n // unit.h), *[1] * (len(shape) - 1)))
    return torch.Size((-(-n // unit.h), -(-k // unit.w), *taps))


def apply_ref(weight: Tensor, z: Tensor, unit: Unit) -> Tensor:
    """weight * (z of the unit that each weight belongs to), without a weight-sized copy of z."""
    if unit.single or (unit.w == 0 and unit.h == 1):
        return weight * z
    n, k = weight.shape[:2]
    w = unit.w or k
    if n % unit.h or k % w:
        rows = z.repeat_interleave(unit.h, 0)[:n]
        return weight * (rows if unit.w == 0 else rows.repeat_interleave(w, 1)[:, :k])
    tiles = _tiles(weight, unit.h, w) * z[:, None, :, None]  # [n/h, h, k/w, w, *taps]
    return tiles.reshape(weight.shape)


def gather_ref(values: Tensor, unit: Unit) -> Tensor:
    """Sums weight-shaped values over each unit."""
    if unit.single:
        return values
    n, k = values.shape[:2]
    w = unit.w or k
    # F.pad counts from the last dimension: no padding for the taps, then k, then n.
    pad = [0, 0] * (values.ndim - 2) + [0, -k % w, 0, -n % unit.h]
    sums = _tiles(F.pad(values, pad) if any(pad) else values, unit.h, w).sum((1, 3))
    return sums if unit.w or values.ndim == 2 else sums.sum(tuple(range(2, values.ndim)), True)


def allowed_ref(values: Tensor, unit: Unit) -> Tensor:
    """Boolean mask of the units that may be non-zero together when ranked by `values`."""
    if not unit.keep:
        return torch.ones_like(values, dtype=torch.bool)
    k = values.shape[1]
    lanes = values.detach().movedim(1, -1)  # [n, *taps, k]
    groups = F.pad(lanes, (0, -k % unit.w), value=-torch.inf).unflatten(-1, (-1, unit.w))
    # A stable sort makes the lower index win a tie, as everywhere else.
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(-1, order[..., : unit.keep], True)
    return keep.flatten(-2)[..., :k].movedim(-1, 1)


def project_ref(values: Tensor, unit: Unit) -> Tensor:
    """`values` with 0 where N:M forbids a unit."""
    return values * allowed_ref(values, unit) if unit.keep else values


def _tiles(weight: Tensor, h: int, w: int) -> Tensor:
    n, k, *taps = weight.shape
    return weight.reshape(n // h, h, k // w, w, *taps)
