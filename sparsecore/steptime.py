"""What a model's whole training step takes, and measuring that leaves no trace."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calls import forward_example
from .costs import seconds
from .given_back import given_back
from .outputs import tensors_in
from .process import seeded


def step_time(
    model: nn.Module, example: Sequence[Any], update: float, *, captured: bool = False
) -> float:
    """Milliseconds of a forward, a backward and the optimiser's step.

    Args:
        update: what the optimiser's step takes, to be added; on a GPU, where launches hide behind kernels and
            times do not add up, the step runs instead.
        captured: the step is a CUDA graph.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = device_of(model)
    optimise = None
    if device.type == "cuda" and parameters:
        optimise, update = _optimiser_step(parameters, captured), 0.0

    def step() -> None:
        torch.clear_autocast_cache()  # weights are cast once a step
        outputs = tensors_in(forward_example(model, example))
        means = [t.float().mean() for t in outputs if t.requires_grad]
        if means and parameters:  # a frozen model has a forward alone
            torch.autograd.grad(means, parameters, allow_unused=True)
        if optimise is not None:
            optimise()
        torch.clear_autocast_cache()  # what a graph has cast must not outlive it

    return 1e3 * seconds(step, device, budget=0.1, captured=captured) + update


def _optimiser_step(parameters: Sequence[Tensor], captured: bool) -> Callable[[], Any]:
    """On parameters like these, which stay as they are."""
    own = [nn.Parameter(p.detach().clone()) for p in parameters]
    for p in own:
        p.grad = torch.zeros_like(p)
    return torch.optim.AdamW(own, fused=True, capturable=captured).step


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Training mode with gradients, after which modes, buffers and random state are what they were."""
    devices = sorted({p.device for p in model.parameters()}, key=str)
    with given_back(model), seeded(devices=devices), torch.enable_grad():
        model.train()
        yield
