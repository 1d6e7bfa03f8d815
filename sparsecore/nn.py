"""SparseLinear and SparseConv2d: drop-in layers whose weight is seen through a pattern.

Two modules times any number of patterns.  Reading `layer.weight` gives what the layer computes with
(the pattern applied to the parameter), so code that takes the weight out of a layer and calls the
functional itself - torchvision's Swin attention, the fused evaluation of PyTorch's transformers - is
sparse as well.  The parameter keeps its key `weight` in the state_dict and in `named_parameters()`.
"""

from collections.abc import Container
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from . import kernels
from .patterns import Dense, Formats, Gated, Masked, Planned


class SparseLayer(nn.Module):
    """What SparseLinear and SparseConv2d share: a parameter `weight` behind a `pattern`."""

    pattern: nn.Module

    @property
    def raw_weight(self) -> nn.Parameter:
        """The parameter itself, [n, k] or [n, k, *taps]; under `Planned` the kept weights, [nnz]."""
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

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, whatever the parameter's is."""
        pattern = self.pattern
        planned = isinstance(pattern, Planned)
        return torch.Size(pattern.layer.shape) if planned else self.raw_weight.shape

    @property
    def _channels_last(self) -> bool:
        """Whether the dense weight lies so."""
        pattern, raw = self.pattern, self.raw_weight
        return (
            pattern.channels_last if isinstance(pattern, Planned) else kernels.is_channels_last(raw)
        )

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
        if mask.shape != self.weight_shape:
            raise ValueError(
                f"mask: expected shape {tuple(self.weight_shape)}, got {tuple(mask.shape)}"
            )
        pattern = self._masked(mask)
        self.unplan_()
        self.pattern = pattern.train(self.training)
        with torch.no_grad():
            self.raw_weight.masked_fill_(~self.pattern.mask, 0)
        return self

    def plan_(self, formats: Formats | None = None, choose: Any = None) -> Self:
        """From a mask over a dense parameter to the kept weights alone: pattern `Planned`.

        The parameter object stays and becomes the vector [nnz], so make optimisers afterwards.
        Args: as `Planned` takes them.

        Errors: ValueError for a layer without a mask, a format that cannot do this, or kept weights that are
        not finite; nothing changes then.
        """
        pattern = Planned(
            self._decided_mask(),
            formats,
            **self._slide(),
            choose=choose,
            dtype=self.raw_weight.dtype,
            channels_last=self._channels_last,
        )
        values = pattern.kept(self.weight.detach())
        if not values.isfinite().all():
            raise ValueError(
                "plan_: expected finite kept weights, got NaN or infinity; load sound weights first"
            )
        self._become(pattern, values)
        return self

    def unplan_(self) -> Self:
        """Back from the kept weights to a mask over a dense parameter; no change under other patterns."""
        if isinstance(self.pattern, Planned):
            self._become(Masked(self.pattern.mask), self.weight.detach())
        return self

    def remask_(self, mask: Tensor, grown: Tensor | None = None) -> Tensor:
        """Another mask under the same formats, as dynamic sparse training wants it; returns the old mask.

        Weights that stay keep their values, new ones start at 0 or at their entries in `grown`, of the
        weight's shape.  The parameter object stays.  Errors: ValueError for another shape or no mask.
        """
        old = self.pattern
        if not isinstance(old, Masked | Planned) or mask.shape != self.weight_shape:
            raise ValueError(
                f"remask_: expected a layer with a mask {tuple(self.weight_shape)}, got "
                f"{type(old).__name__} and {tuple(mask.shape)}"
            )
        before, weight = old.mask, self.weight.detach()
        if grown is not None:
            weight = torch.where(before, weight, grown.to(weight))
        if isinstance(old, Planned):
            pattern = old.on(mask.to(weight.device))
            self._become(pattern, pattern.kept(weight))
        else:
            masked = self._masked(mask)
            masked.choice = old.choice
            self._become(masked, weight.where(masked.mask, 0))
        return before

    def _masked(self, mask: Tensor) -> Masked:
        """A pattern whose mask lies in memory as the weight does: their product then does too."""
        planned = isinstance(self.pattern, Planned)
        weight = self.weight.detach() if planned else self.raw_weight
        return Masked(kernels.laid_out_as(mask.to(weight.device), weight).clone())

    def _become(self, pattern: nn.Module, parameter: Tensor) -> None:
        """Another pattern and what the same Parameter object then holds."""
        raw = self.raw_weight
        # Through another dtype, so that autograd forgets the old shape, which a graph that is still alive
        # (the last step's loss) would keep.
        other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
        raw.grad, raw.data = None, parameter.new_empty(0, dtype=other)
        raw.data = parameter
        self.pattern = pattern.train(self.training)

    def _decided_mask(self) -> Tensor:
        if isinstance(self.pattern, Masked | Planned):
            return self.pattern.mask
        raise ValueError(
            f"plan_: expected a layer with a mask, got pattern {type(self.pattern).__name__}; "
            "apply a ticket or call set_mask_ first"
        )

    def _slide(self) -> dict[str, Any]:
        """What a plan knows of a convolution; the layer itself pads the image (`SparseConv2d.forward`)."""
        return {}

    @classmethod
    def from_dense(cls, layer: nn.Module) -> Self:
        """A sparse layer that shares `layer`'s parameters, hooks and settings; its pattern is Dense."""
        if not isinstance(layer, _plain_type(cls)):
            raise TypeError(
                f"{cls.__name__}.from_dense: expected {_plain_type(cls).__name__}, "
                f"got {type(layer).__name__}"
            )
        sparse = as_class(cls, layer)
        sparse.pattern = Dense()
        return sparse

    def to_dense(self) -> nn.Module:
        """A plain layer with the same keys: the pattern is applied to the weight once and dropped.

        A Dense or Masked layer keeps its parameter object (already zero where pruned); a Gated layer
        gets the gates' mean baked in.
        """
        dense = as_class(_plain_type(type(self)), self)
        del dense._modules["pattern"]
        dense._parameters["weight"] = self._baked()
        return dense

    def _baked(self) -> nn.Parameter:
        """A dense parameter of the weight that the layer computes with: its own, where that is dense."""
        raw = self.raw_weight
        if isinstance(self.pattern, Dense):
            return raw
        was_training = self.pattern.training
        with torch.no_grad():
            self.pattern.eval()
            effective = self.weight.clone()
            self.pattern.train(was_training)
        if isinstance(self.pattern, Masked):
            raw.data.copy_(effective)
            return raw
        return nn.Parameter(effective, raw.requires_grad)

    def _weight_at(self, prefix: str) -> str:
        """The weight's key in a state_dict where this layer's keys have a prefix."""
        return prefix + "weight"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # As under a mask, so that a file does not depend on plans.
        if isinstance(self.pattern, Planned):
            destination[self._weight_at(prefix)] = self.weight.detach()
            destination[prefix + "pattern.mask"] = self.pattern.mask

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Topology travels: a checkpoint's mask becomes this layer's; a dense checkpoint keeps ours.
        mask = state_dict.get(prefix + "pattern.mask")
        if isinstance(self.pattern, Planned):
            errors = self._mismatches(state_dict, prefix)
            if errors:  # the vector of kept weights would not tell
                rest[-1].extend(errors)
                return
            state_dict = self._planned_state(state_dict, prefix)
        elif mask is not None and mask.dtype == torch.bool and mask.shape == self.weight_shape:
            self.pattern = self._masked(mask)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if isinstance(self.pattern, Masked):
            with torch.no_grad():
                self.raw_weight.masked_fill_(~self.pattern.mask, 0)

    def _mismatches(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Errors as torch words them, for a weight or mask of another shape."""
        keys = (self._weight_at(prefix), prefix + "pattern.mask")
        found = {key: state_dict.get(key) for key in keys}
        return [
            f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, "
            f"the shape in current model is {self.weight_shape}."
            for key, value in found.items()
            if value is not None and value.shape != self.weight_shape
        ]

    def _planned_state(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Takes over the mask of a masked layer's state; returns the state with the kept weights alone."""
        assert isinstance(self.pattern, Planned)
        key = self._weight_at(prefix)
        mask, weight = state_dict.get(prefix + "pattern.mask"), state_dict.get(key)
        if mask is not None:
            mask = mask.bool().to(self.raw_weight.device)
            if not torch.equal(mask, self.pattern.mask):
                self.remask_(mask)
        return state_dict if weight is None else {**state_dict, key: self.pattern.kept(weight)}


class SparseLinear(SparseLayer, nn.Linear):
    """`nn.Linear` with a pattern; same signature, same keys.  Without a pattern it is exactly nn.Linear."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pattern = Dense()

    def forward(self, input: Tensor) -> Tensor:
        pattern = self.pattern
        if isinstance(pattern, Planned):
            return pattern.multiply(input, self.raw_weight, self.bias)
        gated = self._sampling(input)
        if gated is None:
            return super().forward(input)
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pattern = Dense()

    def forward(self, input: Tensor) -> Tensor:
        pattern = self.pattern
        if isinstance(pattern, Planned):
            if self._pads:
                mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
                input = F.pad(input, self._reversed_padding_repeated_twice, mode)
            if input.ndim == 3:  # one image, as nn.Conv2d takes it
                return pattern.multiply(input[None], self.raw_weight, self.bias).squeeze(0)
            return pattern.multiply(input, self.raw_weight, self.bias)
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


def _plain_type(cls: type) -> type[nn.Module]:
    return nn.Linear if issubclass(cls, nn.Linear) else nn.Conv2d


_Module = TypeVar("_Module", bound=nn.Module)


def as_class(cls: type[_Module], module: nn.Module) -> _Module:
    """A module of another class with the same parameters, submodules, hooks and settings."""
    other = cls.__new__(cls)
    other.__dict__ = module.__dict__.copy()
    for table in ("_parameters", "_buffers", "_modules"):
        other.__dict__[table] = module.__dict__[table].copy()
    return other


def weight_key(layer: str, state: Container[str]) -> str:
    """A layer's weight in a model's state: `<layer>.weight`, or `<layer>_weight` of an attention's projection."""
    key, bare = f"{layer}.weight".lstrip("."), f"{layer}_weight"
    return bare if key not in state and bare in state else key
