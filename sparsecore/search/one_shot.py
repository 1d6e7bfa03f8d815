"""OneShot: score every weight once, keep the best."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..batches import whole_epoch
from ..convert import require_dense_parameters
from ..granularity import Granularity, Weight
from ..kinds import check_fields
from ..loaders import batches_of
from ..losses import LossLike, loss_of
from ..process import seeded
from ..progress import QUIET, Progress
from ..scores import Score, score_name, scored
from ..sparsities import Distribution, by_layer, check_possible
from ..tickets import Ticket
from .protocol import Watch
from .told import telling


@dataclass(frozen=True)
class OneShot:
    """`OneShot(snip)(model, batches, sparsity=0.9)`; a unit larger than a weight scores the mean over its weights.

    Args:
        score: sees epoch 0 of the batches.
        distribution: gives every layer its density, within which it is ranked by itself
            (`sparsities.erk_densities`); None ranks all layers together.
    """

    score: Score
    granularity: Granularity = field(default_factory=Weight)
    seed: int = 0
    distribution: Distribution | None = None

    def __post_init__(self) -> None:
        check_fields(self)

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
        """A ticket that keeps the best-scored weights and starts from the model's weights.

        Args: progress, checkpoint, watch: nothing to do in a search of one step.

        Errors: ValueError for a sparsity outside [0, 1), a model without sparse layers, NaN scores, a granularity
        that cannot hold as many weights, or a score without data to read; DataEnded for fewer batches than their
        length says.
        """
        batches, by = batches_of(batches, model, steps_per_epoch, empty=True), loss_of(loss)
        layers = require_dense_parameters(model)
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        densities = by_layer(self.distribution, shapes, sparsity, self.granularity)
        check_possible(shapes, sparsity, self.granularity, densities)
        device = next(iter(layers.values())).raw_weight.device
        # A loss of the user's may draw.
        with seeded(self.seed, [device]) if by.facts else nullcontext():
            found = scored(self.score, model, whole_epoch(batches, 0), self.seed, by)
        scores = {name: self.granularity.mean(values) for name, values in found.items()}
        meta = {
            "method": score_name(self.score),
            "sparsity": sparsity,
            "seed": self.seed,
            "loss": by.name,
            "distribution": getattr(self.distribution, "__name__", "global"),
        }
        return Ticket.from_scores(
            scores, model, sparsity, self.granularity, meta=meta, densities=densities
        )
