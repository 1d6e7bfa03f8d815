"""A model that is used for a while and given back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .interrupts import ending_with
from .patterns import PATTERNS


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """On leaving, modes and buffers (running statistics, a forward's own counts) are what they were, and so are
    embeddings whose rows a forward renormalises.  Patterns are left to those who set them.
    """
    modes = {module: module.training for module in model.modules()}
    renormalised = {
        module: weight.detach().clone()
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter)
    }
    buffers = {m: m._buffers.copy() for m in model.modules() if not isinstance(m, PATTERNS)}
    held = {b for own in buffers.values() for b in own.values() if b is not None and not is_lazy(b)}
    values = {b: b.detach().clone() for b in held}

    def put_back() -> None:
        for module, own in buffers.items():  # a forward may have put others there
            module._buffers.update(own)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)
            for module, weight in renormalised.items():
                module._parameters["weight"].copy_(weight)  # pyright: ignore

    with ending_with(put_back):
        yield
