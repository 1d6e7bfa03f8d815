"""Masks in files: their bits, eight to a byte, and their layers in the model's order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_SIDES = 64  # of a tensor


def layer_order(meta: Mapping[str, Any]) -> list[str]:
    """A file's layers in the model's order, which a file of tensors loses; where none is noted, by name.

    Ties between layers go to the earlier one, and noise is drawn for one after another.
    Errors: ValueError unless each layer that has a shape is there once.
    """
    shapes = meta["shapes"]
    names = meta.get("layers", list(shapes))
    if not isinstance(names, list) or sorted(names) != sorted(shapes):
        raise ValueError("layers: expected the name of every mask once")
    return names


def pack_mask(mask: Tensor) -> Tensor:
    """The bits of a mask, eight to a byte: uint8 [ceil(numel / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().reshape(-1).numpy()))


def unpack_mask(name: str, packed: Tensor, shape: Any) -> Tensor:
    """The mask of `shape` that `pack_mask` packed.  Errors: ValueError, with the mask's name."""
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_SIDES
        or not all(type(n) is int and 0 <= n < 2**63 for n in shape)
    ):
        raise ValueError(f"mask of {name}: expected a shape, got {shape!r:.80}")
    count = int(np.prod(np.array(shape, dtype=object)))  # Python integers: no overflow
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() != -(-count // 8):
        raise ValueError(
            f"mask of {name}: expected {-(-count // 8)} packed bytes for shape {shape}, "
            f"got {packed.numel()} of {packed.dtype}"
        )
    bits = np.unpackbits(packed.numpy())
    if bits[count:].any():
        raise ValueError(f"mask of {name}: bits beyond its {count} weights are set")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)
