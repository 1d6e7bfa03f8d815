"""A small search by rounds, and data that die."""

from collections.abc import Iterator

import torch
from helpers import Blobs, mlp, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.search.rewinding import Rewinding
from sparsecore.training import Recipe

RECIPE = Recipe(optimizer="adam", lr=1e-2, batch=64, milestones=(0.5,))


SEARCH = Rewinding(RECIPE, epochs=2)


WEIGHTS = 384  # of helpers.mlp: 12 * 24 + 24 * 4


def small() -> nn.Module:
    return sc.sparsify_(mlp())


def batchnorm_net() -> nn.Module:
    net = seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)),
            nn.Conv2d(3, 8, 2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
    )
    return sc.sparsify_(net)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


def kept(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def under(masks: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A dense state with +0 where masks remove."""
    weights = {f"{n}.weight": state[f"{n}.weight"].where(m, 0) for n, m in masks.items()}
    return {**state, **weights}


class Killed(BaseException):
    """A process that dies: nothing may catch it."""


class Stops(Blobs):
    """Batches whose process dies at one of them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def epoch(self, index: int) -> Iterator[Batch]:
        for batch in super().epoch(index):
            self.left -= 1
            if self.left < 0:
                raise Killed
            yield batch
