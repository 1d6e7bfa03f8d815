"""Conv-4 of Frankle & Carbin 2019: four 3 x 3 convolutions in two pooled pairs, three linear layers."""

from torch import nn

from .initial import glorot_


def conv_4(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Images [B, C, H, W] with sides divisible by 4 to scores [B, classes]."""
    channels, height, width = shape
    if height % 4 or width % 4:
        raise ValueError(f"conv-4: expected sides divisible by 4, got {height}x{width}")
    return glorot_(
        nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * (height // 4) * (width // 4), 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )
    )
