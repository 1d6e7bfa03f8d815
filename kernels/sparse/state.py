"""Dense compute, sparse state (K9): the vendor's dense product of a weight that only holds the kept values.

A dense weight in the compute dtype, zero but for the kept places, is written once and kept: each
forward scatters the values into it, so nothing weight-sized is allocated or cleared.  dX scatters again only
where another forward has done so in between, or may have: in graphs that are parts of a step, whose replays
nobody tells (4 to 12 bytes a kept weight, a few percent of a product).  dW is made a slab of rows at a time and
gathered, so it never exists as a whole; a slab fits the cache.  The optimiser sees the kept values alone: its
state and its time are theirs.

Where nothing is pruned the values are the dense weight as they are, and nothing is kept or moved.  Within
torch.compile all of it is the compiler's, on a weight and a dW of its own.

The dense weight is scratch of these operators: whoever reads it has filled it before.  So a plan is for one
stream at a time.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import by_kernel, on_gpu
from ..formats import Format, Layer, Storage, conv_backward, conv_grad_input, kept_index
from ..moves import launch_gather, launch_scatter

# Elements of dW that are made at a time.
_SLAB, _SLAB_ON_CPU = 1 << 26, 1 << 21


def _scatter_(dense: Tensor, values: Tensor, index: Tensor) -> None:
    """Into the places of dense's storage."""
    if by_kernel(dense):
        launch_scatter(dense, values.contiguous(), index)
    else:
        # `data`: scratch has no version that autograd should watch.
        flat = dense.data.as_strided((dense.numel(),), (1,))
        flat.index_copy_(0, index, values.to(dense.dtype))


def _gather(dense: Tensor, index: Tensor, out: Tensor) -> None:
    """Out of the places of dense's storage."""
    if by_kernel(dense):
        launch_gather(dense, index, out)
        return
    dense = dense.as_strided((dense.numel(),), (1,))
    if dense.dtype == out.dtype:
        torch.index_select(dense, 0, index, out=out)
    else:
        out.copy_(dense.index_select(0, index))


# --- The format -------------------------------------------------------------------------------------


def _obstacle(device: torch.device, layer: Layer, dtype: torch.dtype) -> str | None:
    return None


def _prepare(mask: Tensor, layer: Layer, dtype: torch.dtype) -> Storage:
    """[places in the dense weight's storage, dense weight, places in their slab, slab], and slabs' rows and ends.

    A convolution's dW is small and made at once: it has the first two only.  A whole mask has the first.
    """
    index = kept_index(mask)
    if len(index) == mask.numel():
        return Storage([index], [])
    weight = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    if layer.conv and mask.is_cuda:  # cuDNN's tensor cores want channels last
        weight = weight.contiguous(memory_format=torch.channels_last)
        n, k, r, s = mask.shape
        place = torch.arange(mask.numel(), dtype=index.dtype, device=mask.device)
        index = place.view(n, r, s, k).permute(0, 3, 1, 2)[mask]
    local = index
    if not by_kernel(mask):  # PyTorch scatters by int64 alone
        index = index.long()
    if layer.conv:
        return Storage([index, weight], [])
    slab = _SLAB_ON_CPU if mask.device.type == "cpu" else _SLAB
    rows = max(1, slab // max(mask.shape[1], 1))
    slabs = [int(slab.sum()) for slab in mask.split(rows)]
    slab = weight.new_empty(min(rows, mask.shape[0]), mask.shape[1])
    tensors = [index, weight, local % (rows * mask.shape[1]), slab]
    return Storage(tensors, [rows, *itertools.accumulate(slabs)])


def _whole(storage: Storage) -> bool:
    return len(storage.tensors) == 1


def _weight(
    values: Tensor, layer: Layer, storage: Storage, dtype: torch.dtype, fill: Any
) -> tuple[Tensor, Any]:
    """The layer's dense weight, holding the values; a new one in another dtype than was prepared for."""
    if _whole(storage):
        return values.to(dtype).view(layer.shape), None
    index, weight = storage.tensors[:2]
    if weight.dtype != dtype:
        weight = torch.zeros_like(weight, dtype=dtype)
        _scatter_(weight, values, index)
        return weight, None
    captured = on_gpu(weight) and torch.cuda.is_current_stream_capturing()
    storage.replayed |= captured
    graph = _graph if captured else None
    known = graph is not None or not storage.replayed
    if not known or fill is None or fill is not storage.fill or fill[0] is not graph:
        _scatter_(weight, values, index)
        storage.fill = [graph]
    return weight, storage.fill


def _traced(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storages: Sequence[Storage]
) -> Tensor:
    return _forward(
        x, _traced_weight(values, layer, storages[0], x.dtype), bias, layer, storages[0]
    )


def _traced_weight(values: Tensor, layer: Layer, storage: Storage, dtype: torch.dtype) -> Tensor:
    values = values.to(dtype)
    if _whole(storage):
        return values.view(layer.shape)
    index, weight = storage.tensors[:2]
    flat = values.new_zeros(weight.numel()).index_put((index,), values)
    if not layer.conv or weight.is_contiguous():
        return flat.view(layer.shape)
    n, k, r, s = layer.shape
    return flat.view(n, r, s, k).permute(0, 3, 1, 2)


_graph: object | None = None  # the one that is being captured as a whole


@contextmanager
def one_graph() -> Iterator[None]:
    """What is captured within becomes one graph, whose kernels find what others of it have filled."""
    global _graph
    before, _graph = _graph, object()
    try:
        yield
    finally:
        _graph = before


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if layer.conv:
        return F.conv2d(x, weight, bias, *layer.pairs, groups=layer.groups)
    return F.linear(x, weight, bias)


def _grad_input(
    dy: Tensor, weight: Tensor, layer: Layer, storage: Storage, shape: Sequence[int]
) -> Tensor:
    if layer.conv:
        return conv_grad_input(dy, weight, layer, shape)
    return dy @ weight


def _grad_values(dy: Tensor, x: Tensor, values: Tensor, layer: Layer, storage: Storage) -> Tensor:
    if layer.conv:
        whole = _whole(storage)
        weight = values.view(layer.shape) if whole else storage.tensors[1]
        dw = conv_backward(dy, x, weight.to(x.dtype), layer, [False, True, False])[1]
        return _kept(dw, weight, storage, values)
    if _whole(storage):
        return (dy.T @ x).flatten().to(values.dtype)
    out = torch.empty_like(values)
    (local, slab), (rows, *ends) = storage.tensors[2:], storage.numbers
    slab = slab.data  # scratch too
    slab, start = slab if slab.dtype == dy.dtype else torch.empty_like(slab, dtype=dy.dtype), 0
    if len(ends) == 1:
        _gather(torch.mm(dy.T, x.detach(), out=slab), local, out)
        return out
    for first, end in zip(range(0, layer.shape[0], rows), ends, strict=True):
        part = dy[:, first : first + rows]
        dw = torch.mm(part.T, x.detach(), out=slab[: part.shape[1]])
        _gather(dw, local[start:end], out[start:end])
        start = end
    return out


def _grad_both(
    dy: Tensor, x: Tensor, values: Tensor, weight: Tensor, layer: Layer, storage: Storage
) -> tuple[Tensor, Tensor]:
    """One call of the library, which then reorders dy once."""
    dx, dw, _ = conv_backward(dy, x, weight, layer, [True, True, False])
    return dx, _kept(dw, weight, storage, values)


def _kept(dw: Tensor, weight: Tensor, storage: Storage, values: Tensor) -> Tensor:
    """The kept entries of a convolution's dW, whose weight's storage has them in this order, as values are."""
    if _whole(storage):
        return dw.flatten().to(values.dtype)
    strides = zip(dw.stride(), weight.stride(), weight.shape, strict=True)
    if any(found != wanted for found, wanted, size in strides if size > 1):
        dw = torch.empty_like(weight, dtype=dw.dtype).copy_(dw)
    out = torch.empty_like(values)
    _gather(dw, storage.tensors[0], out)
    return out


STATE = Format(
    _prepare, _weight, _forward, _grad_input, _grad_values, _obstacle, grad_both=_grad_both, traced=_traced
)  # fmt: skip
