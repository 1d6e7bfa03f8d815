"""BatchNorm's running statistics, for weights that no training led to."""

from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import on, parts_of
from .calls import forward
from .claims import sole
from .interrupts import ending_with
from .loaders import batches_of


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that evaluate with running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@sole("recompute_statistics_")
def recompute_statistics_(model: nn.Module, batches: Any, *, limit: int = 20) -> nn.Module:
    """Measures all running statistics anew: their mean over the first batches of epoch 0; returns the model.

    Weights that were interpolated, averaged or pruned need it, since the statistics they came with are
    others' (Izmailov et al. 2018, arXiv 1803.05407).  Whatever else behaves differently in training, such as
    dropout, is off.  Modes and momenta are put back, after an error statistics too; a model without is left alone.

    Args:
        batches: of training data, as `loaders.batches_of` takes them.
        limit: how many of them at most; each counts the same.

    Errors: ValueError if there is no batch to measure on, for statistics that are not finite, or for a model that
    another thread works with.
    """
    norms = running_norms(model)
    if not norms:
        return model
    batches = batches_of(batches, model, empty=True)
    if min(limit, len(batches)) < 1:
        raise ValueError(
            f"recompute_statistics_: expected at least one batch, got {len(batches)} of them and "
            f"limit={limit}"
        )
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    buffers = [(b, b.clone()) for norm in norms for b in norm._buffers.values() if b is not None]
    done = False

    def put_back() -> None:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in () if done else buffers:
            buffer.copy_(value)

    with ending_with(put_back):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
            norm.train()
        with torch.no_grad():
            device = next(model.parameters()).device
            for batch in islice(batches.epoch(0), limit):
                forward(model, on(device, parts_of(batch)[0]))
        if not all(b.isfinite().all() for b, _ in buffers):
            raise ValueError(
                "recompute_statistics_: expected activations with finite statistics, got others; check the data and "
                "the weights"
            )
        done = True
    return model
