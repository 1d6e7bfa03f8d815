"""torchvision: segmentation, whose output is a dict; and regression, whose targets are no classes."""

from pathlib import Path

import pytest
import torch
from helpers import randn, seeded
from integration import check_dense, check_state, check_zeros, moved, package, snapshot, ticketed
from torch import Tensor, nn
from torch.nn import functional as F

torchvision = package("torchvision")

X = randn(2, 3, 32, 32)
LABELS = (X[:, 0] > 0).long()


def deeplab() -> nn.Module:
    def build() -> nn.Module:
        return torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=2
        )

    return seeded(build)


def run(model: nn.Module) -> Tensor:
    return model(X)["out"]


@pytest.mark.parametrize("search", ["magnitude", "snip", "joint"])
def test_segmentation(search: str, tmp_path: Path) -> None:
    model = deeplab()
    masks = ticketed(model, [(X, LABELS)], search)
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(run(model), LABELS).backward()
        optimizer.step()
    moved(before, model)
    check_zeros(model, masks)
    check_state(model, deeplab, run, tmp_path / "state.pt")
    check_dense(model, run)


@pytest.mark.parametrize("search", ["magnitude", "snip", "joint"])
def test_regression(search: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)))
    x = randn(64, 6)
    y = x.sum(1, keepdim=True)
    batches = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), 16)
    masks = ticketed(model, batches, search, loss="mse")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = F.mse_loss(model(x), y).item()
    for _ in range(50):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert F.mse_loss(model(x), y).item() < first
    check_zeros(model, masks)
    check_dense(model, lambda model: model(x))
