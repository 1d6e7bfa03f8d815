"""Initial weights and activations that several models share."""

from collections.abc import Callable

from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "prelu": nn.PReLU}
INITS = ("glorot", "uniform", "torch")
_WIDEST = 1000.0  # weights grow with its square: more than that is a slip of the pen


def activation_of(model: str, name: str) -> Callable[[], nn.Module]:
    """What makes an activation module.  Errors: ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{model} activation: expected {' or '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def scaled(model: str, width: float, *sizes: int) -> list[int]:
    """The layers' sizes times `width`, at least 1.  Errors: ValueError for a width that is not in (0, 1000]."""
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width <= _WIDEST:
        raise ValueError(
            f"{model} width: expected a positive factor of at most {_WIDEST:g}, got {width!r}"
        )
    return [max(1, round(width * size)) for size in sizes]


def initialise_(model: nn.Module, init: str = "glorot") -> nn.Module:
    """Weights of linear layers and convolutions by `init`, biases zero.  Errors: ValueError for another init.

    "glorot": Glorot-normal, as Frankle & Carbin 2019 use for LeNet and Conv-4.  "uniform": U[-a, a] with
    a = sqrt(6 / fan_in), twice the variance that keeps a ReLU network's signal when half is removed
    (arXiv 2603.08914 draws U[-a, a] and does not say a).  "torch": what the modules were made with, biases
    too; for nn.Linear uniform with a variance of 1 / (3 fan_in), about a quarter of Glorot's: at 0.5 % of
    the weights the signal of a ticket is then so small that it trains slowly.
    """
    if init not in INITS:
        raise ValueError(f"init: expected {' or '.join(INITS)}, got {init!r}")
    if init == "torch":
        return model
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if init == "glorot":
                nn.init.xavier_normal_(module.weight)
            else:
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
