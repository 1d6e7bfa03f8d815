"""One search step: descend g_R + lambda g_S in the logits of all gates, and let the gains follow.

`FusedStep` leaves the gates to `kernels.GateBank` (three launches on a GPU), `many_step.ManyStep` does so for several
tickets at once, `LayerwiseStep` lets every layer draw by itself.  `plain_step.PlainStep` is the same in autograd, for
what the bank does not know: gates without a `spec`, objectives that differentiate twice.
"""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from .. import capture, kernels
from ..batches import Batch, require_samples
from ..control import Reading, State
from ..engine import AbstractStep, EngineError, Way, compiled_call, plainly, structure
from ..engine.layout import channels_last
from ..losses import Loss
from ..objectives import Net, TeacherMemory
from ..patterns import Gated
from .kept import Kept
from .protocol import SearchError

if TYPE_CHECKING:
    from .gated import AbstractGateSearch

Members = Sequence[tuple[float, int]]  # density and noise seed of each ticket searched


class SearchStep(AbstractStep):
    """A step and the state it carries; `total` [tickets] sums the objective over the steps of an epoch."""

    def __init__(
        self,
        search: "AbstractGateSearch",
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> None:
        self.search, self.gated, self.members = search, gated, members
        self.model, self.net = model, Net(model, loss)
        first = next(iter(gated.values()))
        self.gate, self.device = first.gate, first.logits.device
        # With BatchNorm a sample's scores depend on its batch, which changes from epoch to epoch.
        self.batchwise = any(isinstance(m, _BatchNorm) for m in model.modules())
        shapes = {name: layer.raw_weight.shape for name, layer in self.net.layers.items()}
        self.kept = Kept(shapes, search.granularity, self.device)
        # [steps, tickets]: expected weights kept, where that changes
        self.aims: Tensor | None = None
        self.total = torch.zeros(len(members), device=self.device, dtype=torch.float32)

    def first_targets(self) -> list[float]:
        """Expected weights kept that each ticket's search begins with."""
        return [self.search.targets(density, 1)[0] * self.kept.count for density, _ in self.members]

    def schedule(self, steps: int) -> None:
        """Tells how many steps there will be."""
        if self.search.control.aims and self.search.ramp_for(1 - self.members[0][0]):
            aims = [self.search.targets(density, steps) for density, _ in self.members]
            aims = [of + of[-1:] * 8 for of in aims]  # a graph is tried out before it is captured
            self.aims = (
                torch.tensor(aims, device=self.device, dtype=torch.float32).T.contiguous()
                * self.kept.count
            )

    def begin_epoch(self, samples: int | None) -> None:
        """`samples`: how many the data has, if each looks the same in every epoch."""
        if samples is None or self.batchwise:
            self.net.memory = None
        elif self.net.memory is None:
            self.net.memory = TeacherMemory(samples)
        else:
            self.net.memory.complete = True

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> None:
        """One step on a batch (x, y) of the samples `rows`; no host sync.  Errors: ValueError without samples."""
        require_samples(batch)
        if self.net.memory is not None:
            assert rows is not None
            self.net.memory.rows = rows
        self.total += self.descend(batch)

    @abstractmethod
    def descend(self, batch: Batch) -> Tensor:
        """Moves logits, gains and lambda; the objective of each ticket (detached, on the device)."""

    def changes(self) -> list[Tensor]:
        return [*self.tensors().values(), self.total]

    def facts(self) -> Any:
        search = self.search
        how = (
            self.gate,
            search.granularity,
            search.objective.name,
            search.dtype,
            len(self.members),
        )
        return type(self).__name__, how, structure(self.net.model)

    @abstractmethod
    def drop_lr(self, factor: float) -> None: ...

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that a step changes, to be saved, and to be put back in place."""

    @abstractmethod
    def logits(self) -> list[dict[str, Tensor]]:
        """Each ticket's logits by layer, contiguous."""


class FusedStep(SearchStep):
    """A step whose gates are a `GateBank`: the model computes with weights drawn beforehand."""

    compiles = True

    def __init__(
        self,
        search: "AbstractGateSearch",
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(search, model, gated, members, loss)
        self._build()
        self.leaves = [out.detach().requires_grad_() for out in self.bank.out]
        for i, pattern in enumerate(gated.values()):
            pattern.drawn = self.leaves[i]
            pattern.logits.data = self.bank.logits[i]
            if pattern.log_gain is not None:
                pattern.log_gain.data = self.bank.log_gain[0, i]

    def _build(self, out: list[Tensor] | None = None) -> None:
        """The bank of all members, one after the other, and the teacher's weights."""
        search, members = self.search, self.members
        spec, rule = self.gate.spec, search.control.rule
        assert spec is not None
        weights = [self._memory(layer.raw_weight.detach()) for layer in self.net.layers.values()]
        self.state: State = search.control.init(self.device)
        self.bank = kernels.GateBank(
            weights * len(members),
            gate=spec,
            unit=search.granularity.unit,
            start=[self.gate.init(search.start_density or density) for density, _ in members],
            seeds=[seed for _, seed in members for _ in weights],
            layers=[*range(len(weights))] * len(members),
            groups=[i for i in range(len(members)) for _ in weights],
            targets=self.first_targets(),
            # A controller of another kind is asked in every step and its answer held.
            rule=rule or kernels.Rule(1.0, 0.0, 0.0),
            weight=float(self.state["weight"]) if rule else 0.0,
            lr=search.lr,
            gain_lr=search.gain_lr,
            dtype=search.dtype,
            out=out,
            trained=search.trains_weights,
            store_factor=self.device.type == "cpu",
        )
        own = search.dtype != torch.float32 or search.channels_last
        for pattern, weight in zip(self.gated.values(), weights, strict=True):
            pattern.dense = weight.to(search.dtype) if own else None

    def _memory(self, weight: Tensor) -> Tensor:
        if self.search.channels_last and weight.ndim == 4:
            return weight.contiguous(memory_format=torch.channels_last)
        return weight.contiguous()

    def objective(self, batch: Batch) -> Tensor:
        """The objective in the search's dtype and memory format."""
        if self.search.channels_last:
            batch = channels_last(batch)
        lower = self.search.dtype != torch.float32
        scope = torch.autocast(self.device.type, self.search.dtype) if lower else nullcontext()
        with scope:
            loss = self._objective(batch)
        if not loss.requires_grad:
            raise SearchError(
                f"objective {self.search.objective.name}: expected one that depends on gates, got a number that no "
                "gradient passes through; let the forward call the sparse layers, and the loss depend on its output"
            )
        return loss

    def _objective(self, batch: Batch) -> Tensor:
        return self.search.objective(self.net, batch)

    def gradients(self, loss: Tensor) -> Sequence[Tensor]:
        """dR/dw_eff in the bank's order."""
        # A layer the forward does not reach has no gradient: zeros.
        return torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)

    def descend(self, batch: Batch) -> Tensor:
        self._aim()
        self.bank.sample_()
        loss = self.objective(batch)
        self.bank.backward_(self.gradients(loss))
        return self._end(loss)

    def version(self) -> Hashable:
        memory = self.net.memory
        return memory is not None and memory.complete

    def keep(self) -> Any:
        return self.net.memory

    def become(self, way: Way) -> Self:
        if not self.compiles:
            super().become(way)
        if way.compiled and self.net.loss.takes_model:
            raise EngineError(
                f"engine {way.name}: a loss of (model, batch) calls the model by itself, which is not compiled then; "
                "use engine=eager, or a loss of (output, target)"
            )
        self.net.call = compiled_call(repr(self.facts())) if way.compiled else plainly
        self.net.side = capture.side_stream(self.device) if way.graph else None
        return self

    def _aim(self) -> None:
        """The step's targets, read on the device: a graph replays this too."""
        if self.aims is not None:
            self.bank.targets.copy_(self.aims.index_select(0, self.bank.step[:1])[0])

    def _end(self, loss: Tensor) -> Tensor:
        if self.search.control.rule is None:
            weight, state = self.search.control.update(self.state, self.readings()[0])
            self.bank.control[1].copy_(weight)  # before the state that it may be part of
            for name, value in state.items():  # in place: a graph knows no other address
                self.state[name].copy_(value)
        self.bank.step_()
        return loss.detach()

    def readings(self) -> list[Reading]:
        """What a controller may know about the present step, a reading a group."""
        found = []
        for sums, target in zip(self.bank.sums(), self.bank.targets, strict=True):
            percent = 100 / target
            norms = sums[0].sqrt(), percent * sums[2].sqrt()
            found.append(Reading(*norms, percent * sums[1] - 100, self.bank.lr[0]))
        return found

    def drop_lr(self, factor: float) -> None:
        self.bank.lr *= factor

    def tensors(self) -> dict[str, Tensor]:
        found = self.bank.tensors()
        return found | {f"state/{name}": value for name, value in self.state.items()}

    def logits(self) -> list[dict[str, Tensor]]:
        layers = len(self.gated)
        parts = [self.bank.logits[i : i + layers] for i in range(0, len(self.bank.logits), layers)]
        return [{n: s.contiguous() for n, s in zip(self.gated, p, strict=True)} for p in parts]


class LayerwiseStep(FusedStep):
    """A fused step whose layers draw by themselves, each as `kernels.gated_linear` finds fastest.

    For blocks and channels under gates that close: what is closed is skipped, and the search gets faster
    as it gets sparser.  For few tokens: gates are drawn, or their gradient made, inside the products.
    """

    compiles = False  # its kernels are chosen as it goes

    def __init__(
        self,
        search: "AbstractGateSearch",
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> None:
        SearchStep.__init__(self, search, model, gated, members, loss)
        self._build([])
        self.leaves: list[Tensor] = []
        for i, pattern in enumerate(gated.values()):
            pattern.logits.data = self.bank.logits[i]
            pattern.seed, pattern.step = self.bank.seeds[i : i + 1], self.bank.step[1:]
            self.leaves.append(pattern.logits)
        for i, pattern in enumerate(gated.values()):
            if pattern.log_gain is not None:
                pattern.log_gain.data = self.bank.log_gain[1, i]
                self.leaves.append(pattern.log_gain)

    def become(self, way: Way) -> Self:
        for pattern in self.gated.values():
            pattern.captured = way.graph
        return super().become(way)

    def descend(self, batch: Batch) -> Tensor:
        self._aim()
        self.bank.begin_()
        loss = self.objective(batch)
        found = self.gradients(loss)
        self.bank.take_(found[: len(self.gated)], found[len(self.gated) :])
        return self._end(loss)
