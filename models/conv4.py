"""Conv-4 of Frankle & Carbin 2019: four 3 x 3 convolutions in two pooled pairs, three linear layers."""

from torch import nn

from .initial import initialise_, scaled


def conv_4(shape: tuple[int, int, int], classes: int, *, width: float = 1.0) -> nn.Module:
    """Images [B, C, H, W] with sides divisible by 4 to scores [B, classes]; `width` scales all hidden sizes.

    Errors: ValueError for other sides or a width that is not positive.
    """
    channels, height, side = shape
    if height % 4 or side % 4:
        raise ValueError(f"conv-4: expected sides divisible by 4, got {height}x{side}")
    a, b, hidden = scaled("conv-4", width, 64, 128, 256)
    return initialise_(
        nn.Sequential(
            nn.Conv2d(channels, a, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(a, a, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(b, b, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(b * (height // 4) * (side // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
    )
