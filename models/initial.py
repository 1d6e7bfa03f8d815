"""Initial weights that several models share."""

from torch import nn


def glorot_(model: nn.Module) -> nn.Module:
    """Glorot-normal weights and zero biases, as Frankle & Carbin 2019 use for LeNet and Conv-4.

    torch's default for nn.Linear is uniform with a variance of 1 / (3 fan_in), about a quarter of
    this: at 0.5 % of the weights the signal of a ticket is then so small that it trains slowly.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
