"""LeNet-300-100 (LeCun et al. 1998), the multilayer perceptron of the lottery-ticket papers."""

from math import prod

from torch import nn

from .initial import activation_of, initialise_, scaled


def lenet_300_100(
    shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    activation: str = "relu",
    init: str = "glorot",
) -> nn.Module:
    """Images [B, C, H, W] to scores [B, classes]; 266,200 weights for 28 x 28 grey images.

    Args:
        width: factor on the hidden sizes.
        activation: "relu" or "prelu" (arXiv 2603.08914).
        init: "glorot", "uniform" or "torch", as `initialise_` says.

    Errors: ValueError for another option.
    """
    act = activation_of("lenet-300-100", activation)
    first, second = scaled("lenet-300-100", width, 300, 100)
    return initialise_(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(prod(shape), first),
            act(),
            nn.Linear(first, second),
            act(),
            nn.Linear(second, classes),
        ),
        init,
    )
