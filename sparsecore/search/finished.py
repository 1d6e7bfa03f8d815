"""Tickets that are used as they are: the weights they are searched in, and what they need besides masks."""

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..batches import EpochBatches
from ..batchnorm import recompute_statistics_, running_norms
from ..convert import sparse_layers
from ..copies import copied
from ..tickets import Ticket

WEIGHTS = ("signed-constant", "scaled", "as-is")


def check_weights(weights: str) -> None:
    """ValueError for weights that `searched_in` does not know."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")


def searched_in(model: nn.Module, weights: str, densities: Mapping[str, float]) -> nn.Module:
    """A frozen copy with the weights that are searched in.

    "signed-constant": sign(w) * sqrt(2 / fan_in); "scaled": the same times sqrt(1 / density) of the layer, so that
    the signal keeps its size when the others are gone (Ramanujan et al. 2020); "as-is": the model's own.
    """
    frozen = copied(model).requires_grad_(False)
    if weights != "as-is":
        for name, layer in sparse_layers(frozen).items():
            weight = layer.raw_weight
            density = densities[name] if weights == "scaled" else 1
            weight.sign_().mul_(math.sqrt(2 / (weight[0].numel() * density)))
    return frozen


def finished(ticket: Ticket, model: nn.Module, batches: EpochBatches) -> Ticket:
    """The ticket marked as finished, with BatchNorm statistics of its own network in its weights.

    A mask changes what every layer gives, so the dense network's running statistics would not do.
    """
    meta = ticket.meta | {"finished": True}
    if not running_norms(model):
        return replace(ticket, meta=meta)
    network = Ticket(ticket.masks, ticket.weights).apply_(copied(model))
    recompute_statistics_(network, batches)
    own = {
        k: b.detach().cpu().clone()
        for k, b in network.named_buffers(remove_duplicate=False)
        if k in ticket.weights
    }
    return replace(ticket, weights=dict(ticket.weights) | own, meta=meta)
