"""Triton launches on the current device; launchers launch where their tensors lie."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Launch = TypeVar("Launch", bound=Callable)


def on_its_device(launch: Launch) -> Launch:
    """Runs a launcher on the device of the first tensor that it is given."""

    @wraps(launch)
    def guarded(*args, **kwargs):
        given = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if not given.is_cuda:
            return launch(*args, **kwargs)
        with torch.cuda.device(given.device):
            return launch(*args, **kwargs)

    return guarded  # pyright: ignore[reportReturnType]
