"""What a search would refuse once hours of training have led to its rewind point: told before."""

from typing import Any

import torch
from torch import Tensor, nn

from .convert import require_sparse_layers
from .objectives import Net, features
from .recipe import MOST_EPOCHS
from .scores import grasp
from .search import Iterative, OneShot, Rewinding
from .sparsities import by_layer, check_possible, check_sparsity


def check_search(search: Any, model: nn.Module, sparsity: float, x: Tensor) -> None:
    """Does nothing to the model, whose weights may be any.

    Args:
        search: a `search.Search`.
        x: a few of the images that it will see, [B, C, H, W], where the model is.

    Errors: ValueError for a ticket that no scores could give, a number out of the search's range and an objective that
    the model does not suit; RuntimeError for a model that cannot be differentiated twice, where that is asked for.
    """
    layers = require_sparse_layers(model)
    if check_sparsity(sparsity) == 0 and not isinstance(search, OneShot | Iterative):
        raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
    shapes = {name: layer.weight_shape for name, layer in layers.items()}
    if isinstance(search, Rewinding):
        search.count(sparsity)
    for told in ("gate_for", "ramp_for"):  # what a field that is null leaves to the method
        getattr(search, told, lambda _: None)(sparsity)
    distribution = search.distribution if isinstance(search, OneShot) else None
    densities = by_layer(distribution, shapes, sparsity, search.granularity)
    check_possible(shapes, sparsity, search.granularity, densities)
    said = getattr(search, "epochs_for", None)
    epochs = getattr(search, "epochs", 0) if said is None else said(sparsity)
    if not epochs <= MOST_EPOCHS:
        raise ValueError(f"search epochs: expected at most {MOST_EPOCHS:,}, got {epochs:,}")
    objective = getattr(search, "objective", None)
    if objective == features:
        with Net(model).activations():
            pass
    if getattr(objective, "second_order", False) or getattr(search, "score", None) is grasp:
        _differentiate_twice(model, [layer.raw_weight for layer in layers.values()], x)


def _differentiate_twice(model: nn.Module, weights: list[nn.Parameter], x: Tensor) -> None:
    training = [module for module in model.modules() if module.training]
    model.eval()  # nothing is drawn, and statistics stay
    try:
        first = torch.autograd.grad(
            model(x).square().sum(), weights, create_graph=True, allow_unused=True
        )
        found = [g.square().sum() for g in first if g is not None and g.requires_grad]
        if found:
            torch.autograd.grad(torch.stack(found).sum(), weights, allow_unused=True)
    finally:
        for module in training:
            module.training = True
