"""The steps of several searches side by side: one bank, and one model mapped over stacks of weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..objectives import Net
from ..patterns import Gated
from .steps import FusedStep, Members, SearchStep

if TYPE_CHECKING:
    from .gated import AbstractGateSearch


class ManyStep(FusedStep):
    """Several tickets' steps side by side: one bank, and one model mapped over stacks of weights."""

    compiles = False

    def __init__(
        self,
        search: "AbstractGateSearch",
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
    ) -> None:
        SearchStep.__init__(self, search, model, gated, members)
        if search.channels_last or search.control.rule is None:
            raise ValueError(
                "many searches at once: expected channels_last=False and a controller with a rule, "
                f"got {search.channels_last} and {search.control}"
            )
        shapes = [layer.raw_weight.shape for layer in self.net.layers.values()]
        count, made = len(members), {"dtype": search.dtype, "device": self.device}
        stacks = [torch.empty(count, *shape, **made) for shape in shapes]
        self._build([stack[i] for i in range(count) for stack in stacks])
        self.leaves = [stack.requires_grad_() for stack in stacks]

    def _objective(self, batch: Batch) -> Tensor:
        def forward(*weights: Tensor) -> Tensor:
            for pattern, weight in zip(self.gated.values(), weights, strict=True):
                pattern.drawn = weight
            return self.net.model(batch[0])

        try:
            scores = torch.vmap(forward)(*self.leaves)  # [tickets, B, classes]
        finally:
            for pattern in self.gated.values():
                pattern.drawn = None
        shared = _Shared(self.net)
        return torch.stack([self.search.objective(_Member(shared, s), batch) for s in scores])

    def gradients(self, loss: Tensor) -> Sequence[Tensor]:
        stacks = super().gradients(loss.sum())
        return [stack[i] for i in range(len(self.members)) for stack in stacks]


class _Shared:
    """The one teacher of several tickets, asked once a batch."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.scores: Tensor | None = None


class _Member(Net):
    """One ticket's view: its own sparse scores, the teacher of all."""

    def __init__(self, shared: _Shared, scores: Tensor) -> None:
        self.__dict__ |= shared.net.__dict__
        self.shared, self.scores = shared, scores

    def sparse(self, x: Tensor) -> Tensor:
        return self.scores

    def teacher(self, x: Tensor) -> Tensor:
        if self.shared.scores is None:
            self.shared.scores = super().teacher(x)
        return self.shared.scores

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores, self.teacher(x)

    def activations(self) -> NoReturn:
        raise ValueError(
            "many searches at once: expected an objective of class scores, got one of activations; "
            "search one by one"
        )
