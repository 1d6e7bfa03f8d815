"""Panels of V rows as a format: feature-major activations, gathered by the columns that a panel keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import Format, Layer, Storage, kernel_obstacle
from .plan import HEIGHTS, PanelPlan
from .products import panel_forward, panel_grad_input, panel_grad_values, panel_pack


def _obstacle(
    device: torch.device, layer: Layer, dtype: torch.dtype, sides: tuple[int, ...]
) -> str | None:
    if layer.conv:
        return "it takes linear layers, got a convolution"
    if len(sides) != 1 or sides[0] not in HEIGHTS:
        return f"it takes one height among {', '.join(map(str, HEIGHTS))}, got {sides}"
    return kernel_obstacle(device, dtype)


def _prepare(mask: Tensor, layer: Layer, dtype: torch.dtype, sides: tuple[int]) -> Storage:
    return Storage(*PanelPlan.from_mask(mask, sides[0]).flatten())


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    plan = PanelPlan.unflatten(*storage)
    return panel_forward(x, panel_pack(values, plan, x.dtype), bias, plan)


def _grad_input(
    dy: Tensor, values: Tensor, layer: Layer, storage: Storage, shape: Sequence[int]
) -> Tensor:
    plan = PanelPlan.unflatten(*storage)
    return panel_grad_input(dy, panel_pack(values, plan, dy.dtype), plan)


def _grad_values(dy: Tensor, x: Tensor, values: Tensor, layer: Layer, storage: Storage) -> Tensor:
    return panel_grad_values(dy, x, PanelPlan.unflatten(*storage), values.dtype)


PANEL = Format(_prepare, _forward, _grad_input, _grad_values, _obstacle, feature_major=True)
