"""Compaction is exact on networks as people use them, and on random ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from exactness import assert_close, assert_exact, kept, ticketed
from helpers import generator, rand, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import sparsecore as sc
from sparsecore.compaction import compact
from sparsecore.models.resnet_cifar import ResNet


def small_lenet() -> nn.Module:
    return sc.models.lenet_300_100((1, 8, 8), 10)


def conv_4_like() -> nn.Module:
    """Conv-4 with fewer channels."""
    layers: list[nn.Module] = []
    for a, b in ((1, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if a == b else []
    head = [nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def vgg_like() -> nn.Module:
    """BatchNorm, pooling, and a flatten that gives every channel four features."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((3, 24), (24, 32), (32, 48))):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=i == 1), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2) if i else nn.AvgPool2d(2)]
    head = [nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.0), nn.Linear(64, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def resnet_8(shortcut: str, affine: bool = True) -> Callable[[], nn.Module]:
    return lambda: ResNet((3, 16, 16), 10, 1, shortcut, "ones", affine)


def small_vit() -> nn.Module:
    return sc.models.vit_small((3, 16, 16), 10, dim=24, depth=2, heads=3, hidden=64)


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 64, num_classes=10)


def bottlenecks() -> nn.Module:
    """torchvision's ResNet-50 with one block in each stage."""
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10, width_per_group=16)


class DenseNetLike(nn.Module):
    """Every layer reads all before it, BatchNorm after the concatenation; the end is a plain view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(16 + 8 * i), nn.ReLU(inplace=True), nn.Conv2d(16 + 8 * i, 8, 3, 1, 1)
            )
            for i in range(4)
        )
        self.fc = nn.Linear(48 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        x = F.avg_pool2d(x, 4)
        return self.fc(x.view(x.size(0), -1))


class Tangle(nn.Module):
    """A random network: chains, residual sums, concatenation, depthwise, gated channels, any activation."""

    ACTIVATIONS = (nn.ReLU, nn.ReLU, nn.ReLU, nn.ReLU6, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Identity)

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = generator(seed)

        def pick(options: Any) -> Any:
            return options[int(torch.randint(len(options), (), generator=draw))]

        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks, self.kinds = nn.ModuleList(), []
        self.afters = nn.ModuleList()
        width = 12
        for _ in range(5):
            kind = pick(("chain", "chain", "sum", "sum", "cat", "scale", "depthwise"))
            out = width if kind in ("sum", "scale", "depthwise") else pick((8, 12))
            size, groups = pick((1, 3)), width if kind == "depthwise" else 1
            block: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)] if kind == "scale" else []
            block += [
                nn.Conv2d(width, out, size, 1, size // 2, groups=groups, bias=pick((True, False)))
            ]
            if kind != "scale" and pick((True, False)):
                block += [nn.BatchNorm2d(out, affine=pick((True, True, False)))]
            block += [nn.Sigmoid() if kind == "scale" else pick(self.ACTIVATIONS)()]
            self.blocks.append(nn.Sequential(*block))
            self.afters.append(pick(self.ACTIVATIONS)())
            self.kinds.append(kind)
            width = width + out if kind == "cat" else out
        self.hidden = nn.Linear(width * 4, 24, bias=pick((True, False)))
        self.activation = pick(self.ACTIVATIONS)()
        self.fc = nn.Linear(24, 5, bias=pick((True, False)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for kind, block, after in zip(self.kinds, self.blocks, self.afters, strict=True):
            y = block(x)
            if kind in ("sum", "scale"):
                y = x + y if kind == "sum" else x * y
            x = after(torch.cat([x, y], 1) if kind == "cat" else y)
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return self.fc(self.activation(self.hidden(x)))


CASES: dict[str, tuple[Callable[[], nn.Module], float, tuple[int, int, int], float]] = {
    "lenet": (small_lenet, 0.01, (1, 8, 8), 0.15),
    "conv-4": (conv_4_like, 0.01, (1, 8, 8), 0.6),
    "vgg": (vgg_like, 0.01, (3, 16, 16), 0.5),
    "resnet-8 A": (resnet_8("A"), 0.005, (3, 16, 16), 0.9),
    "resnet-8 B": (resnet_8("B"), 0.005, (3, 16, 16), 0.6),
    "resnet-8 without scale": (resnet_8("3x3", affine=False), 0.005, (3, 16, 16), 0.6),
    "resnet-8 fresh": (resnet_8("B"), 0.005, (3, 16, 16), 0.5),
    "vit": (small_vit, 0.03, (3, 16, 16), 0.99),
    "torchvision vit": (torchvision_vit, 0.03, (3, 16, 16), 0.99),
    "densenet": (DenseNetLike, 0.005, (3, 16, 16), 0.9),
}


@pytest.mark.parametrize("case", CASES)
def test_small_models_compute_train_and_restore_as_full_ones(case: str) -> None:
    build, density, shape, at_most = CASES[case]
    model = ticketed(build, density, shape, biases="fresh" not in case)
    assert kept(assert_exact(model, shape)) < at_most


@pytest.mark.parametrize(
    ("build", "density"),
    [
        (lambda: torchvision.models.resnet18(num_classes=10), 0.001),
        (bottlenecks, 0.005),
        (
            lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35, dropout=0.0),
            0.05,
        ),
    ],
    ids=["resnet18", "resnet of bottlenecks", "mobilenet_v2"],
)
def test_torchvision_models(build: Callable[[], nn.Module], density: float) -> None:
    model = ticketed(build, density, (3, 32, 32))
    assert kept(assert_exact(model, (3, 32, 32), steps=2)) < 0.95


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int) -> None:
    model = ticketed(lambda: Tangle(seed), (0.02, 0.05, 0.1, 0.3)[seed % 4], (3, 4, 4), seed)
    assert_exact(model, (3, 4, 4))


@pytest.mark.parametrize("seed", range(24))
def test_folding_keeps_what_evaluation_computes(seed: int) -> None:
    model = ticketed(lambda: Tangle(seed), (0.02, 0.05, 0.1)[seed % 3], (3, 4, 4), seed)
    with torch.no_grad():
        for i, module in enumerate(model.modules()):
            if isinstance(module, _BatchNorm):
                module.running_mean.copy_(randn(module.num_features, seed=i))
                module.running_var.copy_(0.5 + rand(module.num_features, seed=i))
    x = randn(5, 3, 4, 4, dtype=torch.float64)
    trains, folds = (compact(model, x[:1], training=training) for training in (True, False))
    # A layer that is constant as a whole keeps a unit, with all that it reads.
    assert kept(folds) <= kept(trains) or "the only unit" in str(folds)
    assert_close(folds.model.eval()(x), model.eval()(x), "evaluation")
