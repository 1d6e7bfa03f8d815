"""OneShot: score every weight once, keep the best."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..batches import EpochBatches
from ..convert import require_dense_parameters
from ..granularity import Granularity, Weight
from ..progress import QUIET, Progress
from ..scores import Score
from ..tickets import Ticket
from .protocol import Watch


@dataclass(frozen=True)
class OneShot:
    """`OneShot(snip)(model, batches, sparsity=0.9)`; a unit larger than a weight scores the mean over its weights."""

    score: Score
    granularity: Granularity = field(default_factory=Weight)
    seed: int = 0

    def __call__(
        self,
        model: nn.Module,
        batches: EpochBatches,
        *,
        sparsity: float,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
        watch: Watch | None = None,
    ) -> Ticket:
        """A ticket that keeps the globally best-scored weights and starts from the model's weights.

        Errors: ValueError for a sparsity outside [0, 1), a model without sparse layers, NaN scores.
        """
        layers = require_dense_parameters(model)
        scores = {}
        for name, values in self.score(model, batches, self.seed).items():
            sizes = self.granularity.sizes(layers[name].raw_weight.shape).to(values.device)
            scores[name] = self.granularity.gather(values) / sizes
        # A score is any callable; a partial or an instance has no __name__.
        method = getattr(self.score, "__name__", type(self.score).__name__)
        meta = {"method": method, "sparsity": sparsity, "seed": self.seed}
        return Ticket.from_scores(scores, model, sparsity, self.granularity, meta=meta)
