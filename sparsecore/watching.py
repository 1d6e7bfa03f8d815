"""What a user's `watch` says of a network: one number, of whatever kind, which records keep as JSON."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from .batches import kind_of
from .given_back import given_back
from .process import seeded


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and generators are afterwards what they were: evaluation as everybody writes it ends with
    `model.train()`, and would draw other dropout from then on.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with given_back(model), seeded(devices=[*devices]):
        yield


def number_in(said: Any) -> float:
    """A Python or numpy number, a bool, or a tensor or array of one entry, as a float.

    Errors: ValueError for what is no number, or several.
    """
    one = said
    if isinstance(said, Tensor):
        one = said.item() if said.numel() == 1 else None
    elif isinstance(said, np.ndarray):
        one = said.item() if said.size == 1 else None
    try:
        if isinstance(one, (str, bytes)):
            raise TypeError
        return float(one)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"watch: expected a function of the model that gives a number, got {kind_of(said)} from it"
        ) from None
