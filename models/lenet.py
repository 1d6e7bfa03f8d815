"""LeNet-300-100 (LeCun et al. 1998), the multilayer perceptron of the lottery-ticket papers."""

from math import prod

from torch import nn

from .initial import glorot_


def lenet_300_100(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Images [B, C, H, W] to scores [B, classes]; 266,200 weights for 28 x 28 grey images."""
    return glorot_(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(prod(shape), 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        )
    )
