"""SparseLinear and SparseConv2d: drop-in layers whose weight is seen through a pattern.

Two modules times any number of patterns.  Reading `layer.weight` gives what the layer computes with
(the pattern applied to the parameter), so code that takes the weight out of a layer and calls the
functional itself - torchvision's Swin attention, `nn.MultiheadAttention`'s output projection - is
sparse as well.  The parameter keeps its key `weight` in the state_dict and in `named_parameters()`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import kernels
from .patterns import Dense, Gated, Masked


class SparseLayer(nn.Module):
    """What SparseLinear and SparseConv2d share: a parameter `weight` behind a `pattern`."""

    pattern: nn.Module

    @property
    def raw_weight(self) -> nn.Parameter:
        """The parameter itself, [n, k] or [n, k, *taps]."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight the layer computes with."""
        # nn.Module registers a parameter only if the attribute is absent: say so until it is there.
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self.pattern(self.raw_weight)

    def _sampling(self, x: Tensor) -> Gated | None:
        """The pattern, if `kernels.gated_linear` and `gated_conv2d` compute with it."""
        pattern = self.pattern
        if not isinstance(pattern, Gated) or not pattern.samples:
            return None
        # On the CPU there is nothing to choose among, and the pattern itself keeps z for the backward.
        return pattern if x.is_cuda or pattern.impl != "auto" else None

    def set_mask_(self, mask: Tensor) -> Self:
        """Fixes the mask (bool, the weight's shape) and zeroes the pruned entries for good.

        Errors: ValueError for another shape, TypeError for another dtype; nothing changes then.
        """
        if mask.shape != self.raw_weight.shape:
            raise ValueError(
                f"mask: expected shape {tuple(self.raw_weight.shape)}, got {tuple(mask.shape)}"
            )
        self.pattern = Masked(mask.to(self.raw_weight.device).clone())
        with torch.no_grad():
            self.raw_weight.masked_fill_(~self.pattern.mask, 0)
        return self

    @classmethod
    def from_dense(cls, layer: nn.Module) -> Self:
        """A sparse layer that shares `layer`'s parameters, hooks and settings; its pattern is Dense."""
        if not isinstance(layer, _plain_type(cls)):
            raise TypeError(
                f"{cls.__name__}.from_dense: expected {_plain_type(cls).__name__}, "
                f"got {type(layer).__name__}"
            )
        sparse = cls.__new__(cls)
        sparse.__dict__ = layer.__dict__.copy()
        for table in ("_parameters", "_buffers", "_modules"):
            sparse.__dict__[table] = layer.__dict__[table].copy()
        sparse.pattern = Dense()
        return sparse

    def to_dense(self) -> nn.Module:
        """A plain layer with the same keys: the pattern is applied to the weight once and dropped.

        A Dense or Masked layer keeps its parameter object (already zero where pruned); a Gated layer
        gets the gates' mean baked in.
        """
        plain = _plain_type(type(self))
        dense = plain.__new__(plain)
        dense.__dict__ = self.__dict__.copy()
        for table in ("_parameters", "_buffers", "_modules"):
            dense.__dict__[table] = self.__dict__[table].copy()
        del dense._modules["pattern"]
        if not isinstance(self.pattern, Dense):
            was_training = self.pattern.training
            with torch.no_grad():
                self.pattern.eval()
                effective = self.weight.clone()
                self.pattern.train(was_training)
            if isinstance(self.pattern, Masked):
                self.raw_weight.data.copy_(effective)
            else:
                requires_grad = self.raw_weight.requires_grad
                dense._parameters["weight"] = nn.Parameter(effective, requires_grad)
        return dense

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Topology travels: a checkpoint's mask makes this layer Masked; a dense checkpoint keeps ours.
        mask = state_dict.get(prefix + "pattern.mask")
        if mask is not None and mask.dtype == torch.bool and mask.shape == self.raw_weight.shape:
            self.pattern = Masked(mask.to(self.raw_weight.device).clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if isinstance(self.pattern, Masked):
            with torch.no_grad():
                self.raw_weight.masked_fill_(~self.pattern.mask, 0)


class SparseLinear(SparseLayer, nn.Linear):
    """`nn.Linear` with a pattern; same signature, same keys.  Without a pattern it is exactly nn.Linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pattern = Dense()

    def forward(self, input: Tensor) -> Tensor:
        gated = self._sampling(input)
        if gated is None:
            return super().forward(input)
        return kernels.gated_linear(
            input,
            self.raw_weight,
            gated.logits,
            self.bias,
            log_gain=gated.log_gain,
            impl=gated.impl,
            **gated.address(),
        )


class SparseConv2d(SparseLayer, nn.Conv2d):
    """`nn.Conv2d` with a pattern; same signature (stride, padding modes, dilation, groups), same keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pattern = Dense()

    def forward(self, input: Tensor) -> Tensor:
        gated = self._sampling(input)
        if gated is None:
            return super().forward(input)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            if gated.impl in ("auto", "materialise"):
                return super().forward(input)
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
            **gated.address(),
        )


def _plain_type(cls: type) -> type[nn.Module]:
    return nn.Linear if issubclass(cls, nn.Linear) else nn.Conv2d
