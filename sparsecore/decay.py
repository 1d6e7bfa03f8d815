"""Weight decay by groups, under any plan."""

import math
from typing import Any

from torch import nn

from .kinds import checked
from .layer import SparseLayer


@checked
def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weights decay, biases and normalisation do not.

    The usual rule is that what has two dimensions or more decays.  Under a plan a weight is the vector of its kept
    entries and has one; here it counts as the matrix that it is.

        torch.optim.AdamW(sparsecore.decay_groups(model, 0.05), lr=1e-3)

    Args:
        weight_decay: of the first group; the other has 0.

    Errors: ValueError for a decay below 0 or that is no number.

    Returns the groups that have parameters, of those that require gradients, each parameter once.
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: expected a number of at least 0, got {weight_decay}")
    matrices = {
        id(layer.raw_weight)
        for layer in model.modules()
        if isinstance(layer, SparseLayer) and len(layer.weight_shape) >= 2
    }
    decaying, rest = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 or id(parameter) in matrices
            (decaying if decays else rest).append(parameter)
    groups = ((decaying, weight_decay), (rest, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]
