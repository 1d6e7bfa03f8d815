"""Sanity checks: does a ticket know more than how sparse each layer should be?  Paired tests over seeds.

A real ticket loses accuracy when its places are shuffled within each layer, when its start weights are drawn
anew, and when it was found on corrupted data (Frankle et al. 2021, arXiv 2009.08576; Su et al. 2020,
arXiv 2009.11094).  Inverted scores should be worse than all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.table import Table
from scipy import stats

CHECKS: dict[str, str] = {  # what a loss of accuracy under each shows
    "shuffle": "the places within a layer matter",
    "reinit": "the start weights matter",
    "invert": "the ranking points the right way",
    "corrupt": "the data matter",
}
LEVEL = 0.05  # of the tests


@dataclass(frozen=True)
class Verdict:
    """One control of a method at a sparsity.

    Args:
        loss: mean over seeds of the ticket's accuracy minus its control's, percentage points.
        spread: standard deviation of the differences; NaN for one seed.
        p: of the one-sided paired t-test that the ticket is better; NaN where it cannot be computed.
        seeds: number of pairs.
    """

    check: str
    loss: float
    spread: float
    p: float
    seeds: int

    @property
    def passed(self) -> bool:
        """Whether the ticket is better than its control, beyond chance at the level of 5 %."""
        return self.p < LEVEL

    @property
    def text(self) -> str:
        if self.passed:
            return CHECKS[self.check]
        if self.seeds < 2:
            return "one seed: no test"
        return f"no difference shown by {self.seeds} seeds"


def verdict(check: str, ticket: Mapping[int, float], control: Mapping[int, float]) -> Verdict:
    """Compares accuracies in percent by seed; seeds that only one of them has are left out.

    Errors: ValueError for an unknown check or no seed in common.
    """
    if check not in CHECKS:
        raise ValueError(f"check: expected one of {', '.join(CHECKS)}, got {check!r}")
    seeds = sorted(ticket.keys() & control.keys())
    if not seeds:
        raise ValueError(f"{check}: expected accuracies for the same seeds, got none in common")
    differences = [ticket[seed] - control[seed] for seed in seeds]
    spread = stdev(differences) if len(seeds) > 1 else math.nan
    if spread > 0:
        p = float(stats.t.sf(mean(differences) / spread * math.sqrt(len(seeds)), len(seeds) - 1))
    else:  # equal differences: the test has no scale; one seed: there is no test
        p = math.nan if len(seeds) < 2 else 0.0 if differences[0] > 0 else 1.0
    return Verdict(check, mean(differences), spread, p, len(seeds))


def table_of(verdicts: Sequence[Verdict], title: str) -> Table:
    """A row per control."""
    table = Table(title=title)
    for column in ("control", "loses, points", "p", "verdict"):
        table.add_column(column, justify="right" if column in ("loses, points", "p") else "left")
    for v in verdicts:
        loss = f"{v.loss:+.2f}" + ("" if math.isnan(v.spread) else f" ± {v.spread:.2f}")
        table.add_row(v.check, loss, "-" if math.isnan(v.p) else f"{v.p:.2g}", v.text)
    return table
