"""Scores: rank every weight once, keep the best.  `Score = (model, batches, seed) -> {layer: [weight's shape]}`."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import Batch
from .convert import batch_statistics, require_dense_parameters

Score = Callable[[nn.Module, Iterable[Batch], int], dict[str, Tensor]]


def random(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """Uniform noise: the floor that any method has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(layer.raw_weight.shape, generator=generator).to(layer.raw_weight.device)
        for name, layer in require_dense_parameters(model).items()
    }


def magnitude(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """|theta|."""
    layers = require_dense_parameters(model)
    return {name: layer.raw_weight.detach().abs() for name, layer in layers.items()}


def snip(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """|dL/dtheta * theta| with the loss averaged over one pass of `batches` (Lee, Ajanthan & Torr 2019).

    More data than the paper's single batch only makes this baseline stronger.
    """
    layers = require_dense_parameters(model)
    weights = [layer.raw_weight for layer in layers.values()]
    required = [w.requires_grad for w in weights]
    for w in weights:
        w.requires_grad_()
    total = [torch.zeros_like(w) for w in weights]
    try:
        with batch_statistics(model):
            for x, y in batches:
                loss = F.cross_entropy(model(x), y)
                for t, g in zip(total, torch.autograd.grad(loss, weights), strict=True):
                    t += g
    finally:
        for w, flag in zip(weights, required, strict=True):
            w.requires_grad_(flag)
    return {name: (t * w.detach()).abs() for name, t, w in zip(layers, total, weights, strict=True)}


SCORES: dict[str, Score] = {"random": random, "magnitude": magnitude, "snip": snip}
