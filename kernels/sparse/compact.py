"""Dead rows and columns left out of one layer's product, and dense compute on what is left.

x [T, k] is gathered to its live inputs, multiplied by the weight of live rows and columns, and the result
spread over all outputs; dead outputs are their bias.  The rest of the network sees nothing of it, unlike
compaction of a whole model, which saves the gathering too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import Format, Layer, Storage, conv_backward, kept_index


def _obstacle(device: torch.device, layer: Layer, dtype: torch.dtype) -> str | None:
    return None if layer.groups == 1 else f"it takes one group, got {layer.groups}"


def _prepare(mask: Tensor, layer: Layer, dtype: torch.dtype) -> Storage:
    """[live rows, live columns, places of the kept weights in the small weight]."""
    plane = mask if mask.ndim == 2 else mask.flatten(2).any(2)
    rows, columns = plane.any(1).nonzero()[:, 0], plane.any(0).nonzero()[:, 0]
    small = mask[rows][:, columns]
    return Storage([rows, columns, kept_index(small).long()], [])


def _small(values: Tensor, layer: Layer, storage: Storage, dtype: torch.dtype) -> Tensor:
    """The weight of live rows and columns."""
    rows, columns, places = storage.tensors
    weight = values.new_zeros(len(rows), len(columns), *layer.shape[2:], dtype=dtype)
    weight.view(-1).index_copy_(0, places, values.to(dtype))
    return weight


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    rows, columns, _ = storage.tensors
    weight = _small(values, layer, storage, x.dtype)
    live = x.index_select(1, columns)
    small = F.conv2d(live, weight, None, *layer.pairs) if layer.conv else F.linear(live, weight)
    shape = layer.output(x.shape)
    if bias is None:
        y = x.new_zeros(shape)
    else:
        wide = bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        y = x.new_empty(shape).copy_(wide)
        small += wide[rows]
    return y.index_copy_(1, rows, small)


def _grad_input(
    dy: Tensor, values: Tensor, layer: Layer, storage: Storage, shape: Sequence[int]
) -> Tensor:
    rows, columns, _ = storage.tensors
    weight, live = _small(values, layer, storage, dy.dtype), dy.index_select(1, rows)
    if layer.conv:
        x = dy.new_empty(1).expand(shape[0], len(columns), *shape[2:])
        small = conv_backward(live, x, weight, layer, [True, False, False])[0]
    else:
        small = live @ weight
    return dy.new_zeros(list(shape)).index_copy_(1, columns, small)


def _grad_values(dy: Tensor, x: Tensor, values: Tensor, layer: Layer, storage: Storage) -> Tensor:
    rows, columns, places = storage.tensors
    left, right = dy.index_select(1, rows), x.index_select(1, columns)
    if layer.conv:
        weight = x.new_empty(1).expand(len(rows), len(columns), *layer.shape[2:])
        dw = conv_backward(left, right, weight, layer, [False, True, False])[1]
    else:
        dw = left.T @ right
    return dw.reshape(-1).index_select(0, places).to(values.dtype)


COMPACT = Format(_prepare, _forward, _grad_input, _grad_values, _obstacle)
