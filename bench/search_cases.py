"""What the search suite measures, as data: full for a GPU, quick for trying every path out anywhere."""

from dataclasses import dataclass, field

import torch
import torchvision
from torch import nn

from sparsecore.kernels import CONCRETE, HARD_CONCRETE, GateSpec, Unit
from sparsecore.recipes import build

from .cases import StepCase

GATES = {
    "concrete": GateSpec(CONCRETE, 1.0),
    "hard-concrete": GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1),
}
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class OpCase:
    """The bank's three launches over the weights of a model."""

    model: str  # of `weights_of`
    gate: str
    stored: bool = False  # q, in place of drawing the noise again
    fast: bool = True

    @property
    def name(self) -> str:
        return f"ops/{self.model}"

    @property
    def provider(self) -> str:
        how = ("stored q" if self.stored else "recompute", "fast" if self.fast else "exact")
        return ", ".join((self.gate, *how))


@dataclass(frozen=True)
class LayerCase:
    """A whole search step of one layer: linear, or a convolution of stride 1 on square images."""

    n: int
    k: int
    tokens: int  # rows of x, or batch * side * side
    taps: int = 1
    side: int = 0  # 0: a linear layer

    @property
    def name(self) -> str:
        kind = f"conv {self.taps}x{self.taps}" if self.side else "linear"
        return f"layer/{kind} {self.k}->{self.n}/T={self.tokens}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.n, self.k, self.taps, self.taps) if self.side else (self.n, self.k)

    def shape(self, channels: int) -> tuple[int, ...]:
        """Of an activation with so many channels."""
        if not self.side:
            return (self.tokens, channels)
        return (self.tokens // self.side**2, channels, self.side, self.side)


def conv(n: int, k: int, taps: int, side: int, batch: int) -> LayerCase:
    return LayerCase(n, k, batch * side * side, taps, side)


@dataclass(frozen=True)
class StrategyCase:
    """Forward and backward of one gated linear layer in different ways; square weights."""

    size: int
    tokens: int
    unit: Unit = field(default_factory=Unit)
    density: float = 0.05

    @property
    def name(self) -> str:
        if self.unit.single:
            what = "weight gates"
        elif self.unit.w == 0:
            what = f"channel gates, {100 * self.density:g} % open"
        else:
            what = f"block {self.unit.h} gates, {100 * self.density:g} % open"
        return f"strategy/{what}, {self.size}x{self.size}/T={self.tokens}"


@dataclass(frozen=True)
class SearchCases:
    """A suite: its cases, how long each may be measured, and the sizes of its ceilings."""

    layers: tuple[LayerCase, ...]
    networks: tuple[tuple[StepCase, ...], ...]  # of a model each, timed together
    ops: tuple[OpCase, ...]
    strategies: tuple[StrategyCase, ...]
    copy: int  # bytes
    matmul: int
    samples: int  # of the synthetic data set behind the networks
    rounds: int = 0  # 0: by time


_BLOCKS = (Unit(16, 16), Unit(32, 32), Unit(64, 64), Unit(128, 128), Unit(1, 0))

FULL = SearchCases(
    layers=(
        *(LayerCase(4096, 4096, 512 << i) for i in range(7)),
        *(LayerCase(n, k, 12608) for n, k in ((768, 768), (3072, 768), (768, 3072))),
        conv(64, 64, 3, 56, 64), conv(128, 128, 3, 28, 64), conv(256, 256, 3, 14, 64),
        conv(512, 512, 3, 7, 64), conv(64, 256, 1, 56, 64), conv(256, 1024, 1, 14, 64),
    ),
    networks=(
        (
            StepCase("resnet-20", (3, 32, 32), 512, 0, torch.bfloat16, channels_last=True),
            StepCase("resnet-20", (3, 32, 32), 512, 0),
        ),
        (  # the models of which several searches run in one program on a GPU
            StepCase("lenet-300-100", (1, 28, 28), 512, 0, torch.bfloat16),
            StepCase("lenet-300-100", (1, 28, 28), 512, 0, torch.bfloat16, members=4),
        ),
    ),
    ops=(
        *(OpCase("4096x4096", gate, stored, fast)
          for gate in GATES for stored in (False, True) for fast in (True, False)),
        *(OpCase(model, gate, stored)
          for model in ("vit-b/16", "resnet-50", "resnet-20")
          for gate, stored in (("concrete", False), ("concrete", True), ("hard-concrete", False))),
    ),
    strategies=(
        *(StrategyCase(size, t) for size in (1024, 4096) for t in (16, 64, 128, 512)),
        *(StrategyCase(4096, t, unit, density)
          for t in (2048, 8192) for unit in _BLOCKS for density in (0.5, 0.1, 0.05)),
    ),
    copy=1 << 30, matmul=8192, samples=98 * 512,
)  # fmt: skip

QUICK = SearchCases(
    layers=(LayerCase(32, 48, 64), LayerCase(32, 48, 128), conv(16, 8, 3, 4, 4)),
    networks=(
        (StepCase("resnet-20", (3, 8, 8), 16, 0),),
        (  # few processors convolve in bfloat16 at any speed
            StepCase("lenet-300-100", (1, 8, 8), 16, 0, torch.bfloat16, channels_last=True),
            StepCase("lenet-300-100", (1, 8, 8), 16, 0, members=2),
        ),
    ),
    ops=(OpCase("64x64", "concrete"), OpCase("resnet-20", "hard-concrete", stored=True)),
    strategies=(
        StrategyCase(64, 16),
        StrategyCase(64, 16, Unit(16, 16), 0.5),
        StrategyCase(64, 16, Unit(1, 0), 0.5),
    ),
    copy=1 << 20, matmul=128, samples=48, rounds=2,
)  # fmt: skip


def weights_of(model: str) -> Shapes:
    """Shapes of the linear and convolutional weights of a model, or of one N x K weight."""
    if model[0].isdigit():
        n, k = model.split("x")
        return ((int(n), int(k)),)
    with torch.device("meta"):
        built = {
            "vit-b/16": lambda: torchvision.models.vit_b_16(weights=None),
            "resnet-50": lambda: torchvision.models.resnet50(weights=None),
            "resnet-20": lambda: build("resnet-20", (3, 32, 32), 10, shortcut="3x3"),
        }[model]()
    shapes = []
    for module in built.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            shapes.append(tuple(module.weight.shape))
        elif isinstance(module, nn.MultiheadAttention):  # queries, keys and values in one
            shapes.append(tuple(module.in_proj_weight.shape))
    return tuple(shapes)
