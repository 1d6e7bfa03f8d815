"""Unstructured sparsity on the CPU: compressed rows, and compressed columns for dX.

Sums over the kept weights of a row, y[n, :] = sum_j values[j] * xT[column[j], :], are what embedding bags
compute, and for those PyTorch has generated machine code (FBGEMM) that holds a row of sums in registers:
two to three times the speed of MKL's `csr @ dense` behind the same library.  Activations are feature-major
([k, T], a row a feature), so y and dX are returned as transposed views: strides (1, T).  Pointwise
functions keep them, so the next layer finds its input as it wants it.  dW is `torch.sparse.sampled_addmm`.

A convolution unfolds its input image by image; the weight is then [n, k * taps].
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import Format, Layer, Storage, check_mask

# Seen on two cores with 1 MiB of level-2 cache each.  A tile of 64 tokens keeps its sums in registers and
# its inputs in that cache, but is copied in and out, which only many kept weights a row and column pay for.
_TILE = 64
_MANY, _SOME, _FEW = 100, 75, 25
_TABLE = 1 << 21  # elements of inputs that lie in the level-3 cache
_SPAN = 512  # tokens of a product that makes dW
# Values whose pages outnumber what the processor finds without walking tables: writing them out of order is then
# twice as fast as reading them so.
_SCATTERED = 1 << 20


def _obstacle(device: torch.device, layer: Layer, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its products are the CPU's, got {device}"
    if math.prod(layer.shape) * layer.groups >= 2**31:
        return f"its places are int32, got {layer.shape} of more than 2**31 elements"
    return None


def _prepare(mask: Tensor, layer: Layer, dtype: torch.dtype) -> Storage:
    """[row offsets, columns] of the weight as [n, inputs * taps], the same of its transpose, all int32, and
    the values' way into the transpose: from which place each of its weights comes (int32) or, for many
    weights, to which place each value goes (int64)."""
    n, k, *filters = check_mask(mask).shape
    taps = filters[0] * filters[1] if filters else 1
    at = mask.flatten().nonzero().squeeze(1)
    row, column = at // (k * taps), at % (k * taps)
    column += row // (n // layer.groups) * (k * taps)  # a group's part of all inputs
    width = layer.inputs * taps
    column, order = column.int(), torch.sort(column.int(), stable=True).indices
    way = order.int()
    if len(order) >= _SCATTERED:
        way = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    with warnings.catch_warnings():  # tells once a process that such tensors are in beta
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1))
    rows = [_offsets(row, n), column]
    columns = [_offsets(column, width), row[order].int()]
    return Storage([*rows, *columns, way], [width])


def _offsets(places: Tensor, count: int) -> Tensor:
    """Where each of `count` rows begins, and the last one ends."""
    ends = torch.bincount(places, minlength=count).cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def _bags(table: Tensor, offsets: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """[rows, T]: row i is the sum over j in [offsets[i], offsets[i + 1]) of values[j] * table[places[j]]."""
    table, values = table.detach(), values.detach()  # else bags prepare for a backward of their own
    return F.embedding_bag(
        places, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def _transposed(values: Tensor, way: Tensor) -> Tensor:
    """The values in the order of the transpose."""
    if way.dtype == torch.int64:
        return torch.empty_like(values).index_copy_(0, way, values)
    return values.index_select(0, way)


def _spmm(dense: Tensor, offsets: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """sparse [rows, k] @ dense [k, T] of any strides, a tile of tokens at a time."""
    rows, (k, tokens) = len(offsets) - 1, dense.shape
    tile = _tile(k, tokens, len(values) / max(rows + k, 1))
    if tile >= tokens:
        return _bags(dense.contiguous(), offsets, places, values)
    out = dense.new_empty(rows, tokens)
    for start in range(0, tokens, tile):
        part = slice(start, start + tile)
        out[:, part] = _bags(dense[:, part].contiguous(), offsets, places, values)
    return out


def _tile(k: int, tokens: int, share: float) -> int:
    """Tokens at a time, for `share` kept weights a row and column."""
    if share < _SOME and tokens <= 256:
        return tokens
    if share < _FEW and k * tokens <= _TABLE:
        return tokens
    return _TILE if share >= _MANY else 2 * _TILE


def _weight(
    values: Tensor, layer: Layer, storage: Storage, dtype: torch.dtype, fill: Any
) -> tuple[Tensor, None]:
    return values.to(dtype), None


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    offsets, places, *_ = storage.tensors
    if layer.conv:
        y = x.new_empty(layer.output(x.shape))
        for image, columns in zip(y.flatten(2), _unfolded(x, layer), strict=True):
            image.copy_(_spmm(columns, offsets, places, values))
        return y if bias is None else y.add_(bias.to(y.dtype)[:, None, None])
    y = _spmm(x.T, offsets, places, values)
    return (y if bias is None else y.add_(bias.to(y.dtype)[:, None])).T


def _grad_input(
    dy: Tensor, values: Tensor, layer: Layer, storage: Storage, shape: Sequence[int]
) -> Tensor:
    offsets, places, way = storage.tensors[2:]
    values = _transposed(values, way)
    if not layer.conv:
        return _spmm(dy.T, offsets, places, values).T
    dx = dy.new_empty(list(shape))
    stride, pad, dilation = layer.pairs
    for image, back in zip(dx, dy.flatten(2), strict=True):
        columns = _spmm(back, offsets, places, values)
        if _pointwise(layer):
            image.copy_(columns.view(shape[1:]))
        else:
            image.copy_(F.fold(columns, shape[2:], layer.shape[2:], dilation, pad, stride))
    return dx


def _grad_values(dy: Tensor, x: Tensor, values: Tensor, layer: Layer, storage: Storage) -> Tensor:
    offsets, places, *_ = storage.tensors
    dtype = torch.promote_types(x.dtype, torch.float32)  # the product knows no lower ones
    size = (layer.shape[0], storage.numbers[0])
    sums = torch.zeros(values.shape, dtype=dtype)
    out = torch.sparse_csr_tensor(offsets, places, sums, size, check_invariants=False)
    for left, right in _pairs(dy, x, layer):
        a, b = left.to(dtype).contiguous(), right.to(dtype).contiguous()
        torch.sparse.sampled_addmm(out, a, b.T, beta=1.0, out=out)
    return out.values().to(values.dtype)


def _pairs(dy: Tensor, x: Tensor, layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    """Feature-major parts of dy [n, t] and x [k, t] over all tokens."""
    if layer.conv:
        yield from zip(dy.flatten(2), _unfolded(x, layer), strict=True)
        return
    for start in range(0, x.shape[0], _SPAN):
        part = slice(start, start + _SPAN)
        yield dy[part].T, x[part].T


def _pointwise(layer: Layer) -> bool:
    return layer.shape[2:] == (1, 1) and layer.slide[:4] == (1, 1, 0, 0)


def _unfolded(x: Tensor, layer: Layer) -> Iterator[Tensor]:
    """Each image [k, H, W] as [k * taps, output pixels]."""
    stride, pad, dilation = layer.pairs
    for image in x:
        if _pointwise(layer):
            yield image.flatten(1)
        else:
            yield F.unfold(image[None], layer.shape[2:], dilation, pad, stride)[0]


CSR = Format(_prepare, _weight, _forward, _grad_input, _grad_values, _obstacle, feature_major=True)
