"""timm: its networks, its optimisers and parameter groups."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import randn, seeded
from integration import check_dense, check_state, check_zeros, moved, package, snapshot, ticketed
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc

timm = package("timm")
optim = package("timm.optim")

X, Y = randn(4, 3, 32, 32), torch.arange(4) % 3
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=3
    ),
    "resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=3),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1),
        num_heads=(2, 4), num_classes=3,
    ),
}  # fmt: skip
each_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> nn.Module:
    return seeded(NETWORKS[name])


def run(model: nn.Module) -> Tensor:
    return model(X)


@pytest.mark.parametrize("search", ["magnitude", "snip", "joint"])
@each_network
def test_a_ticket_is_found(name: str, search: str) -> None:
    model = network(name)
    ticketed(model, torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), 2), search)
    check_dense(model, run)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb", "nadamw"])
@each_network
def test_its_optimizers_keep_pruned_weights_zero(name: str, optimizer: str, tmp_path: Path) -> None:
    model = network(name)
    masks = ticketed(model, [(X, Y)])
    before = snapshot(model)
    stepping = optim.create_optimizer_v2(model, optimizer, lr=1e-2, weight_decay=0.05)
    model.train()
    for _ in range(3):
        stepping.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        stepping.step()
    moved(before, model)
    check_zeros(model, masks)
    check_state(model, lambda: network(name), run, tmp_path / "state.pt")
    check_dense(model, run)


@each_network
def test_weight_decay_groups_are_those_of_the_dense_network(name: str) -> None:
    """Norms and biases without decay, by shape; no parameter is missing."""
    dense = optim.param_groups_weight_decay(network(name), 0.05)
    model = network(name)
    ticketed(model, [(X, Y)])
    masked = optim.param_groups_weight_decay(model, 0.05)

    def sizes(groups: list) -> list:
        return [(g["weight_decay"], sorted(p.numel() for p in g["params"])) for g in groups]

    assert sizes(masked) == sizes(dense)


def test_its_average_keeps_pruned_weights_zero() -> None:
    utils = package("timm.utils")
    model = network("resnet")
    masks = ticketed(model, [(X, Y)])
    average = utils.ModelEmaV3(model, decay=0.5)
    stepping = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        stepping.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        stepping.step()
        average.update(model)
    check_zeros(average.module, masks)
    assert sc.sparse_layers(average.module)
