"""A training step: forward, backward, clipping, optimiser, average, all on the device."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import Self

from ..batches import Batch, cut, require_samples, size_of
from ..interrupts import signals_later
from ..loss_functions import LossError, mean_of
from ..losses import LossLike, loss_of
from ..zeros import scaling
from .engine import (
    AbstractStep,
    EngineError,
    Timeline,
    Way,
    compiled_call,
    plainly,
    stamp,
    structure,
)
from .layout import Layout, state_kept

Penalty = Callable[[nn.Module], Tensor]  # a scalar that is added to the loss


class TrainingStep(AbstractStep):
    """One optimiser step; `total` sums losses times what they are means over, which `seen` sums: samples, where all
    labels count and samples have equally many.

    Args:
        loss: of the model and a batch, as it is; one of a label-smoothing recipe is `smoothed` already.
        optimizer: fit for graphs (`layout.capturable_`), where steps become some.
        accumulate: micro-batches that a batch is cut into.
        amp: the dtype of autocast.
        timeline: its "lr" is the optimiser's own; moves on with every step.
        average: of the weights (EMA), with its decay.

    Attributes:
        unreached: the optimiser's parameters that no step has given a gradient; None before the first.
    """

    unreached: list[Tensor] | None = None

    def __init__(
        self,
        model: nn.Module,
        loss: LossLike,
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        amp: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
        penalty: Penalty | None = None,
        timeline: Timeline | None = None,
        average: tuple[AveragedModel, float] | None = None,
    ) -> None:
        if not accumulate >= 1:
            raise ValueError(f"accumulate: expected at least 1 part of a batch, got {accumulate}")
        self.model, self.loss, self.optimizer = model, loss_of(loss), optimizer
        self.accumulate, self.amp, self.clip_norm = accumulate, amp, clip_norm
        self.penalty, self.timeline, self.average = penalty, timeline, average
        self.averaged = average is not None and bool(average[0].n_averaged > 0)
        self.device = next(model.parameters()).device
        self.scaler = scaler or torch.amp.GradScaler(self.device.type, enabled=False)
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        made = {"dtype": dtype, "device": self.device}
        self.total, self.last = (torch.zeros((), **made) for _ in range(2))
        self.seen = torch.zeros((), dtype=torch.float64, device=self.device)
        self.labels = 0.0  # of a sample, in the first batch
        averages = [] if average is None else [average[0]]
        self.layout = Layout([model, *averages], [optimizer])
        self.call: Callable[[nn.Module, Tensor], Any] = plainly

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> None:
        require_samples(batch)
        if self.timeline is not None:
            self.timeline.advance()
        self.optimizer.zero_grad()
        # What has been cast under an autocast around this is older than the weights, and what is cast here may be
        # a graph's memory.
        torch.clear_autocast_cache()
        mean = self._backward(batch)
        if self.unreached is None:
            self.unreached = self._moved()
        if self.unreached:
            self.unreached = [p for p in self.unreached if p.grad is None]
        torch.clear_autocast_cache()
        if self.penalty is not None:
            own = mean_of(self.penalty(self.model), self.model.parameters(), "penalty")
            self.scaler.scale(own).backward()
        if self.clip_norm is not None:
            moved = self._moved()
            with scaling(moved):
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(moved, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average()
        self.last.copy_(mean)
        share = self._share(batch)
        self.total += mean * share
        self.seen += share

    def _share(self, batch: Batch) -> Tensor | float:
        """What the mean is over, in samples of the first batch: labels left out count nothing."""
        counted, whole = self.loss.counted(batch), self.loss.places(batch)
        self.labels = self.labels or whole / max(size_of(batch), 1)
        return counted / (self.labels or 1.0)

    def clear(self) -> None:
        super().clear()
        self.seen.zero_()

    def mean(self) -> float:
        """The mean loss since `clear`; a host sync."""
        total, seen = torch.stack([self.total.double(), self.seen]).tolist()
        return total / seen if seen else total

    def _backward(self, batch: Batch) -> Tensor:
        """The mean loss, detached; its gradients are in the parameters."""
        batch, mean = self.layout.of(batch), None
        for part in cut(batch, self.accumulate):
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                loss = self._loss(part)
            if self.accumulate > 1:
                loss = self.loss.weighed(loss, part, batch)
            self.scaler.scale(loss).backward()
            mean = loss.detach() if mean is None else mean + loss.detach()
        assert mean is not None
        return mean

    def _loss(self, part: Batch) -> Tensor:
        try:
            return self.loss(self.model, part, self.call)
        except ValueError as error:
            if self.accumulate == 1 or type(error) not in (ValueError, LossError):
                raise
            raise ValueError(
                f"{error}; this was one of the {self.accumulate} parts that accumulate={self.accumulate} cuts a batch "
                "into along the first axis: accumulate=1 takes it whole"
            ) from error

    @torch.no_grad()
    def _average(self) -> None:
        if self.average is None:
            return
        average, decay = self.average
        mine = list(chain(average.module.parameters(), average.module.buffers()))
        now = list(chain(self.model.parameters(), self.model.buffers()))
        if len(mine) != len(now):
            raise ValueError(
                f"average of the weights (ema): expected the {len(mine)} tensors that the model had, got "
                f"{len(now)}; set masks and plans before training, not between its steps, or leave ema out"
            )
        if self.averaged:
            real = [i for i, t in enumerate(mine) if t.is_floating_point()]
            torch._foreach_lerp_([mine[i] for i in real], [now[i] for i in real], 1 - decay)
            mine, now = ([t for t in ts if not t.is_floating_point()] for ts in (mine, now))
        for t, value in zip(mine, now, strict=True):
            t.copy_(value)
        self.averaged = True
        average.n_averaged += 1

    def changes(self) -> list[Tensor]:
        found = [*self.model.parameters(), *self.model.buffers(), self.total, self.seen, self.last]
        moved = self._moved()
        known, stepped = ({id(t) for t in ts} for ts in (found, moved))
        found += [p for p in moved if id(p) not in known]  # a loss may have parameters of its own
        # What is not stepped gathers its gradients.
        rest = (p.grad for p in self.model.parameters() if id(p) not in stepped)
        found += [grad for grad in rest if grad is not None]
        if isinstance(self.loss.fn, nn.Module):
            found += self.loss.fn.buffers()
        for slots in self.optimizer.state.values():
            found += [value for value in slots.values() if isinstance(value, Tensor)]
        if self.scaler.is_enabled():
            scale = self.scaler._scale, self.scaler._growth_tracker
            found += [t for t in scale if t is not None]  # None before the first step
        if self.timeline is not None:
            found += self.timeline.changes()
        if self.average is not None:
            found += [*self.average[0].parameters(), *self.average[0].buffers()]
        return found

    def _moved(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @contextmanager
    def undone(self) -> Iterator[None]:
        averaged, scale = self.averaged, self.scaler.state_dict()
        parameters = {*self.model.parameters(), *self._moved()}
        grads = {p: p.grad for p in parameters}
        try:
            with super().undone(), state_kept(self.optimizer):
                for p in parameters:
                    p.grad = None
                yield
        finally:
            with signals_later():
                for p, grad in grads.items():
                    p.grad = grad
                self.averaged = averaged
                if scale:  # {} where none is wanted
                    self.scaler.load_state_dict(scale)

    def version(self) -> Hashable:
        optimizer = self.optimizer
        numbers = [_number(v) for g in optimizer.param_groups for v in g.values()]
        slots = [_number(v) for held in optimizer.state.values() for v in held.values()]
        return stamp(self.model), self.amp, *numbers, *slots

    def keep(self) -> Any:
        return list(self.model.modules())  # their `id`s are part of the version

    def facts(self) -> Any:
        how = (self.amp, self.accumulate, self.clip_norm, type(self.optimizer).__name__)
        return structure(self.model), how, self.penalty is not None, self.average is not None

    def become(self, way: Way) -> Self:
        if way.compiled and self.loss.takes_model:
            raise EngineError(
                f"engine {way.name}: a loss of (model, batch) calls the model by itself, which is not compiled then; "
                "use engine=eager, or a loss of (output, target)"
            )
        self.layout.become(way.channels_last)
        self.call = compiled_call(repr(structure(self.model))) if way.compiled else plainly
        return self


def _number(value: Any) -> Any:
    """What a graph knows of an entry of an optimiser's group: a number, or where a tensor lies."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value if isinstance(value, (bool, int, float, str, tuple)) else type(value)
