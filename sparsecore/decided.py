"""What happens to a sparse layer's mask once it is decided: fixed, planned, changed."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from typing_extensions import Self

from . import kernels
from .interrupts import signals_later
from .kinds import checked
from .patterns import Formats, Masked, Planned
from .process import leaving_trainable
from .zeros import Keeper, is_sharded, plain_python, require_one_mask, zero_outside_

_LEAVE_ZEROS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)  # they scale


class DecidedLayer(nn.Module):
    """The half of a SparseLayer that decides its mask, and keeps its parameter at it."""

    # What the other half has.
    pattern: nn.Module
    multiplies: bool
    raw_weight: Any
    effective_weight: Any
    weight_shape: Any
    _channels_last: Any
    leader: Any
    _parametrizations: Any
    _require_parameter: Any

    # Whether modules other than sparse layers compute with the parameter.
    shared = False

    @leaving_trainable
    @checked
    def set_mask_(self, mask: Tensor) -> Self:
        """Fixes the mask (bool, the weight's shape) and zeroes the pruned entries for good.

        Errors: ValueError for another shape or a weight that another tool computes, TypeError for another
        dtype; nothing changes then.
        """
        self._require_parameter("set_mask_")
        if mask.shape != self.weight_shape:
            raise ValueError(
                f"mask: expected shape {tuple(self.weight_shape)}, got {tuple(mask.shape)}"
            )
        self.require_one_mask(mask)
        pattern = self._masked(mask)
        with signals_later():
            self.unplan_()
            self._decide(pattern)
        return self

    def require_one_mask(self, mask: Tensor) -> None:
        """Errors: ValueError where another layer, of whatever model, keeps this weight at another mask."""
        if isinstance(self.raw_weight, nn.Parameter):
            mine = self.pattern.keeper if isinstance(self.pattern, Masked) else None
            require_one_mask(self.raw_weight, mask, mine)

    def _decide(self, pattern: Masked) -> None:
        """This mask from now on: of the weight, of its gradient, of whoever reads and steps them."""
        raw = self.raw_weight
        pattern.decided = True
        self.pattern = pattern.train(self.training)
        if is_sharded(raw):
            return  # each forward masks what ranks put together
        if raw.grad is not None and raw.grad.layout == torch.strided:
            zero_outside_(raw.grad, pattern.mask)
        if not self._kept_by(pattern):
            zero_outside_(raw.data, pattern.mask)

    @leaving_trainable
    def plan_(self, formats: Formats | None = None, choose: Any = None) -> Self:
        """From a mask over a dense parameter to the kept weights alone: pattern `Planned`.

        The parameter object stays and becomes the vector [nnz], so make optimisers afterwards.
        Args: as `Planned` takes them.

        Errors: ValueError for a layer without a mask, a format that cannot do this, or kept weights that are
        not finite; nothing changes then.
        """
        mask = self._decided_mask()
        self._require_parameter("plan_")
        pattern = Planned(
            mask,
            formats,
            **self._slide(),
            choose=choose,
            dtype=self.raw_weight.dtype,
            channels_last=self._channels_last,
            multiplies=self.multiplies,
        )
        values = pattern.kept(self.effective_weight.detach())
        if not values.isfinite().all():
            raise ValueError(
                "plan_: expected finite kept weights, got NaN or infinity; load sound weights first"
            )
        self._become(pattern, values)
        return self

    @leaving_trainable
    def unplan_(self) -> Self:
        """Back from the kept weights to a mask over a dense parameter; no change under other patterns."""
        if isinstance(self.pattern, Planned):
            pattern, weight = Masked(self.pattern.mask), self.effective_weight.detach()
            with signals_later():
                self._become(pattern, weight)
                self._decide(pattern)
        return self

    @leaving_trainable
    @checked
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
        self._require_parameter("remask_")
        self.require_one_mask(mask)
        before, weight = old.mask, self.effective_weight.detach()
        if grown is not None:
            weight = torch.where(before, weight, grown.to(weight))
        if isinstance(old, Planned):
            pattern = old.on(mask.to(weight.device))
            self._become(pattern, pattern.kept(weight))
        else:
            masked = self._masked(mask)
            masked.choice = old.choice
            # In its place: the hooks of others (several ranks' reducer) hang on the parameter.
            self.raw_weight.data.copy_(weight)
            self.raw_weight.grad = None
            self._decide(masked)
        return before

    def _masked(self, mask: Tensor) -> Masked:
        """A pattern whose mask lies in memory as the weight does: their product then does too."""
        planned = isinstance(self.pattern, Planned)
        weight = self.effective_weight.detach() if planned else self.raw_weight
        if weight.is_meta:  # values come later, a mask has some now
            return Masked(mask.clone())
        return Masked(kernels.laid_out_as(mask.to(weight.device), weight).clone())

    def _become(self, pattern: nn.Module, parameter: Tensor) -> None:
        """Another pattern and what the same Parameter object then holds."""
        raw = self.raw_weight
        # Through another dtype, so that autograd forgets the old shape, which a graph that is still alive
        # (the last step's loss) would keep.
        other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
        with signals_later():
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

    def _kept_by(self, pattern: Masked) -> bool:
        """Whether the parameter is this layer's to keep at its mask; sees to it that it is kept."""
        raw = self.raw_weight
        if (
            not isinstance(raw, nn.Parameter)
            or raw.is_inference()
            or raw.shape != pattern.mask.shape
        ):
            return False  # a functional call's, another tool's
        if pattern.keeper is None:
            pattern.keeper = Keeper(_still(self.leader or self, pattern), self._used_elsewhere)
        return pattern.keeper.keep(raw, pattern.mask)

    @property
    def _used_elsewhere(self) -> bool:
        return self.shared

    def look(self) -> None:
        """Sees to it that pruned places of the parameter are zero, under a decided mask."""
        self._look(self.pattern, self.raw_weight)

    def _look(self, pattern: nn.Module, raw: Tensor) -> None:
        if not (isinstance(pattern, Masked) and pattern.decided and plain_python()):
            return
        if (keeper := pattern.keeper) is not None and keeper.knows(raw, pattern.mask):
            return  # in nearly every forward
        if not self._kept_by(pattern) and self._parametrizations():
            self._check_parametrized(pattern)

    def _check_parametrized(self, pattern: Masked) -> None:
        """Errors: ValueError for a parametrisation that fills pruned places: `layer.weight` would not be what the
        layer computes with.  A host sync, but for those that are known to leave zeros.
        """
        if all(type(by) in _LEAVE_ZEROS for by in self._parametrizations()):
            return
        raw = self.raw_weight.detach()
        if raw.shape == pattern.mask.shape and raw.masked_fill(pattern.mask, 0).any():
            raise ValueError(
                "masked layer: expected a parametrisation that leaves pruned places zero (weight_norm, prune), got one "
                "that fills them; remove it, or call sparsecore.densify_(model) first"
            )


def _still(layer: DecidedLayer, pattern: Masked) -> Callable[..., bool]:
    """Whether the layer still has that pattern (and that parameter), asked by who must not keep them alive."""
    layer_, pattern_ = weakref.ref(layer), weakref.ref(pattern)

    def still(parameter: Tensor | None = None) -> bool:
        layer, pattern = layer_(), pattern_()
        if layer is None or layer.pattern is not pattern:
            return False
        return parameter is None or layer.raw_weight is parameter

    return still
