"""CIFAR ResNets with 16/32/64 channels (He et al. 2016, section 4.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHORTCUTS = ("A", "B", "3x3")
BN_INITS = ("ones", "uniform")


class PadShortcut(nn.Module):
    """Option A: every second pixel, new channels zero; no parameters."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        half = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.new_channels - half))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, shortcut: str, affine: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, affine=affine)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, affine=affine)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            if shortcut == "A":
                self.shortcut = PadShortcut(width - width_in)
            else:
                kernel = 3 if shortcut == "3x3" else 1
                self.shortcut = nn.Sequential(
                    nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False),
                    nn.BatchNorm2d(width, affine=affine),
                )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """6n + 2 layers: a stem, three stages of n blocks, a linear classifier."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        blocks: int,
        shortcut: str,
        bn_init: str,
        affine: bool,
    ) -> None:
        super().__init__()
        for what, value, valid in (
            ("shortcut", shortcut, SHORTCUTS),
            ("bn_init", bn_init, BN_INITS),
        ):
            if value not in valid:
                raise ValueError(
                    f"resnet {what}: expected one of {', '.join(valid)}, got {value!r}"
                )
        if not isinstance(affine, bool):
            raise ValueError(f"resnet affine: expected true or false, got {affine!r}")
        self.conv = nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16, affine=affine)
        self.relu = nn.ReLU()
        stages, width_in = [], 16
        for width in (16, 32, 64):
            stage = []
            for i in range(blocks):
                stride = 2 if i == 0 and width > 16 else 1
                stage.append(BasicBlock(width_in, width, stride, shortcut, affine))
                width_in = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d) and affine and bn_init == "uniform":
                nn.init.uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn(self.conv(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _resnet(blocks: int):
    def build(
        shape: tuple[int, int, int],
        classes: int,
        *,
        shortcut: str = "A",
        bn_init: str = "ones",
        affine: bool = True,
    ) -> nn.Module:
        """Images [B, C, H, W] to scores [B, classes].

        Args:
            shortcut: "A" (no parameters, the original's choice on CIFAR), "B" (1 x 1 projection)
                or "3x3" (3 x 3 projection, arXiv 2512.07142: 291,376 weights in ResNet-20).
            bn_init: "ones", or "uniform" for scales drawn from U(0, 1) (arXiv 2512.07142).
            affine: False leaves out BatchNorm's scale and shift (arXiv 2106.06955).

        Errors: ValueError for another option.
        """
        return ResNet(shape, classes, blocks, shortcut, bn_init, affine)

    return build


resnet_20, resnet_32, resnet_56 = _resnet(3), _resnet(5), _resnet(9)
