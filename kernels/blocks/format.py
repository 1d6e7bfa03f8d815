"""Blocks as a format: values are packed into whole blocks in the compute dtype, and stored blocks multiplied."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..formats import Format, Layer, Storage, kernel_obstacle
from .lists import SIDES
from .plan import BlockPlan
from .products import block_forward, block_grad_input, block_grad_values, pack


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


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    plan = BlockPlan.unflatten(*storage)
    return block_forward(x, pack(values, plan, x.dtype), bias, plan, layer.slide)


def _grad_input(
    dy: Tensor, values: Tensor, layer: Layer, storage: Storage, shape: Sequence[int]
) -> Tensor:
    plan = BlockPlan.unflatten(*storage)
    return block_grad_input(dy, pack(values, plan, dy.dtype), plan, list(shape[2:]), layer.slide)


def _grad_values(dy: Tensor, x: Tensor, values: Tensor, layer: Layer, storage: Storage) -> Tensor:
    plan = BlockPlan.unflatten(*storage)
    return block_grad_values(dy, x, plan, layer.slide, values.dtype)


def _tiled(storage: Storage, tile: int) -> Storage:
    return Storage(*replace(BlockPlan.unflatten(*storage), tile=tile).flatten())


BLOCK = Format(_prepare, _forward, _grad_input, _grad_values, _obstacle, tiled=_tiled)
