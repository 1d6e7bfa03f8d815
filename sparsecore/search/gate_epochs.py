"""The epochs of a search by trained gates: its step made and launched, what each epoch came to, resume."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import NotRequired, TypedDict

from .. import schema
from ..batches import EpochBatches, Numbered
from ..engine import Way, feed_of, launch, takes_images
from ..losses import Loss
from ..objectives import TeacherMemory
from ..patterns import Gated, Masked
from ..process import between_steps
from ..progress import Advance
from ..recipe import steps_in_all
from ..sparsities import masks_from_scores
from ..writing import FileError
from .epochs import Epochs, Record, check_finite
from .protocol import Watch
from .steps import SearchStep

if TYPE_CHECKING:
    from .gated import AbstractGateSearch, Member


class _Progress(TypedDict):
    epoch: schema.Count
    sparsity: float  # expected, which rounds to a little below 0
    layers: dict[str, float]
    accuracy: NotRequired[schema.Number]
    hard_accuracy: NotRequired[schema.Number]


class _OfTicket(TypedDict):
    objective: float
    progress: _Progress


class _Record(TypedDict):
    objective: float
    tickets: list[_OfTicket]


class _Rest(TypedDict):
    dropped: bool
    engine: str


_COUNTS = ("step", "draw/")  # tensors that count steps


class GateEpochs(Epochs):
    """Epochs of gate steps; a record holds "objective" (the mean) and of each ticket "tickets"."""

    rest_kind, record_kind = _Rest, _Record

    def __init__(
        self,
        search: "AbstractGateSearch",
        model: nn.Module,
        gated: dict[str, Gated],
        members: list["Member"],
        batches: EpochBatches,
        watch: Watch | None,
        saved: str | None,
        loss: Loss,
    ) -> None:
        self.loss = loss
        self.search, self.members, self.batches, self.watch = search, members, batches, watch
        self.model, self.gated, self.length = model, gated, len(batches)
        self.steps = steps_in_all(search.epochs_for(members[0][0]), self.length)
        self.drop_at, self.dropped = int(search.lr_drop_at * self.steps), False
        self._made: SearchStep | None = None
        free = search.channels_last is None and search.fusible and len(members) == 1
        self.engine = launch(
            self._make,
            feed_of(batches, next(model.parameters()).device),
            engine=search.engine,
            steps=self.steps,
            saved=saved,
            start=Way(channels_last=bool(search.channels_last)),
            layouts=free and takes_images(model),
        )

    @property
    def device(self) -> torch.device:
        return self.engine.feed.device

    @property
    def step(self) -> SearchStep:
        assert self._made is not None
        return self._made

    def _make(self, way: Way) -> SearchStep:
        """The step for a way; one for another memory format is made anew."""
        if self._made is None or self._made.search.channels_last != way.channels_last:
            search = replace(self.search, channels_last=way.channels_last)
            members = [(1 - sparsity, seed) for sparsity, seed in self.members]
            self._made = search._step(self.model, self.gated, members, self.loss)
            self._made.schedule(self.steps)
        return self._made

    def epoch(self, index: int, advance: Advance) -> Record:
        order = self.batches.order(index) if isinstance(self.batches, Numbered) else None
        self.step.begin_epoch(None if order is None else len(order))
        self.step.clear()
        self.engine.begin(index)
        for i in range(self.length):
            if index * self.length + i == self.drop_at:
                self._drop_lr()
            self.engine()
            advance()
            between_steps()
        means = (self.step.total / self.length).tolist()
        mean = check_finite(
            sum(means) / len(means), index, self.search.objective.name, self.batches
        )
        tickets = [
            {"objective": objective, "progress": self._record(index, logits)}
            for objective, logits in zip(means, self.step.logits(), strict=True)
        ]
        return {"objective": mean, "tickets": tickets}

    def _drop_lr(self) -> None:
        self.step.drop_lr(self.search.lr_drop)
        self.dropped = True

    def scores(self) -> list[dict[str, torch.Tensor]]:
        """Of each ticket, by layer."""
        return [
            {name: self.step.gate.score(s.detach()) for name, s in logits.items()}
            for logits in self.step.logits()
        ]

    def _record(self, index: int, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Expected sparsity by layer, and what `watch` says of soft gates and of the ticket by then."""
        layers, gated = self.step.net.layers, self.step.gated
        kept = self.step.kept.by_layer(self.step.gate, [*logits.values()]).tolist()
        counts = [layers[name].raw_weight.numel() for name in logits]
        record = {
            "epoch": index + 1,
            "sparsity": 1 - sum(kept) / sum(counts),
            "layers": {n: 1 - k / c for n, k, c in zip(gated, kept, counts, strict=True)},
        }
        if self.watch is not None:  # of one ticket alone
            record["accuracy"] = self._watched(self.watch, dict.fromkeys(gated))
            shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
            sparsity = self.members[0][0]
            record["hard_accuracy"] = self._watched(
                self.watch,
                masks_from_scores(self.scores()[0], shapes, sparsity, self.search.granularity),
            )
        return record

    def _watched(
        self, watch: Watch, masks: Mapping[str, torch.Tensor] | Mapping[str, None]
    ) -> float:
        """`watch` of the network under masks, or with its gates at their mean."""
        layers = self.step.net.layers
        drawn = {name: pattern.drawn for name, pattern in self.step.gated.items()}
        try:
            for name, pattern in self.step.gated.items():
                pattern.drawn = None
                mask = masks[name]
                if mask is not None:
                    layers[name].pattern = Masked(mask)
            return watch(self.step.net.model)
        finally:
            for name, pattern in self.step.gated.items():
                pattern.drawn = drawn[name]
                layers[name].pattern = pattern

    def told(self, index: int, record: Record) -> bool:
        tickets = record["tickets"]
        return len(tickets) == len(self.members) and all(
            t["progress"]["epoch"] == index + 1
            and t["progress"]["layers"].keys() == self.gated.keys()
            for t in tickets
        )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {name: value.contiguous() for name, value in self.step.tensors().items()}
        memory = self.step.net.memory
        if memory is not None and memory.table is not None and schema.all_finite(memory.table):
            tensors["teacher"] = memory.table
        return tensors, {"dropped": self.dropped, "engine": str(self.engine.way)}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], rest: dict[str, Any], epochs: int) -> None:
        own, tensors = self.step.tensors(), dict(tensors)
        teacher = tensors.pop("teacher", None)
        found = schema.tensors(tensors, own, "search", ("v/", "exp_avg_sq/", "step"))
        for name, value in found.items():  # what is drawn and aimed at is looked up by them
            if name.startswith(_COUNTS) and bool((value != epochs * self.length).any()):
                raise FileError(f"{name}: expected {epochs * self.length} steps, got others")
        if teacher is not None:
            self._remember(teacher)
        for name, value in own.items():
            value.copy_(found[name])
        if rest["dropped"]:
            self._drop_lr()

    def _remember(self, table: torch.Tensor) -> None:
        """The teacher's scores by sample; `Net.outputs` refuses those of another shape than the network's."""
        order = self.batches.order(0) if isinstance(self.batches, Numbered) else None
        if order is None or self.step.batchwise:
            raise FileError(
                "teacher: expected none for data that differs from epoch to epoch, got some"
            )
        plain = table.dtype in schema.FLOATS and table.ndim > 1 and len(table) == len(order)
        if not (plain and schema.all_finite(table)):
            raise FileError(
                f"teacher: expected finite scores of {len(order)} samples, got {tuple(table.shape)} or others"
            )
        self.step.net.memory = TeacherMemory(len(table))
        self.step.net.memory.table = table.to(self.step.device)
