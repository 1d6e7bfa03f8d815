"""Iterative: prune a little, score what is left, and again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints, schema
from ..batches import EpochBatches, whole_epoch
from ..convert import require_dense_parameters, sparse_layers
from ..granularity import Granularity, Weight
from ..interrupts import signals_later
from ..kinds import check_fields
from ..layer import SparseLayer
from ..loaders import batches_of
from ..losses import Loss, LossLike, loss_of
from ..patterns import Masked
from ..progress import QUIET, Advance, Progress
from ..scores import Score, score_name, scored, synflow
from ..sparsities import check_possible, masks_from_scores
from ..tickets import Ticket
from ..unsaved import Unsaved
from .epochs import Epochs, Record, run_epochs
from .protocol import Watch
from .told import telling


@dataclass(frozen=True)
class Iterative:
    """Prunes in rounds: after round e of n, (1 - sparsity) ** (e / n) of the weights are left.

    Each round scores the network as it is by then, so that what leads nowhere any more falls next.
    With `synflow` and 100 rounds this is SynFlow (Tanaka et al. 2020, algorithm 1), with `snip` Iterative
    SNIP (de Jorge et al. 2021).  Nothing that has fallen comes back.

    The ticket's scores are the rounds that a unit survived, plus half its rank (0 to 1) in the last one that
    scored it: whatever fell earlier ranks lower.

    Args:
        score: sees epoch e - 1 of the batches in round e.
        batches_per_round: so many batches of that epoch; None: all.

    Errors: ValueError for rounds or batches_per_round below 1.
    """

    score: Score = synflow
    rounds: int = 100
    granularity: Granularity = field(default_factory=Weight)
    seed: int = 0
    batches_per_round: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if self.batches_per_round is not None and self.batches_per_round < 1:
            raise ValueError(
                f"batches_per_round: expected None (all) or at least 1, got {self.batches_per_round}"
            )

    @telling
    def __call__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        sparsity: float,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
        watch: Watch | None = None,
        loss: LossLike = None,
        steps_per_epoch: int | None = None,
    ) -> Ticket:
        """A ticket of the units that survive all rounds; the model is returned to its former state.

        Args:
            sparsity: fraction removed, in [0, 1).
            checkpoint: written after every round.
            watch: measures the masked network after every round; in the provenance under "progress".

        Errors: ValueError for bad arguments or NaN scores; SearchError for another search's checkpoint.
        """
        batches, by = batches_of(batches, model, steps_per_epoch, empty=True), loss_of(loss)
        checkpoints.check_resumable(checkpoint, batches)
        layers = require_dense_parameters(model)
        schedule = self._schedule(layers, sparsity)
        meta: dict[str, Any] = {
            "method": f"iterative-{score_name(self.score)}",
            "sparsity": sparsity,
            "seed": self.seed,
            "rounds": self.rounds,
            "batches_per_round": self.batches_per_round,
        }
        run = ""
        if checkpoint is not None:
            run = checkpoints.fingerprint(model, batches, meta, str(self.granularity), loss=by)
        meta["loss"] = by.name
        work = _Rounds(self, model, batches, schedule, watch, by)
        with _patterns_put_back(layers):
            records = run_epochs(
                work,
                self.rounds,
                run=run,
                progress=progress,
                checkpoint=checkpoint,
            )
        if watch is not None:
            meta["progress"] = records
        standing = work.standing
        ticket = Ticket.from_scores(standing, model, sparsity, self.granularity, meta=meta)
        return replace(ticket, unsaved=Unsaved.of([checkpoint])[0])

    def _schedule(self, layers: Mapping[str, SparseLayer], sparsity: float) -> list[float]:
        """The sparsity after each round; it begins where N:M begins to be possible."""
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        check_possible(shapes, sparsity, self.granularity)
        possible = [
            self.granularity.project(torch.ones(s)).count_nonzero() for s in shapes.values()
        ]
        least = 1 - int(sum(possible)) / sum(s.numel() for s in shapes.values())
        shares = ((1 - sparsity) ** (e / self.rounds) for e in range(1, self.rounds))
        return [*(max(1 - share, least) for share in shares), sparsity]


class _Rounds(Epochs):
    """Rounds of a model; `standing`: by layer, the rounds that each unit survived and half its rank."""

    def __init__(
        self,
        search: Iterative,
        model: nn.Module,
        batches: EpochBatches,
        schedule: Sequence[float],
        watch: Watch | None,
        loss: Loss,
    ) -> None:
        self.loss = loss
        self.search, self.model, self.batches = search, model, batches
        self.schedule, self.watch = schedule, watch
        self.layers = sparse_layers(model)
        weights = {name: layer.raw_weight for name, layer in self.layers.items()}
        self.standing = {
            name: torch.zeros(
                search.granularity.units(w.shape), device=w.device, dtype=torch.float32
            )
            for name, w in weights.items()
        }

    @property
    def device(self) -> torch.device:
        return next(iter(self.standing.values())).device

    def epoch(self, index: int, advance: Advance) -> Record:
        self._mask_(index)
        self._round_(index + 1, self.schedule[index])
        advance()
        record: Record = {"epoch": index + 1, "sparsity": self.schedule[index]}
        if self.watch is not None:
            self._mask_(index + 1)
            record["accuracy"] = self.watch(self.model)
        return record

    def _mask_(self, rounds: int) -> None:
        """Lets the model compute with what survived so many rounds; its parameters stay whole."""
        for name, layer in self.layers.items():
            shape, standing = layer.raw_weight.shape, self.standing[name]
            layer.pattern = Masked(self.search.granularity.spread(standing >= rounds, shape))

    def _round_(self, number: int, sparsity: float) -> None:
        """Scores the masked model, and notes what survives."""
        search, standing = self.search, self.standing
        part = islice(whole_epoch(self.batches, number - 1), search.batches_per_round)
        found = scored(search.score, self.model, part, search.seed, self.loss)
        alive = {name: standing[name] >= number - 1 for name in found}
        scores = {
            name: search.granularity.mean(values).where(alive[name], -torch.inf)
            for name, values in found.items()
        }
        shapes = {name: values.shape for name, values in found.items()}
        masks = masks_from_scores(scores, shapes, sparsity, search.granularity)
        # Where units differ in size, a small one that has fallen may fit again: it stays where it is.
        kept = {name: search.granularity.gather(mask.long()) > 0 for name, mask in masks.items()}
        last = number == search.rounds
        ranked = alive if last else {name: alive[name] & ~kept[name] for name in alive}
        for name, rank in _ranks(scores, ranked).items():
            rounds = number - 1 + kept[name].float()
            standing[name] = torch.where(alive[name], rounds + rank / 2, standing[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self.standing), {}

    def load(self, tensors: dict[str, Tensor], rest: dict[str, Any], epochs: int) -> None:
        found = schema.tensors(tensors, self.standing, "search")
        for name, s in self.standing.items():
            s.copy_(found[name])


def _ranks(scores: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ranks, from 0 to 1, of the chosen units among each other, 0 for others.

    Among equals the lower index ranks higher, as in a top-k.
    """
    places = torch.cat([chosen.flatten() for chosen in of.values()]).nonzero().squeeze(1)
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = flat[places].sort(stable=True, descending=True).indices
    ranks = torch.zeros(len(flat), device=flat.device, dtype=torch.float32)
    ranks[places[order]] = torch.linspace(
        1, 0, len(places), device=flat.device, dtype=torch.float32
    )
    parts = ranks.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


@contextmanager
def _patterns_put_back(layers: Mapping[str, SparseLayer]) -> Iterator[None]:
    patterns = {name: layer.pattern for name, layer in layers.items()}
    try:
        yield
    finally:
        with signals_later():
            for name, layer in layers.items():
                layer.pattern = patterns[name]
