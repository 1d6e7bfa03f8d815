"""Blocks as a format: values are packed into whole blocks in the compute dtype, and stored blocks multiplied.

They are packed once a step, and packed blocks live from a layer's forward to its backward.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..dsl import knobs
from ..formats import Format, Layer, Storage, kernel_obstacle
from .lists import SIDES
from .operators import block_layer
from .plan import BlockPlan
from .products import fitting, forward, grad_input, gradient, pack


def _obstacle(
    device: torch.device, layer: Layer, dtype: torch.dtype, sides: tuple[int, ...]
) -> str | None:
    if len(sides) != 2 or any(side not in SIDES for side in sides):
        return f"it takes two sides among {', '.join(map(str, SIDES))}, got {'x'.join(map(str, sides))}"
    if layer.groups > 1 and layer.shape[0] // layer.groups % sides[0]:
        return (
            f"its rows of blocks would straddle groups of {layer.shape[0] // layer.groups} outputs"
        )
    return kernel_obstacle(device, dtype)


def _prepare(mask: Tensor, layer: Layer, dtype: torch.dtype, sides: tuple[int, int]) -> Storage:
    return Storage(*BlockPlan.from_mask(mask, sides, layer.groups).flatten())


def _plan(storage: Storage) -> BlockPlan:
    if storage.made is None:
        storage.made = BlockPlan.unflatten(storage.tensors, storage.numbers)
    return storage.made


def _weight(
    values: Tensor, layer: Layer, storage: Storage, dtype: torch.dtype, fill: Any
) -> tuple[Tensor, None]:
    return pack(values, _plan(storage), dtype), None


def _forward(
    x: Tensor, packed: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    plan = _plan(storage)
    return forward(x, packed, bias, plan, fitting(x, x.shape, plan, layer.slide))


def _grad_input(
    dy: Tensor, packed: Tensor, layer: Layer, storage: Storage, shape: Sequence[int]
) -> Tensor:
    plan = _plan(storage)
    return grad_input(dy, packed, plan, shape, fitting(dy, shape, plan, layer.slide))


def _grad_values(dy: Tensor, x: Tensor, values: Tensor, layer: Layer, storage: Storage) -> Tensor:
    plan = _plan(storage)
    problem = fitting(x, x.shape, plan, layer.slide)
    return gradient(dy, x, plan, problem, torch.empty_like(values))


def _traced(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storages: Sequence[Storage]
) -> Tensor:
    numbers = [storage.numbers for storage in storages]
    return block_layer(x, values, bias, storages[0].tensors, *numbers, list(layer.slide))[0]


def _tiled(storage: Storage, tile: int) -> Storage:
    return Storage(*replace(_plan(storage), tile=tile).flatten())


BLOCK = Format(
    _prepare, _weight, _forward, _grad_input, _grad_values, _obstacle, tiled=_tiled,
    traced=None if knobs.runtime.interpret else _traced,
)  # fmt: skip
