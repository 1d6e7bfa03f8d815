"""Dead rows and columns left out of one layer's product, and dense compute on what is left.

x [T, k] is gathered to its live inputs, multiplied by the weight of live rows and columns, and the result
spread over all outputs; dead outputs are their bias.  The rest of the network sees nothing of it, unlike
compaction of a whole model, which saves the gathering too.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import Format, Layer, Storage, conv_backward, conv_grad_input, kept_index


def _obstacle(device: torch.device, layer: Layer, dtype: torch.dtype) -> str | None:
    return None if layer.groups == 1 else f"it takes one group, got {layer.groups}"


def _prepare(mask: Tensor, layer: Layer, dtype: torch.dtype) -> Storage:
    """[live rows, live columns, places of the kept weights in the small weight]."""
    plane = mask if mask.ndim == 2 else mask.flatten(2).any(2)
    rows, columns = plane.any(1).nonzero()[:, 0], plane.any(0).nonzero()[:, 0]
    small = mask[rows][:, columns]
    return Storage([rows, columns, kept_index(small).long()], [])


def _weight(
    values: Tensor, layer: Layer, storage: Storage, dtype: torch.dtype, fill: Any
) -> tuple[Tensor, None]:
    """Of live rows and columns."""
    rows, columns, places = storage.tensors
    weight = values.new_zeros(len(rows), len(columns), *layer.shape[2:], dtype=dtype)
    weight.view(-1).index_copy_(0, places, values.to(dtype))
    return weight, None


def _traced(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storages: Sequence[Storage]
) -> Tensor:
    rows, columns, places = storages[0].tensors
    shape = (len(rows), len(columns), *layer.shape[2:])
    weight = values.new_zeros(math.prod(shape), dtype=x.dtype)
    weight = weight.index_put((places,), values.to(x.dtype)).view(shape)
    small, size = _product(_live(x, columns), weight, layer), layer.output(x.shape)
    # Not written in place, which loses the memory format of images on the way through a compiler.
    if layer.conv and not small.is_contiguous():
        n, *size = size[1], size[0], *size[2:]
        y = small.new_zeros(*size, n).index_copy(3, rows, small.movedim(1, 3)).movedim(3, 1)
    else:
        y = small.new_zeros(size).index_copy(1, rows, small)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (x.ndim - 2))


def _product(live: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    return F.conv2d(live, weight, None, *layer.pairs) if layer.conv else F.linear(live, weight)


def _live(x: Tensor, index: Tensor) -> Tensor:
    """These channels or features of x; images stay channels last, which `index_select` would undo."""
    if x.ndim == 4 and not x.is_contiguous():
        return x.movedim(1, -1).index_select(-1, index).movedim(-1, 1)
    return x.index_select(1, index)


def _empty(small: Tensor, shape: Sequence[int]) -> Tensor:
    """An unset result in the memory format of its live part."""
    last = small.ndim == 4 and not small.is_contiguous()
    format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=small.dtype, device=small.device, memory_format=format)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    rows, columns, _ = storage.tensors
    small = _product(_live(x, columns), weight, layer)
    y = _empty(small, layer.output(x.shape))
    if bias is None:
        y.zero_()
    else:
        wide = bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
        y.copy_(wide)
        small += wide[rows]
    return y.index_copy_(1, rows, small)


def _grad_input(
    dy: Tensor, weight: Tensor, layer: Layer, storage: Storage, shape: Sequence[int]
) -> Tensor:
    rows, columns, _ = storage.tensors
    live = _live(dy, rows)
    if layer.conv:
        small = conv_grad_input(live, weight, layer, shape)
    else:
        small = live @ weight
    return _empty(small, shape).zero_().index_copy_(1, columns, small)


def _grad_values(dy: Tensor, x: Tensor, values: Tensor, layer: Layer, storage: Storage) -> Tensor:
    rows, columns, places = storage.tensors
    left, right = _live(dy, rows), _live(x, columns)
    if layer.conv:
        weight = x.new_empty(1).expand(len(rows), len(columns), *layer.shape[2:])
        dw = conv_backward(left, right, weight, layer, [False, True, False])[1]
    else:
        dw = left.T @ right
    return dw.reshape(-1).index_select(0, places).to(values.dtype)


COMPACT = Format(_prepare, _weight, _forward, _grad_input, _grad_values, _obstacle, traced=_traced)
