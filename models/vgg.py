"""VGG-16 with BatchNorm for small images: 13 convolutions, global pooling, one linear layer."""

from torch import nn

from .initial import scaled

_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: pool


def vgg_16_bn(shape: tuple[int, int, int], classes: int, *, width: float = 1.0) -> nn.Module:
    """Images [B, C, H, W], sides at least 16, to scores [B, classes] (Simonyan & Zisserman 2015).

    `width` scales the channels of all convolutions.

    Errors: ValueError for smaller sides or a width that is not positive.
    """
    if min(shape[1:]) < 16:
        raise ValueError(f"vgg-16-bn: expected sides of at least 16, got {shape[1]}x{shape[2]}")
    layers: list[nn.Module] = []
    channels = shape[0]
    for size in _WIDTHS:
        if size == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        [out] = scaled("vgg-16-bn", width, size)
        conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )
