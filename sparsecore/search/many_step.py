"""The steps of several searches side by side: one bank, and one model mapped over stacks of weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..batches import Batch, parts_of
from ..calls import forward
from ..losses import Loss
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
        loss: Loss | None = None,
    ) -> None:
        SearchStep.__init__(self, search, model, gated, members, loss)
        if search.channels_last or search.control.rule is None:
            raise ValueError(
                "many searches at once: expected channels_last=False and a controller with a rule, "
                f"got {search.channels_last} and {search.control}"
            )
        shapes = [layer.raw_weight.shape for layer in self.net.layers.values()]
        if self.net.loss.takes_model:
            raise ValueError(
                f"many searches at once: expected a loss of (output, target), got {self.net.loss.name} of "
                "(model, batch); search one by one"
            )
        count, made = len(members), {"dtype": search.dtype, "device": self.device}
        stacks = [torch.empty(count, *shape, **made) for shape in shapes]
        self._build([stack[i] for i in range(count) for stack in stacks])
        self.leaves = [stack.requires_grad_() for stack in stacks]

    def _objective(self, batch: Batch) -> Tensor:
        def mapped(*weights: Tensor) -> Any:
            for pattern, weight in zip(self.gated.values(), weights, strict=True):
                pattern.drawn = weight
            return forward(self.net.model, parts_of(batch)[0])

        try:
            outputs = torch.vmap(mapped)(*self.leaves)  # with an axis of tickets before all others
        finally:
            for pattern in self.gated.values():
                pattern.drawn = None
        shared = _Shared(self.net)
        leaves, spec = tree_flatten(outputs)
        each = zip(*(t.unbind() for t in leaves), strict=True)
        members = [_Member(shared, tree_unflatten(parts, spec)) for parts in each]
        return torch.stack([self.search.objective(member, batch) for member in members])

    def gradients(self, loss: Tensor) -> Sequence[Tensor]:
        stacks = super().gradients(loss.sum())
        return [stack[i] for i in range(len(self.members)) for stack in stacks]


class _Shared:
    """The one teacher of several tickets, asked once a batch."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.teacher: Any = None


class _Member(Net):
    """One ticket's view: its own sparse output, the teacher of all."""

    def __init__(self, shared: _Shared, sparse: Any) -> None:
        self.__dict__ |= shared.net.__dict__
        self.shared, self.own = shared, sparse

    def task(self, batch: Batch) -> Tensor:
        return self.loss.of(self.own, batch)

    def output(self, x: Any) -> Any:
        return self.own

    def teacher_output(self, x: Any) -> Any:
        if self.shared.teacher is None:
            self.shared.teacher = super().teacher_output(x)
        return self.shared.teacher

    def outputs(self, x: Any) -> tuple[Any, Any]:
        return self.own, self.teacher_output(x)

    def activations(self) -> NoReturn:
        raise ValueError(
            "many searches at once: expected an objective of class scores, got one of activations; "
            "search one by one"
        )
