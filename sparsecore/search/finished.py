"""Tickets that are used as they are: what they need besides masks and weights."""

import copy
from dataclasses import replace

from torch import nn

from ..batches import EpochBatches
from ..batchnorm import recompute_statistics_, running_norms
from ..tickets import Ticket


def finished(ticket: Ticket, model: nn.Module, batches: EpochBatches) -> Ticket:
    """The ticket marked as finished, with BatchNorm statistics of its own network in its weights.

    A mask changes what every layer gives, so the dense network's running statistics would not do.
    """
    meta = ticket.meta | {"finished": True}
    if not running_norms(model):
        return replace(ticket, meta=meta)
    network = Ticket(ticket.masks, ticket.weights).apply_(copy.deepcopy(model))
    recompute_statistics_(network, batches)
    own = {k: b.detach().cpu().clone() for k, b in network.named_buffers() if k in ticket.weights}
    return replace(ticket, weights=dict(ticket.weights) | own, meta=meta)
