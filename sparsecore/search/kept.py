"""How many weights gates are expected to keep, and how sparsity pulls at their logits; in plain PyTorch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..control import AbstractController, Reading, State
from ..gates import AbstractGate
from ..granularity import Granularity
from ..kernels import squares_ref


class Kept:
    """The count over layers of these shapes.

    Attributes:
        count: weights in all layers.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], granularity: Granularity, device: torch.device
    ) -> None:
        self.count = sum(shape.numel() for shape in shapes.values())
        self.sizes: list[Tensor | None] = []  # weights in each unit; None: each is one weight
        for shape in shapes.values():
            single = granularity.units(shape) == shape
            sizes = None if single else granularity.sizes(shape).to(device, torch.float32)
            self.sizes.append(sizes)

    @torch.no_grad()
    def by_layer(self, gate: AbstractGate, logits: Sequence[Tensor]) -> Tensor:
        """Expected number of kept weights of each layer [layers]."""
        counts = []
        for s, size in zip(logits, self.sizes, strict=True):
            density = gate.density(s)
            counts.append((density if size is None else density.mul_(size)).sum())
        return torch.stack(counts)

    @torch.no_grad()
    def pulls(self, gate: AbstractGate, logits: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Expected number of kept weights in all, and its gradient in each layer's logits."""
        kept, pulls = logits[0].new_zeros(()), []
        for s, size in zip(logits, self.sizes, strict=True):
            density = gate.density(s)
            pull = gate.density_slope(s, density)
            if size is not None:
                density, pull = density.mul_(size), pull.mul_(size)
            kept = kept + density.sum()
            pulls.append(pull)
        return kept, pulls

    def pulled(
        self,
        control: AbstractController,
        state: State,
        gate: AbstractGate,
        logits: Sequence[Tensor],
        grads: Sequence[Tensor],
        target: Tensor | float,
        lr: Tensor | None = None,
    ) -> tuple[list[Tensor], State]:
        """Gradients g_R + lambda g_S, for `target` kept weights, and the controller's next state.

        Args: lr: the logits' rate by now, 0-dim.
        """
        kept, pulls = self.pulls(gate, logits)
        percent = 100 / target  # of excess per weight
        reading = Reading(_norm(grads), percent * _norm(pulls), percent * kept - 100, lr)
        weight, state = control.update(state, reading)
        for grad, pull in zip(grads, pulls, strict=True):
            pull.mul_(percent * weight).add_(grad)
        return pulls, state


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all of them together."""
    return torch.stack([squares_ref(t.contiguous()) for t in tensors]).sum().sqrt()
