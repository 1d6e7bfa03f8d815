"""2:4 sparsity on tensor cores that know it, through torch: forward at up to twice the dense speed.

Only forward: a weight with two of four inputs kept has no such pattern in its transpose, so dX and dW are
those of `state`.  The weight is compressed anew from its dense form each step, since its values change.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import Format, Layer, Storage
from .state import STATE, dense_weight

_ROWS, _COLUMNS = 32, 64  # multiples of what the hardware takes in 16-bit types


def fits(mask: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs are kept."""
    if mask.ndim != 2 or mask.shape[1] % 4:
        return False
    return bool((mask.unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def _obstacle(device: torch.device, layer: Layer, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, got {device}"
    if layer.conv or dtype not in (torch.float16, torch.bfloat16):
        return f"it takes linear layers in fp16 or bf16, got {layer.shape} in {dtype}"
    if layer.shape[0] % _ROWS or layer.shape[1] % _COLUMNS:
        return f"it takes multiples of {_ROWS} rows and {_COLUMNS} columns, got {layer.shape}"
    return None


def _prepare(mask: Tensor, layer: Layer, dtype: torch.dtype) -> Storage:
    if not fits(mask):
        raise ValueError(
            "format 'semi': expected at most 2 kept weights in every 4 consecutive inputs, got more; "
            "search with granularity 2:4, or use 'state'"
        )
    return STATE.prepare(mask, layer, dtype)


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, layer: Layer, storage: Storage
) -> Tensor:
    weight = torch.sparse.to_sparse_semi_structured(dense_weight(values, layer, storage, x.dtype))
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


SEMI = Format(_prepare, _forward, STATE.grad_input, STATE.grad_values, _obstacle)
