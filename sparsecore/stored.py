"""How a sparse layer stands in a state_dict: a dense `weight` and `pattern.mask`, whatever its plan is."""

from typing import Any

import torch
from torch import nn

from .computed import StateWeight
from .patterns import Masked, Planned
from .zeros import SHARDED, is_sharded


class StoredLayer(nn.Module):
    """The half of a SparseLayer that files see."""

    # What the other half has.
    pattern: nn.Module
    seen_weight: Any
    effective_weight: Any
    raw_weight: Any
    weight_shape: Any
    _masked: Any
    _decide: Any
    remask_: Any
    require_one_mask: Any

    def _weight_at(self, prefix: str) -> str:
        """The weight's key in a state_dict where this layer's keys have a prefix."""
        return prefix + "weight"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if isinstance(self.pattern, Masked):
            self.seen_weight()  # which puts zeros in their places
        elif isinstance(self.pattern, Planned) and is_sharded(self.raw_weight):
            raise ValueError(f"state_dict of a plan: {SHARDED} (plan_(model, 'mask'))")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # As under a mask, so that a file does not depend on plans.
        if isinstance(self.pattern, Planned):
            destination[self._weight_at(prefix)] = StateWeight.of(self.effective_weight.detach())
            destination[prefix + "pattern.mask"] = self.pattern.mask

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Topology travels: a checkpoint's mask becomes this layer's; a dense checkpoint keeps ours.
        state_dict = understood(state_dict, prefix, self._weight_at(prefix))
        mask = state_dict.get(prefix + "pattern.mask")
        if errors := self._mismatches(state_dict, prefix) + self._masked_elsewhere(mask):
            rest[-1].extend(errors)
            return
        if isinstance(self.pattern, Planned):
            state_dict = self._planned_state(state_dict, prefix)
        elif mask is not None:
            pattern = self._masked(mask)
            pattern.decided = True
            self.pattern = pattern
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if isinstance(self.pattern, Masked):
            self._decide(self.pattern)

    def _masked_elsewhere(self, mask: Any) -> list[str]:
        """The error of a mask that another layer of this weight does not have."""
        try:
            if mask is not None:
                self.require_one_mask(mask)
        except ValueError as error:
            return [str(error)]
        return []

    def _mismatches(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Errors for a mask of other values, and as torch words them for a weight or mask of another shape."""
        keys = (self._weight_at(prefix), prefix + "pattern.mask")
        found = {key: state_dict.get(key) for key in keys}
        mask = found[keys[1]]
        if mask is not None and mask.dtype != torch.bool:
            return [f"{keys[1]}: expected a mask of 0 and 1, got {mask.dtype} with other values"]
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
            mask = mask.to(self.raw_weight.device)
            if not torch.equal(mask, self.pattern.mask):
                self.remask_(mask)
        return state_dict if weight is None else {**state_dict, key: self.pattern.kept(weight)}


def understood(state_dict: dict[str, Any], prefix: str, key: str) -> dict[str, Any]:
    """A layer's state with a mask as ours: that of `torch.nn.utils.prune`, or one that a cast has made numbers."""
    ours = prefix + "pattern.mask"
    mask = state_dict.get(ours)
    if mask is not None and mask.dtype != torch.bool and ((mask == 0) | (mask == 1)).all():
        return state_dict | {ours: mask != 0}
    original, mask = (state_dict.get(f"{key}{end}") for end in ("_orig", "_mask"))
    if original is None or mask is None or key in state_dict or original.shape != mask.shape:
        return state_dict
    state_dict = {k: v for k, v in state_dict.items() if k not in (f"{key}_orig", f"{key}_mask")}
    kept = mask != 0
    return state_dict | {key: original.where(kept, 0), ours: kept}
