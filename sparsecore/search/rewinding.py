"""Rewinding: iterative magnitude pruning, the search that the others are measured against."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checkpoints, schema
from ..batches import EpochBatches
from ..convert import require_dense_parameters
from ..copies import copied
from ..engine import check_engine
from ..granularity import NM, Granularity, Weight
from ..kinds import check_fields
from ..loaders import batches_of
from ..locks import held
from ..losses import Loss, LossLike, loss_of
from ..progress import QUIET, Progress
from ..recipe import Recipe
from ..regions import Repellent
from ..rounds import Round, RoundError, round_files, round_path
from ..sparsities import check_possible, check_sparsity, kept_count, masks_from_scores
from ..telling import note_training
from ..tickets import Ticket, dense_state
from ..training import train
from ..unsaved import Unsaved
from ..writing import FileError
from .protocol import SearchError, Watch
from .told import telling

_REWINDS = ("weights", "learning-rate")
_MOST_ROUNDS = 10_000


@dataclass(frozen=True)
class Rewinding:
    """Trains, removes the smallest weights, rewinds the others, and again.

    Round i trains at density (1 - rate)^i; the last prune goes exactly to the sparsity asked for.  The
    original lottery ticket rewinds to initialisation (Frankle & Carbin 2019, arXiv 1803.03635), LTR to
    `start_epoch` (Frankle et al. 2020, arXiv 1912.05671); learning-rate rewinding trains on from where
    the weights are (Renda, Frankle & Carbin 2020, arXiv 2003.02389).

    What is rewound: every tensor of the dense state bit for bit, so BatchNorm's statistics go where
    the weights go, and stay with them under learning-rate rewinding.  The optimiser is always a fresh
    one, the schedule and the data's order start again at `start_epoch`.

    Units larger than a weight rank by their mean magnitude.  N:M removes all but the N best of each group
    first, down to the density it can hold, since groups that other prunes have emptied could not be filled.

    Args:
        recipe: of every round; its `epochs` are not looked at.
        epochs: of training after the rewind point, per round; parts count to the nearest batch.
        start_epoch: the absolute epoch of the weights that the model holds, 0 for untrained ones;
            the schedule spans start_epoch + epochs.
        rate: fraction of what is left that a prune removes.
        rewind: `weights` or `learning-rate`.
        repel: strength of a `regions.Repellent` from the optima of all earlier rounds, in every round's loss: above
            0 it keeps rounds apart, below 0 it draws them together (Maene, Li & Moens 2021).
        seed: of dropout and the like while training; the data's order belongs to the batches.
        rounds: a folder that keeps the rounds (`rounds.load_rounds`).  They do not depend on the sparsity, so
            a search for another one goes on with them: several sparsities cost as much as the highest.
            For one search at a time.  None: they lie in the checkpoint until the ticket is found.
        engine: of every round's training (`train`); what is compiled serves all rounds.

    Errors: ValueError for a value out of range.
    """

    recipe: Recipe
    epochs: float
    start_epoch: float = 0
    rate: float = 0.2
    rewind: str = "weights"
    repel: float = 0.0
    granularity: Granularity = field(default_factory=Weight)
    seed: int = 0
    rounds: Path | None = None
    engine: str = field(default="auto", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_engine(self.engine)
        checks = (
            ("epochs", 0 < self.epochs < math.inf, "more than 0"),
            ("start_epoch", 0 <= self.start_epoch < math.inf, "at least 0"),
            ("rate", 0 < self.rate < 1, "a fraction removed per round, 0 < rate < 1"),
            ("rewind", self.rewind in _REWINDS, f"one of {', '.join(_REWINDS)}"),
            ("repel", math.isfinite(self.repel), "a finite number, 0 for none"),
        )
        for name, good, expected in checks:
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def name(self) -> str:
        """The method's, for the ticket's provenance."""
        if self.rewind == "learning-rate":
            return "lr-rewind"
        return "ltr" if self.start_epoch else "imp"

    def count(self, sparsity: float) -> int:
        """How many networks a ticket of `sparsity` trains: the smallest n with (1 - rate)^n <= 1 - sparsity.

        Errors: ValueError for a sparsity outside (0, 1), and a rate that takes more than 10,000 rounds to get there.
        """
        if check_sparsity(sparsity) == 0:
            raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
        # 1 - 0.8 ** k is not binary: what is a millionth of a round above k takes k rounds.
        rounds = math.log1p(-sparsity) / math.log1p(-self.rate)
        if rounds > _MOST_ROUNDS:
            raise ValueError(
                f"rate: expected at most {_MOST_ROUNDS:,} rounds to a sparsity of {sparsity:g}, got {rounds:,.0f} at "
                f"{self.rate:g}; take a higher rate"
            )
        return max(1, math.ceil(rounds - 1e-6))

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
        """The ticket of the largest surviving weights; the model itself is not touched.

        Its weights are the model's, or with learning-rate rewinding the last trained ones: both are
        to be trained on from `start_epoch`.  `meta["search_seconds"]` counts the training of all rounds
        that the ticket needed, reused ones too; `meta["rounds"]` tells of each.

        Args:
            model: with sparse layers (`sparsify_`), holding the weights of `start_epoch`.
            batches: the training batches of the recipe.
            sparsity: fraction removed, in (0, 1).
            checkpoint: a folder, for what is being trained (and the rounds, if `rounds` is None).  If it
                exists the search goes on from there; it stays until the ticket is saved.
            watch: measures each round's trained network; a reused round tells what it was told then.

        Errors: ValueError for bad arguments; SearchError for training that cannot go on, files of another
        run or damaged ones.
        """
        batches, by = batches_of(batches, model, steps_per_epoch), loss_of(loss)
        checkpoints.check_resumable(checkpoint or self.rounds, batches)
        layers = require_dense_parameters(model)
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        scores = {
            name: torch.zeros(self.granularity.units(s), dtype=torch.float32)
            for name, s in shapes.items()
        }
        count = self.count(sparsity)
        check_possible(shapes, sparsity, self.granularity)
        end = self.start_epoch + self.epochs
        if round(end * len(batches)) <= round(self.start_epoch * len(batches)):
            raise ValueError(
                f"epochs: expected at least one of {len(batches)} batches, got {self.epochs} epochs"
            )
        files = _Files.make(self.rounds, checkpoint)
        run = checkpoints.fingerprint(model, batches, replace(self, rounds=None), loss=by)
        start, told = dense_state(model), []
        optima: list[Mapping[str, Tensor]] = []  # of earlier rounds, where they count
        with held(self.rounds), progress.task("rounds", total=count) as advance:
            for index in range(count):
                density = (1 - self.rate) ** index
                masks = _prune(scores, shapes, 1 - density, self.granularity)
                asked = Round(index, density, masks, start, {}, 0.0, None, run)
                done = files.find(asked)
                if done is None:
                    left = count - index
                    done = self._train(
                        model, batches, asked, optima, files, progress, watch, left, by
                    )
                if self.repel:
                    optima.append(done.trained)
                files.forget_training(index)
                scores = _rank(done, scores, self.granularity)
                if self.rewind == "learning-rate":
                    start = done.trained
                facts = {name: getattr(done, name) for name in ("density", "accuracy", "seconds")}
                told.append(facts | {"engine": done.engine})
                advance(**{name: value for name, value in facts.items() if value is not None})
        meta = self._meta(sparsity) | {
            "search_seconds": sum(facts["seconds"] for facts in told),
            "engine": told[-1]["engine"],
            "loss": by.name,
            "rounds": told,
            "progress": [
                {"epoch": i, "sparsity": 1 - r["density"], "accuracy": r["accuracy"]}
                for i, r in enumerate(told)
            ],
        }
        ticket = Ticket.from_scores(scores, model, sparsity, self.granularity, meta=meta)
        if self.rewind == "learning-rate":
            ticket = replace(ticket, weights=dense_state(_network(model, ticket.masks, start)))
        return replace(ticket, unsaved=Unsaved.of(files.temporaries())[0])

    def _meta(self, sparsity: float) -> dict[str, Any]:
        return {
            "method": self.name,
            "rewind": self.rewind,
            "sparsity": sparsity,
            "seed": self.seed,
            "rate": self.rate,
            "repel": self.repel,
            "start_epoch": self.start_epoch,
            "round_epochs": self.epochs,
            "recipe": asdict(self.recipe) | {"milestones": list(self.recipe.milestones)},
        }

    def _train(
        self,
        model: nn.Module,
        batches: EpochBatches,
        asked: Round,
        optima: Sequence[Mapping[str, Tensor]],
        files: "_Files",
        progress: Progress,
        watch: Watch | None,
        left: int,
        loss: Loss,
    ) -> Round:
        """The round that is asked for, with what its training gave; kept, where rounds are."""
        # A new copy each time: nothing of an earlier round can be left in it.
        network = _network(model, asked.masks, asked.start)
        end = self.start_epoch + self.epochs
        try:
            history = train(
                network,
                batches,
                None,
                self.recipe,
                start_epoch=self.start_epoch,
                stop_epoch=end,
                total_epochs=end,
                seed=self.seed,
                penalty=Repellent(optima, self.repel) if optima else None,
                checkpoint=files.training(asked.index),
                progress=progress,
                engine=self.engine,
                repeats=left,
                loss=loss,
            )
        except FileError as error:
            raise SearchError(
                f"round {asked.index}: {error}; make room, or remove a damaged file: the rounds before "
                "this one are kept"
            ) from None
        except ValueError as error:
            raise SearchError(f"round {asked.index}: {error}") from error
        note_training(network, history.unreached)
        trained = dense_state(network)
        accuracy = None if watch is None else watch(network)
        done = replace(
            asked,
            trained=trained,
            seconds=history.seconds,
            accuracy=accuracy,
            engine=history.way,
        )
        files.keep(done)
        return done


@dataclass(frozen=True)
class _Files:
    """Where a search keeps what it has: the folders of its rounds and of the training that is going on."""

    rounds: Path | None
    checkpoint: Path | None
    temporary: bool  # whether the rounds are removed with the checkpoint

    @classmethod
    def make(cls, rounds: Path | None, checkpoint: Path | None) -> "_Files":
        for folder in (rounds, checkpoint):
            if folder is not None:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise SearchError(
                        f"{folder}: expected a folder of this search or nothing ({error.strerror}); "
                        "if it belongs to another search, name another or remove it"
                    ) from None
        files = cls(rounds or checkpoint, checkpoint, rounds is None)
        if files.rounds is not None:
            try:
                round_files(files.rounds)
            except RoundError as error:
                raise SearchError(str(error)) from None
        return files

    def training(self, index: int) -> Path | None:
        # By round: a kill can leave a finished round's behind, which the next one must not take for its own.
        return self.checkpoint and self.checkpoint / f"training-{index:04}.safetensors"

    def find(self, asked: Round) -> Round | None:
        """The finished round, if there is one.  Errors: SearchError unless it is the one asked for."""
        if self.rounds is None or not (path := round_path(self.rounds, asked.index)).exists():
            return None
        try:
            found = Round.load(path)
        except RoundError as error:
            raise SearchError(str(error)) from None
        if not checkpoints.same_run(found.run, asked.run):
            raise SearchError(
                f"{path} belongs to another run ({checkpoints.told_apart_by(found.run, asked.run)}), by its options, "
                "model, data or start weights; name another folder"
            )
        same = (
            found.index == asked.index
            and found.masks.keys() == asked.masks.keys()
            and found.start.keys() == asked.start.keys()
        )
        if not same or not all(torch.equal(found.masks[n], m) for n, m in asked.masks.items()):
            raise SearchError(
                f"{path} does not follow from the round before it: remove it and the rounds after "
                "it, and the search makes them again"
            )
        try:
            for what, state in (("start", found.start), ("trained", found.trained)):
                schema.tensors(state, asked.start, f"{path}: {what}")
        except FileError as error:
            raise SearchError(f"{error}; remove it and the rounds after it") from None
        # A file sorts by name; equal magnitudes go to the earlier layer, on the way there and back alike.
        return found.ordered_as(asked)

    def keep(self, done: Round) -> None:
        if self.rounds is not None:
            try:
                done.save(round_path(self.rounds, done.index))
            except RoundError as error:
                raise SearchError(
                    f"{error}; make room and call again: the rounds before this one are kept"
                ) from None

    def forget_training(self, index: int) -> None:
        path = self.training(index)
        if path is not None:
            path.unlink(missing_ok=True)

    def temporaries(self) -> list[Path]:
        """What is no longer needed once the ticket is saved, in the order in which it may go."""
        folder = self.checkpoint
        if folder is None:
            return []
        patterns = ("training-*", "round-*") if self.temporary else ("training-*",)
        # The last round first: what a kill leaves is a shorter run then.
        paths = (path for pattern in patterns for path in folder.glob(pattern))
        return [*sorted(paths, reverse=True), folder]


def _network(
    model: nn.Module, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of the model that holds `weights` under `masks`."""
    return Ticket(masks, weights).apply_(copied(model))


def _rank(done: Round, before: Mapping[str, Tensor], granularity: Granularity) -> dict[str, Tensor]:
    """A score per unit: mean |theta| where it is kept; below 0, and the lower the earlier, where it is removed.

    On the CPU, from what the round's file holds: the same there, whatever device trained.
    """
    scores = {}
    for name, weight in done.weights().items():
        mask = done.masks[name]
        size = granularity.gather(weight.float().abs()) / granularity.sizes(mask.shape)
        kept = granularity.gather(mask.long()) > 0
        # Monotone, and negative: the removed keep their order, one generation below another.
        scores[name] = torch.where(kept, size, F.logsigmoid(before[name]))
    return scores


def _prune(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    granularity: Granularity,
) -> dict[str, Tensor]:
    """Masks of the best-scored units; N:M may still be on its way to its pattern."""
    if isinstance(granularity, NM):
        best = {name: granularity.allowed(score) for name, score in scores.items()}
        total = sum(score.numel() for score in scores.values())
        if sum(int(b.sum()) for b in best.values()) < kept_count(total, sparsity):
            safe = {name: score.where(~best[name], math.inf) for name, score in scores.items()}
            return masks_from_scores(safe, shapes, sparsity)
    return masks_from_scores(scores, shapes, sparsity, granularity)
