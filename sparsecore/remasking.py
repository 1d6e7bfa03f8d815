"""Other masks for a model that trains, as dynamic sparse training wants them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .batches import kind_of
from .claims import sole
from .convert import sparse_layers
from .patterns import Planned
from .plans import mask_of
from .ranks import require_equal_ranks


@sole("remask_", whole=True)
def remask_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Other masks for masked or planned layers, as dynamic sparse training wants them; returns the model.

    Weights that stay keep their values and, in every state tensor that `optimizer` holds for them, their
    entries; what has grown starts at 0.  Formats stay, nothing is measured anew.  Averages of a planned model
    (EMA) and optimisers that are not given hold the old places: make them anew.

    Errors: ValueError for a layer that is not there or has no mask, a mask of another shape or dtype, masks that
    differ between the ranks of a process group, a model that another thread works with; nothing changes then.
    """
    layers = sparse_layers(model)
    require_equal_ranks(masks)
    for name, mask in masks.items():
        plain = isinstance(mask, Tensor) and mask.layout == torch.strided
        if not plain or mask.dtype != torch.bool:
            found = (
                (mask.dtype if plain else mask.layout)
                if isinstance(mask, Tensor)
                else kind_of(mask)
            )
            raise ValueError(f"remask_: expected a bool tensor for {name}, got {found}")
        layer = layers.get(name)
        if layer is None or mask_of(layer) is None or mask.shape != layer.weight_shape:
            found = (
                "no such layer"
                if layer is None
                else f"{layer.pattern}, {tuple(layer.weight_shape)}"
            )
            raise ValueError(
                f"remask_: expected a layer {name} with a mask of shape {tuple(mask.shape)}, got {found}"
            )
        layer.require_one_mask(mask)
    for name, mask in masks.items():
        layer = layers[name]
        old, size = layer.pattern, layer.raw_weight.shape
        stay = layer.remask_(mask) & mask.to(layer.raw_weight.device)
        new = layer.pattern
        slots = {} if optimizer is None else optimizer.state.get(layer.raw_weight, {})
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == size:
                if isinstance(new, Planned):
                    slots[slot] = new.kept(old(value))
                else:
                    value.masked_fill_(~stay, 0)
    return model
