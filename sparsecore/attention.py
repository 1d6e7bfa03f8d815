"""SparseMultiheadAttention: `nn.MultiheadAttention` whose projections are sparse layers.

One parameter is one layer.  Packed queries, keys and values are one matrix [3 E, E] to PyTorch, with one key
and one initialisation, and as such they are the layer `in_proj`, just as `qkv` of other vision transformers:
self-attention multiplies by it once.  With sizes of their own they are `q_proj`, `k_proj` and `v_proj`.
A row belongs to one head of one of the three, so a channel means what it does elsewhere.

The parameters stay the attention's, under its keys.  Reading `in_proj_weight` gives what the attention
computes with, so the fused evaluation of `nn.TransformerEncoderLayer`, which takes the weights out, is sparse
as well; it multiplies densely, unless `torch.backends.mha.set_fastpath_enabled(False)` leaves it to plans.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import Self

from . import kernels
from .layer import as_class
from .nn import SparseLinear
from .parts import Part, Whole, baked, parts, seen
from .patterns import Planned

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_BARE = ("in_proj", *_SEPARATE)  # whose weights are bare parameters of the attention


class Projection(Part):
    """A weight of an attention as a layer; the attention holds the parameters and knows when to multiply."""

    multiplies = True

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole._bias_of(self.name)

    def parts(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> Sequence[Tensor]:
        """So many rows of the product with each input."""
        if len(inputs) == 1:
            return [self(inputs[0])]
        gated, bias = self._sampling(inputs[0]), self.bias
        if gated is not None and gated.impl not in ("auto", "materialise"):
            # What was asked for knows the whole product alone.
            return [self(x).split(sizes, -1)[i] for i, x in enumerate(inputs)]
        pattern = self.pattern
        plans = pattern.split(sizes, inputs[-1]) if isinstance(pattern, Planned) else None
        if plans is None:
            self.look()
            return _products(inputs, sizes, self.effective_weight, bias)
        values = self.raw_weight.split([plan.nnz for plan in plans])
        biases = _split(bias, sizes)
        parts = zip(inputs, values, biases, plans, strict=True)
        return [kernels.sparse_layer(*part) for part in parts]


def _products(
    inputs: Sequence[Tensor], sizes: Sequence[int], weight: Tensor, bias: Tensor | None
) -> Sequence[Tensor]:
    parts = zip(inputs, weight.split(sizes), _split(bias, sizes), strict=True)
    return [F.linear(*part) for part in parts]


def _split(bias: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if bias is None else bias.split(sizes)


class SparseMultiheadAttention(Whole, nn.MultiheadAttention):
    """`nn.MultiheadAttention` of sparse layers: same signature, same keys, same numbers to rounding.

    Errors: as `nn.MultiheadAttention`; forward: ValueError for inputs or masks of shapes that do not fit,
    TypeError for masks that are neither bool nor floating point.
    """

    in_proj_weight = seen("in_proj_weight", "in_proj")  # pyright: ignore[reportAssignmentType]
    q_proj_weight = seen("q_proj_weight", "q_proj")  # pyright: ignore[reportAssignmentType]
    k_proj_weight = seen("k_proj_weight", "k_proj")  # pyright: ignore[reportAssignmentType]
    v_proj_weight = seen("v_proj_weight", "v_proj")  # pyright: ignore[reportAssignmentType]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparsify_(projections(self))

    def sparsify_(self, names: Collection[str]) -> Self:
        """Makes these of its dense projections sparse layers that share their parameters."""
        for name in names:
            if name == "out_proj":
                self.out_proj = SparseLinear.from_dense(self.out_proj)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                self.add_module(name, Projection(self, name, f"{name}_weight"))
        self._modules["out_proj"] = self._modules.pop("out_proj")  # the last, as signals go
        return self

    @classmethod
    def from_dense(cls, layer: nn.Module, names: Collection[str] | None = None) -> Self:
        """A sparse attention that shares `layer`'s parameters, hooks and settings.

        Args: names: of the `projections` that become sparse layers; None: all.
        """
        if not isinstance(layer, nn.MultiheadAttention):
            raise TypeError(
                f"{cls.__name__}.from_dense: expected MultiheadAttention, got {type(layer).__name__}"
            )
        sparse = as_class(cls, layer)
        return sparse.sparsify_(projections(layer) if names is None else names)

    def to_dense(self) -> nn.MultiheadAttention:
        """A plain attention with the same keys, as `SparseLayer.to_dense` makes layers plain."""
        dense = as_class(nn.MultiheadAttention, self)
        baked(self, dense)
        if isinstance(self.out_proj, SparseLinear):
            dense.out_proj = as_class(NonDynamicallyQuantizableLinear, self.out_proj.to_dense())
        return dense

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self.refuse_symbols(query)
        if query.is_nested or key.is_nested or value.is_nested:
            # PyTorch's fused operator takes those, with the weights as they are seen, or says why not.
            return self._plainly()(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )  # fmt: skip
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: expected attn_mask beside it, the mask that it describes")
        q, k, v = map(self._heads, self._projected(query, key, value))  # [B, heads, T, D]
        # The hint stands in for the mask where nothing else needs that.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(q, k, None if causal else attn_mask, key_padding_mask)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, self._heads(bias).expand(len(t), -1, -1, -1)], 2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None and mask.shape[3] < k.shape[2]:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))  # all may see what was added
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * math.sqrt(1.0 / self.head_dim) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        by_token = (0, 2, 1, 3) if self.batch_first or query.ndim == 2 else (2, 0, 1, 3)
        y = y.permute(by_token).flatten(2)
        if query.ndim == 2:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        return self.out_proj(y), weights

    def _plainly(self) -> nn.MultiheadAttention:
        """A plain attention with the weights as they are computed now."""
        plain = as_class(nn.MultiheadAttention, self)
        for part in parts(self):
            plain._modules.pop(part.name)
            plain._parameters[part.key] = part.effective_weight  # pyright: ignore[reportArgumentType]
        if isinstance(self.out_proj, SparseLinear):
            out = as_class(NonDynamicallyQuantizableLinear, self.out_proj)
            out._parameters["weight"] = self.out_proj.effective_weight  # pyright: ignore[reportArgumentType]
            out._modules.pop("pattern", None)
            plain._modules["out_proj"] = out
        return plain

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes, at = (self.embed_dim, self.kdim, self.vdim), 0 if self.batch_first else 1
        if (
            query.ndim in (2, 3)
            and key.ndim == query.ndim
            and key.shape[:-1] == value.shape[:-1]
            and (query.ndim == 2 or query.shape[at] == key.shape[at])
            and (query.shape[-1], key.shape[-1], value.shape[-1]) == sizes
        ):
            return
        order = "[B, T, {}]" if self.batch_first else "[T, B, {}]"
        raise ValueError(
            f"attention: expected query, key and value {', '.join(map(order.format, sizes))} (or without B), "
            f"as many keys as values, got {', '.join(str(list(t.shape)) for t in (query, key, value))}"
        )

    def _bias_of(self, name: str) -> Tensor | None:
        bias = self.in_proj_bias
        if bias is None or name == "in_proj":
            return bias
        start = self.embed_dim * _SEPARATE.index(name)
        return bias[start : start + self.embed_dim]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        size = self.embed_dim
        if not self._qkv_same_embed_dim:
            inputs = zip(_SEPARATE, (query, key, value), strict=True)
            return [self._project(name, [x], [size])[0] for name, x in inputs]
        if key is not value:
            return self._project("in_proj", [query, key, value], [size] * 3)
        if query is key:
            return self._project("in_proj", [query], [3 * size])[0].chunk(3, -1)
        q, both = self._project("in_proj", [query, key], [size, 2 * size])
        return q, *both.chunk(2, -1)

    def _project(
        self, name: str, inputs: Sequence[Tensor], sizes: Sequence[int]
    ) -> Sequence[Tensor]:
        layer = self._modules.get(name)
        if isinstance(layer, Projection):
            return layer.parts(inputs, sizes)
        weight = self._parameters[f"{name}_weight"]
        assert weight is not None
        return _products(inputs, sizes, weight, self._bias_of(name))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, heads, T, D] as a view."""
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.ndim == 2:
            return heads.transpose(0, 1)[None]
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores, broadcasting to [B, heads, queries, keys]."""
        (b, h, tokens, _), keys = q.shape, k.shape[2]
        mask = None
        if attn_mask is not None:
            wanted = [(tokens, keys), (b * h, tokens, keys)]
            mask = _added("attn_mask", attn_mask, wanted, q.dtype)
            mask = mask.view(b, h, tokens, keys) if mask.ndim == 3 else mask[None, None]
        if padding is not None:
            wanted = [(b, keys), (keys,)] if b == 1 else [(b, keys)]
            padded = _added("key_padding_mask", padding, wanted, q.dtype).view(b, 1, 1, keys)
            mask = padded if mask is None else mask + padded
        return mask


def _added(
    name: str, mask: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> Tensor:
    """The mask as a number to add: -inf where a bool mask says so."""
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected a bool or floating-point mask, got {mask.dtype}")
    return mask


def bare_keys(attention: nn.MultiheadAttention) -> list[str]:
    """The keys of the projections that are bare parameters, whether another tool computes them or not."""
    names = ("in_proj",) if attention._qkv_same_embed_dim else _SEPARATE
    return [f"{name}_weight" for name in names]


def projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """Its projections that are not sparse yet, as the linear layers that they are; parameters are shared."""
    found: dict[str, nn.Linear] = {}
    for name in _BARE:
        weight = attention._parameters.get(f"{name}_weight")
        if weight is not None and name not in attention._modules:
            n, k = weight.shape
            found[name] = nn.Linear(k, n, bias=False, device="meta")
            found[name].weight = weight
    if type(attention.out_proj) in (nn.Linear, NonDynamicallyQuantizableLinear):
        found["out_proj"] = attention.out_proj
    return found
