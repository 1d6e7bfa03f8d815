"""Plain dense models, torch only.  Every builder is `build(shape, classes, **options)`."""

from collections.abc import Callable

from torch import nn

from .conv4 import conv_4
from .lenet import lenet_300_100
from .resnet_cifar import resnet_20, resnet_32, resnet_56
from .vgg import vgg_16_bn
from .vit import vit_small

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet-300-100": lenet_300_100,
    "conv-4": conv_4,
    "resnet-20": resnet_20,
    "resnet-32": resnet_32,
    "resnet-56": resnet_56,
    "vgg-16-bn": vgg_16_bn,
    "vit-small": vit_small,
}

__all__ = [
    "BUILDERS",
    "conv_4",
    "lenet_300_100",
    "resnet_20",
    "resnet_32",
    "resnet_56",
    "vgg_16_bn",
    "vit_small",
]
