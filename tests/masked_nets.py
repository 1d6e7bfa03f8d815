"""Small networks under masks, for the tests of dynamic sparse training."""

import torch
from helpers import mlp, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.training import Recipe

SGD = Recipe(optimizer="sgd", lr=0.05, weight_decay=0.01, batch=64, epochs=4)
ADAMW = Recipe(optimizer="adamw", lr=0.01, weight_decay=0.1, batch=64, epochs=4)


def sparse_mlp() -> nn.Module:
    return sc.sparsify_(mlp())


def batchnorm_net() -> nn.Module:
    """Convolution, BatchNorm and dropout on the blobs."""
    return sc.sparsify_(
        seeded(
            lambda: nn.Sequential(
                nn.Unflatten(1, (3, 2, 2)),
                nn.Conv2d(3, 8, 2),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Flatten(),
                nn.Linear(8, 4),
            )
        )
    )


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: layer.raw_weight.shape for name, layer in sc.sparse_layers(model).items()}


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    for name, layer in sc.sparse_layers(model).items():
        layer.set_mask_(masks[name])
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
