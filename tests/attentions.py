"""Attention layers and their inputs, for tests."""

from typing import Any

import torch
from helpers import rand, randn, seeded
from torch import Tensor, nn

import sparsecore as sc

E, HEADS = 12, 3  # an odd number of heads with an even size each, and nothing a power of two


def attention(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    """A plain one whose biases are not zero."""
    layer = seeded(lambda: nn.MultiheadAttention(E, options.pop("heads", HEADS), **options), seed)
    assert isinstance(layer, nn.MultiheadAttention)
    if layer.in_proj_bias is not None:
        layer.in_proj_bias.data.copy_(randn(3 * E, seed=seed + 1))
        layer.out_proj.bias.data.copy_(randn(E, seed=seed + 2))
    return layer


def inputs(call: str, layer: nn.MultiheadAttention, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value of 4 and 5 tokens in a batch of 2, or of none."""

    device = layer.out_proj.bias.device if layer.out_proj.bias is not None else "cpu"

    def tokens(count: int, size: int, seed: int) -> Tensor:
        shape = (2, count, size) if layer.batch_first else (count, 2, size)
        shape = (count, size) if call.startswith("one") else shape
        return randn(*shape, seed=seed, dtype=dtype).to(device).requires_grad_()

    query = tokens(4, E, 1)
    if call in ("self", "one sentence"):
        return query, query, query
    key = tokens(5, layer.kdim, 2)
    return query, key, tokens(5, layer.vdim, 3) if call == "apart" else key


def masked(layer: nn.Module, share: float = 0.4) -> nn.Module:
    """Sparse with a random mask everywhere."""
    layer = sc.sparsify_(layer)
    for i, part in enumerate(sc.sparse_layers(layer).values()):
        part.set_mask_(rand(*part.weight_shape, seed=i) < share)
    return layer
