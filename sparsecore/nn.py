"""Drop-in layers whose weight is seen through a pattern, one for each kind of PyTorch's.

SparseLinear and SparseConv2d multiply by plans and fused gates; the others compute as PyTorch does, with the weight
that their pattern gives.  Units are along the weight's own dimensions: a "channel" is an entry of the first, which
of ConvTranspose and Hugging Face's Conv1D is an input, and of an embedding a row.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import kernels
from .layer import SparseLayer
from .patterns import Masked, Planned


class SparseLinear(SparseLayer, nn.Linear):
    """`nn.Linear` with a pattern; same signature, same keys.  Without a pattern it is exactly nn.Linear."""

    multiplies = True

    def forward(self, input: Tensor) -> Tensor:
        pattern = self.pattern
        if isinstance(pattern, Planned):
            self._refuse_symbols(input)
            return pattern.multiply(input, self.raw_weight, self.bias)
        gated = self._sampling(input)
        if gated is None:
            return F.linear(input, self._operand(input), self.bias)
        return kernels.gated_linear(
            input,
            self.raw_weight,
            gated.logits,
            self.bias,
            log_gain=gated.log_gain,
            copy=gated.dense,
            impl=gated.impl,
            captured=gated.captured,
            **gated.address(),
        )


class SparseConv2d(SparseLayer, nn.Conv2d):
    """`nn.Conv2d` with a pattern; same signature (stride, padding modes, dilation, groups), same keys."""

    multiplies = True

    def forward(self, input: Tensor) -> Tensor:
        pattern = self.pattern
        if isinstance(pattern, Planned):
            self._refuse_symbols(input)
            if self._pads:
                mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
                input = F.pad(input, self._reversed_padding_repeated_twice, mode)
            if input.ndim == 3:  # one image, as nn.Conv2d takes it
                return pattern.multiply(input[None], self.raw_weight, self.bias).squeeze(0)
            return pattern.multiply(input, self.raw_weight, self.bias)
        gated = self._sampling(input)
        if gated is None:
            return self._conv_forward(input, self._operand(input), self.bias)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            if gated.impl in ("auto", "materialise"):
                return self._conv_forward(input, self._operand(input), self.bias)
            raise ValueError(
                f"impl={gated.impl!r}: expected zero padding given in pixels, got {self.padding!r} and "
                f"{self.padding_mode!r}; use 'auto'"
            )
        return kernels.gated_conv2d(
            input,
            self.raw_weight,
            gated.logits,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            log_gain=gated.log_gain,
            impl=gated.impl,
            captured=gated.captured,
            **gated.address(),
        )

    @property
    def _pads(self) -> bool:
        """Whether the image is padded before the product, since the product only pads zeros evenly."""
        return self.padding_mode != "zeros" or isinstance(self.padding, str)

    def _slide(self) -> dict[str, Any]:
        padding = (0, 0) if self._pads else self.padding
        return {"slide": (*self.stride, *padding, *self.dilation), "groups": self.groups}


class SparseConv1d(SparseLayer, nn.Conv1d):
    """`nn.Conv1d` with a pattern."""


class SparseConv3d(SparseLayer, nn.Conv3d):
    """`nn.Conv3d` with a pattern."""


class SparseConvTranspose1d(SparseLayer, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a pattern; its weight is [k, n / groups, t]."""


class SparseConvTranspose2d(SparseLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a pattern; its weight is [k, n / groups, r, s]."""


class SparseConvTranspose3d(SparseLayer, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a pattern; its weight is [k, n / groups, q, r, s]."""


class SparseBilinear(SparseLayer, nn.Bilinear):
    """`nn.Bilinear` with a pattern; its weight is [n, k1, k2]."""


class SparseEmbedding(SparseLayer, nn.Embedding):
    """`nn.Embedding` with a pattern over its rows.

    Errors: ValueError where `max_norm` would renormalise rows that gates or a plan compute.
    """

    @property
    def _used_elsewhere(self) -> bool:
        return self.shared or self.max_norm is not None  # which takes the norms of whole rows

    def forward(self, input: Tensor) -> Tensor:
        pattern = self.pattern
        if not isinstance(pattern, Masked):
            if self.max_norm is not None and self.weight is not self.raw_weight:
                raise ValueError(
                    "embedding: expected no max_norm under gates and plans, which it would renormalise in vain; "
                    "leave this embedding dense"
                )
            return super().forward(input)
        # The rows asked for alone: a table is far larger than a batch.
        self.look()
        rows = F.embedding(
            input, self.raw_weight, self.padding_idx, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.sparse,
        )  # fmt: skip
        return torch.where(pattern.mask[input], rows, 0)


_KINDS: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv2d: SparseConv2d,
    nn.Conv1d: SparseConv1d,
    nn.Conv3d: SparseConv3d,
    nn.ConvTranspose1d: SparseConvTranspose1d,
    nn.ConvTranspose2d: SparseConvTranspose2d,
    nn.ConvTranspose3d: SparseConvTranspose3d,
    nn.Bilinear: SparseBilinear,
    nn.Embedding: SparseEmbedding,
    NonDynamicallyQuantizableLinear: SparseLinear,  # the output projection of nn.MultiheadAttention
}


@cache
def sparse_type(cls: type[nn.Module]) -> type[SparseLayer] | None:
    """The sparse form of a class of layers; None for what is no layer with a weight matrix.

    A subclass gets a class of its own that is both; one with a forward of its own has to read `self.weight` there.
    """
    if cls in _KINDS:
        return _KINDS[cls]
    if issubclass(cls, SparseLayer) or not issubclass(cls, nn.Module):
        return None
    if _is_hugging_face(cls):
        return _made(SparseLayer, cls)
    for plain, sparse in _KINDS.items():
        if issubclass(cls, plain):
            return _made(SparseLayer if computes_itself(cls) else sparse, cls)
    return None


def computes_itself(cls: type[nn.Module]) -> bool:
    """Whether a class has a forward of its own, other than that of the kind it belongs to."""
    known = any(issubclass(cls, plain) and cls.forward is plain.forward for plain in _KINDS)
    return not known and not _is_hugging_face(cls)


def _is_hugging_face(cls: type) -> bool:
    """Whether this is the Conv1D of GPT-2: a linear layer with its weight as [k, n]."""
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")


def by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the layer's weight's shape with the entries of an output together: [outputs, ...].

    Outputs are features or channels, of an embedding the features of its rows.
    """
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # [k, n / groups, ...], the inputs of a group one after the other.
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    if isinstance(layer, nn.Embedding) or any(map(_is_hugging_face, type(layer).__mro__)):
        return weight.transpose(0, 1)
    return weight


def _made(sparse: type[SparseLayer], cls: type[nn.Module]) -> type[SparseLayer]:
    def reduce(self: SparseLayer, protocol: Any) -> tuple:
        return _new, (cls,), self.__dict__  # a class that is made has no name to find it by

    own = {"__reduce_ex__": reduce, "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Sparse{cls.__name__}", (sparse, cls), own)


def _new(cls: type[nn.Module]) -> SparseLayer:
    made = sparse_type(cls)
    assert made is not None
    return made.__new__(made)
