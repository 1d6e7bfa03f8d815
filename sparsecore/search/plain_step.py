"""A search step in autograd, for what `kernels.GateBank` does not know."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batches import Batch
from ..control import State
from ..losses import Loss
from ..patterns import Gated
from .steps import Members, SearchStep

if TYPE_CHECKING:
    from .gated import AbstractGateSearch


class PlainStep(SearchStep):
    """The same in autograd, one gate pattern at a time, with PyTorch's Adam."""

    def __init__(
        self,
        search: "AbstractGateSearch",
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(search, model, gated, members, loss)
        (self.target,) = self.first_targets()
        for pattern in gated.values():
            pattern.impl = "materialise"  # the one that can be differentiated twice
        self.params = [g.logits for g in gated.values()]
        self.state: State = search.control.init(self.device)
        groups: list[dict[str, Any]] = [{"params": self.params, "lr": self._rate(search.lr)}]
        self.gains = [g.log_gain for g in gated.values() if g.log_gain is not None]
        if self.gains:
            groups.append({"params": self.gains, "lr": self._rate(search.gain_lr)})
        capturable = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=capturable)
        # The moments exist from the start, so that a checkpoint can be loaded into them.
        for p in (*self.params, *self.gains):
            p.grad = torch.zeros_like(p)
            slots = {"step": torch.zeros((), device=self.device, dtype=torch.float32)}
            slots |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = slots

    def _rate(self, lr: float) -> Tensor:
        """Where a graph reads it; the CPU reads Python's own number."""
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        return torch.tensor([lr], dtype=wide, device=self.device)

    def _lr(self) -> Tensor:
        return self.optimizer.param_groups[0]["lr"][0].float()

    def descend(self, batch: Batch) -> Tensor:
        target = self._aim()
        for g in self.gated.values():
            g.step += 1
        loss = self.search.objective(self.net, batch)
        grads = torch.autograd.grad(
            loss, [*self.params, *self.gains], allow_unused=True, materialize_grads=True
        )
        found, follow = grads[: len(self.params)], grads[len(self.params) :]
        search = self.search
        pulled, state = self.kept.pulled(
            search.control, self.state, self.gate, self.params, found, target, self._lr()
        )
        for name, value in state.items():  # in place: a graph knows no other address
            self.state[name].copy_(value)
        for p, grad in zip((*self.params, *self.gains), (*pulled, *follow), strict=True):
            p.grad = grad
        self.optimizer.step()
        return loss.detach()

    def _aim(self) -> Tensor | float:
        """The step's target."""
        if self.aims is None:
            return self.target
        return self.aims.index_select(0, next(iter(self.gated.values())).step)[0, 0]

    def drop_lr(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def tensors(self) -> dict[str, Tensor]:
        found = {f"draw/{name}": g.step for name, g in self.gated.items()}
        for i, p in enumerate((*self.params, *self.gains)):
            found[f"value/{i}"] = p.detach()
            found |= {f"{slot}/{i}": v for slot, v in self.optimizer.state[p].items()}
        return found | {f"state/{name}": value for name, value in self.state.items()}

    def logits(self) -> list[dict[str, Tensor]]:
        return [{name: g.logits.detach() for name, g in self.gated.items()}]
