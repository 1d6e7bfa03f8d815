"""Small runs of each kind: images that lie where they are computed, points from a loader, masks and plans."""

from collections.abc import Callable

import pytest
import torch
from helpers import Blobs, randn, seeded
from torch import nn

import sparsecore as sc
from sparsecore.data import Batches, Dataset, Split
from sparsecore.engine import auto
from sparsecore.recipe import Recipe

RECIPE = Recipe(optimizer="adam", lr=1e-2, batch=4, epochs=2, ema=0.9, clip_norm=1.0)


def small_data(count: int = 18) -> Dataset:
    """Images of 18 samples: batches of 4, the last one of 2."""
    images = (64 * randn(count, 1, 6, 6).abs()).clamp_max(255).to(torch.uint8)
    split = Split(images, torch.arange(count) % 4)
    return Dataset("small", split, split, 4, (1, 6, 6), (0.5,), (0.25,), flip_crop=True)


def resident() -> Batches:
    return Batches(small_data(), "train", 4, seed=1, augment=True)


def loaded() -> Blobs:
    return Blobs(count=18, batch=4)


def images() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(96, 4),
        )
    )  # fmt: skip


def points() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(12, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
        )
    )


def masked(build: Callable[[], nn.Module], plan: str = "mask") -> nn.Module:
    model = sc.sparsify_(build())
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(randn(*layer.raw_weight.shape, seed=3) > 0.3)
    return sc.plan_(model, plan)


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


def always(monkeypatch: pytest.MonkeyPatch, compiles: float = 0.0) -> None:
    """Trials in short runs too, and a way of `compiles` seconds is tried."""
    monkeypatch.setattr(auto, "FEW", 1)
    monkeypatch.setattr(auto, "SHORT", 0.0)
    monkeypatch.setattr(auto, "COMPILES", compiles)
