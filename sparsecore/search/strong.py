"""Strong tickets: a subnetwork of untrained weights that works as it is (arXiv 2603.08914)."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..batches import EpochBatches
from ..convert import require_dense_parameters
from ..gates import AbstractGate, Gaussian
from ..objectives import Objective, task
from ..tickets import Ticket
from .finished import check_weights, finished, searched_in
from .gated import AbstractGateSearch


@dataclass(frozen=True)
class StrongSearch(AbstractGateSearch):
    """Trains relaxed Bernoulli gates over frozen weights; the ticket is finished, nothing is trained after it.

    Every gate is open with some probability and the loss is the task's plus lambda times the expected
    number of open ones, without straight-through estimates or rounds of pruning.  The paper does not say how
    lambda was set: GradBalance moves it so that the asked density is met, `FixedPenalty` keeps one, yours or
    the one that it finds by trying.

    The ticket keeps the best-scored gates, exactly as many as `sparsity` asks for.  Its provenance has, with
    `watch`, the accuracy with the gates at their mean and of the ticket that would be found by then, by epoch.

    Args:
        weights: that are searched in, "as-is" or as `EdgePopup` has them, "scaled" by the ticket's density.
        lr: at ten times this GradBalance closes nearly all gates before it can notice.
        start_density: 0.84 is mu = 0.5 at sigma = 0.5.
    """

    epochs: int | None = 30
    objective: Objective = task
    gate: AbstractGate = field(default_factory=Gaussian)
    lr: float = 0.01
    gain_lr: float = 0.0
    start_density: float | None = 0.84
    ramp: float = 0.6
    weights: str = "as-is"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights)

    @property
    def name(self) -> str:
        return "strong"

    def _meta(self, sparsity: float, seed: int) -> dict[str, Any]:
        return super()._meta(sparsity, seed) | {"weights": self.weights}

    def _searched(self, model: nn.Module, sparsity: float) -> nn.Module:
        if self.weights == "as-is":
            return model
        densities = dict.fromkeys(require_dense_parameters(model), 1 - sparsity)
        return searched_in(model, self.weights, densities)

    def _finish(self, ticket: Ticket, model: nn.Module, batches: EpochBatches) -> Ticket:
        return finished(ticket, model, batches)
