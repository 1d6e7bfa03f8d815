"""Forwards that go around the sparse layers: by dense layers from before `sparsify_` that a model still refers to."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..batches import on, parts_of
from ..calls import fits, forward
from ..convert import batch_statistics, sparse_layers
from ..losses import Loss
from ..process import seeded
from .protocol import SearchError


def left_behind(model: nn.Module) -> dict[nn.Module, str]:
    """Dense layers that modules refer to otherwise than as submodules, with the sparse layer whose weight they hold."""
    names = {id(layer.raw_weight): name for name, layer in sparse_layers(model).items()}
    known = set(map(id, model.modules()))
    found = {}
    for module in model.modules():
        for value in vars(module).values():
            for other in _modules_in(value):
                held = [names[id(p)] for p in other._parameters.values() if id(p) in names]
                if id(other) not in known and held:
                    found[other] = held[0]
    return found


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Modules in an attribute, in containers and within each other."""
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif depth and isinstance(value, (Mapping, list, tuple, set)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _modules_in(inner, depth - 1)


@torch.no_grad()
def require_through(model: nn.Module, dense: dict[nn.Module, str], batch: Any, loss: Loss) -> None:
    """Errors: SearchError where a forward on the batch calls a layer that was left behind."""
    called: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        if module in dense:  # a sparse layer has its hooks from the dense one
            called.append(dense[module])

    hooks = [layer.register_forward_pre_hook(note) for layer in dense]
    device = next(model.parameters()).device
    batch = on(device, batch)
    try:
        with batch_statistics(model), seeded(devices=[device]):
            if loss.takes_model and not fits(model, parts_of(batch)[0]):
                loss(model, batch)
            else:
                forward(model, parts_of(batch)[0])
    finally:
        for hook in hooks:
            hook.remove()
    if called:
        names = ", ".join(dict.fromkeys(called))
        raise SearchError(
            f"model: expected a forward that calls its sparse layers, got one that calls dense layers from before "
            f"sparsify_ in place of {names}, kept in a list or another attribute; hold them in an nn.ModuleList, or "
            "call sparsify_ before they are put there"
        )
