"""`python -m bench host`: what launching a layer's training step one by one costs the host, without a GPU.

Kernels are compiled for sm_90 and launched on tensors of the CPU through a driver that does nothing, so all
Python and C++ between a layer's call and the driver is timed, autograd included: forward, dX, dW and dbias of
a layer among several alike.  What a GPU adds is not in it: the driver's own call, its allocator, and autograd's
second thread.  What the vendor's products compute is, so layers are small.  What is read is the thread's own
clock, of steps back to back, and of several medians the least is written.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import thread_time
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton import knobs
from triton.backends.compiler import GPUTarget

import sparsecore as sc
from sparsecore import kernels
from sparsecore.kernels import device as kernel_device

from .measure import Spread, spread_of
from .rows import Rows, number, path_of

PLANS = ("state", "block:64x64")
SUITE = "host"
LAYERS = 10
_SHARED = 227 * 1024  # bytes a program may have


class _Launcher:
    """Takes a kernel's arguments and launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Driver:
    """Triton's driver of a GPU that is not there."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, binary, shared, device: (object(), 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": _SHARED},
        unload_module=lambda module: None,
    )

    def get_current_device(self) -> int:
        return -1  # as `Tensor.get_device` says of the CPU

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launch_nothing() -> None:
    """From here on kernels take tensors of the CPU and are not run; there is no way back in this process."""
    triton.runtime.driver.set_active(_Driver())  # pyright: ignore[reportArgumentType]
    kernel_device.GPU = "cpu"
    block = kernels.FORMATS["block"]
    kernels.FORMATS["block"] = block._replace(obstacle=lambda *args, **options: None)
    for name, value in {
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_get_device_index": 0,
        "current_device": -1,
        "is_current_stream_capturing": False,
        "get_device_properties": SimpleNamespace(shared_memory_per_block_optin=_SHARED),
    }.items():
        setattr(torch.cuda, name, lambda *args, value=value, **options: value)


def layer_of(provider: str, conv: bool) -> nn.Module:
    """A small layer, half of whose blocks of 64 are kept where it is sparse."""
    kinds = (nn.Conv2d, sc.SparseConv2d) if conv else (nn.Linear, sc.SparseLinear)
    size: dict[str, Any] = {"kernel_size": 3, "padding": 1} if conv else {}
    if provider == "dense":
        return kinds[0](128, 128, **size)
    layer = kinds[1](128, 128, **size)
    mask = torch.zeros_like(layer.weight, dtype=torch.bool)
    mask[:64, :64], mask[64:, 64:] = True, True
    layer.set_mask_(mask)
    return layer if provider == "masked" else layer.plan_(provider)


def training_step(layers: nn.Module, inputs: list[Tensor]) -> None:
    """All gradients of a chain of layers."""
    y = layers(inputs[0])
    torch.autograd.grad(y, inputs, y)


def steps() -> dict[str, dict[str, Callable[[], None]]]:
    """By case and provider; after `launch_nothing`."""
    shapes = {"linear 128x128, 8 tokens": (8, 128), "conv 128x128x3x3, 4 pixels": (1, 128, 2, 2)}
    made: dict[str, dict[str, Callable[[], None]]] = {}
    for case, shape in shapes.items():
        x = torch.zeros(shape)
        if x.ndim == 4:  # as images lie on a GPU
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        for provider in ("dense", "masked", *PLANS):
            layers = nn.Sequential(*(layer_of(provider, len(shape) == 4) for _ in range(LAYERS)))
            step = partial(training_step, layers, [x, *layers.parameters()])
            made.setdefault(case, {})[provider] = step
    return made


def seconds(step: Callable[[], None], samples: int, calls: int) -> Spread:
    """Of one layer in a step among `calls` back to back."""
    found = []
    for _ in range(samples + 1):  # the first compiles, or fills caches again
        start = thread_time()
        for _ in range(calls):
            step()
        found.append((thread_time() - start) / calls / LAYERS)
    return spread_of(found[1:])


def host_times(repeats: int, samples: int, calls: int) -> dict[tuple[str, str], Spread]:
    """Of so many measurements of each step, in turn, the one with the least median."""
    launch_nothing()
    made = {(case, name): f for case, by in steps().items() for name, f in by.items()}
    found = [{k: seconds(f, samples, calls) for k, f in made.items()} for _ in range(repeats)]
    return {key: min(times[key] for times in found) for key in made}


def main(folder: Path, *, quick: bool = False) -> int:
    """Writes the rows; returns the process's exit status."""
    if knobs.runtime.interpret:
        print("error: nothing is compiled under TRITON_INTERPRET; unset it", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    device = torch.device("cpu")
    suite = f"{SUITE}-quick" if quick else SUITE
    rows = Rows(path_of(folder, device, suite), suite, device)
    for (case, provider), spread in host_times(*((1, 2, 1) if quick else (10, 11, 4))).items():
        found = (number(1e6 * s) for s in spread)
        rows.add(case, provider, "forward and backward", "host time", "us", *found)
    print(f"rows  {rows.path}")
    return 0
