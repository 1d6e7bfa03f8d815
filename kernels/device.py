"""Launches lie on the device where their tensors do, and fill it."""

from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .dsl import MISSING

PROGRAMS = 264  # two waves of the largest GPU, at one program a multiprocessor
SHARED = 96 * 1024  # bytes of tiles in flight that fit the smallest GPU with asynchronous copies
GPU = "cuda"  # the type of device that kernels are launched on
# Where operators are plain PyTorch (`device_types`; None is everywhere).
PLAIN = "cpu" if MISSING is None else None
Function = TypeVar("Function", bound=Callable)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of tiles in flight that a program may hold there; without a GPU as on the smallest."""
    if device.type != GPU:
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def token_splits(
    tokens: int, tiles: int, block: int, splits: int | None = None, *, finer: int = 0
) -> tuple[int, int]:
    """(splits, tokens in each, a multiple of `block`) of a sum over tokens, made for each of so many tiles.

    Without `splits`: as many as fill the GPU, each of 1024 tokens at least, 16 at most; 2**finer times as many,
    so that the last programs leave less of it idle.
    """
    if splits is None:
        splits = max(1, min(PROGRAMS // tiles, tokens // 1024, 16)) << finer
    span = -(-tokens // (splits * block)) * block
    return -(-tokens // span), span


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor lies where kernels are launched outside of Triton's interpreter."""
    return tensor.device.type == GPU


def by_kernel(tensor: Tensor) -> bool:
    """Whether kernels take a tensor as it is, outside of Triton's interpreter."""
    return tensor.device.type == GPU and MISSING is None


def gpu_kernel(operator: CustomOpDef) -> Callable[[Function], Function]:
    """Makes a function what an operator runs on a GPU, if kernels can."""
    if MISSING is not None:
        return lambda function: function
    return operator.register_kernel(GPU)


def on_its_device(launch: Function) -> Function:
    """Runs a launcher on the device of the first tensor that it is given."""

    @wraps(launch)
    def guarded(*args, **kwargs):
        given = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if not on_gpu(given):
            return launch(*args, **kwargs)
        with torch.cuda.device(given.device):
            return launch(*args, **kwargs)

    return guarded  # pyright: ignore[reportReturnType]
