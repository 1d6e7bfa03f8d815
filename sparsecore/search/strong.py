"""Strong tickets: a subnetwork of untrained weights that works as it is (arXiv 2603.08914)."""

from dataclasses import dataclass, field
from typing import Any

from ..gates import AbstractGate, Gaussian
from ..objectives import Objective, task
from .gated import AbstractGateSearch


@dataclass(frozen=True)
class StrongSearch(AbstractGateSearch):
    """Trains relaxed Bernoulli gates over frozen weights; the ticket is finished, nothing is trained after it.

    Every gate is open with some probability and the loss is the task's plus lambda times the expected
    number of open ones, without straight-through estimates or rounds of pruning.  The paper does not say how
    lambda was set: GradBalance sets it so that the asked density is met, `FixedPenalty` keeps it.

    The ticket keeps the best-scored gates, exactly as many as `sparsity` asks for.  Its provenance has, with
    `watch`, the accuracy with the gates at their mean and of the ticket that would be found by then, by epoch.
    """

    epochs: int = 30
    objective: Objective = task
    gate: AbstractGate = field(default_factory=Gaussian)
    lr: float = 0.01
    gain_lr: float = 0.0
    start_density: float | None = 0.84  # mu = 0.5 at sigma = 0.5
    ramp: float = 0.6

    @property
    def name(self) -> str:
        return "strong"

    def _meta(self, sparsity: float, seed: int) -> dict[str, Any]:
        return super()._meta(sparsity, seed) | {"finished": True}
