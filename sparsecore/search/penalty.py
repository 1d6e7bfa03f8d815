"""The constant lambda that leads to the asked sparsity, found by search upon search."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from .. import checkpoints
from ..batches import EpochBatches
from ..control import FixedPenalty
from ..losses import Loss
from ..progress import Progress
from ..tickets import Ticket
from .epochs import read_own
from .protocol import Search, Watch

TRIES = 10
TOLERANCE = 0.1  # of the density, as much as GradBalance's slack

Tried = Sequence[tuple[float, float]]  # each lambda, and the sparsity at which its gates ended


def fit_penalty(
    search: Any,
    model: nn.Module,
    batches: EpochBatches,
    *,
    sparsity: float,
    progress: Progress,
    checkpoint: Path | None,
    watch: Watch | None,
    facts: Any,
    loss: Loss,
) -> Ticket:
    """The ticket of the search under a constant lambda whose gates end within a tenth of the asked density.

    lambda begins at 1, moves by factors of 4 until one is too weak and one too strong, and by geometric means from
    there.  After 10 searches the closest one's ticket has to do; `meta["penalties"]` tells of all.

    Args:
        search: with a field `control` and a ticket that knows its "natural_sparsity".
        checkpoint: written after every search; the one that runs has its own beside it.
        facts: what the search's `checkpoints.fingerprint` tells apart.

    Errors: what the search raises; SearchError for a checkpoint of another search.
    """
    begun, run, inner = perf_counter(), "", None
    tried: list[tuple[float, float]] = []
    if checkpoint is not None:
        inner = checkpoint.with_name(checkpoint.name + ".search")
        run = checkpoints.fingerprint(model, batches, "penalty", facts, loss=loss)
        begun -= checkpoints.seconds(checkpoint) + checkpoints.seconds(inner)
        if checkpoint.exists():
            tried = [(weight, found) for weight, found in read_own(checkpoint, run)[1]["penalties"]]

    def once(weight: float) -> Ticket:
        under: Search = replace(search, control=FixedPenalty(weight))  # type: ignore[type-var]
        return under(
            model,
            batches,
            sparsity=sparsity,
            progress=progress,
            checkpoint=inner,
            watch=watch,
            loss=loss,
        )

    last: tuple[float, Ticket] | None = None
    with progress.task("lambda", total=TRIES) as advance:
        advance(len(tried))
        while (weight := next_weight(tried, sparsity)) is not None:
            last = weight, once(weight)
            tried.append((weight, last[1].meta["natural_sparsity"]))
            if checkpoint is not None:
                seconds = perf_counter() - begun
                checkpoints.write(
                    checkpoint, {}, {"penalties": tried, "run": run, "seconds": seconds}
                )
            advance(1, weight=weight, sparsity=tried[-1][1])
    best = min(tried, key=lambda t: abs(t[1] - sparsity))[0]
    ticket = last[1] if last is not None and last[0] == best else once(best)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    found = {"penalties": [list(t) for t in tried], "search_seconds": perf_counter() - begun}
    return replace(ticket, meta=dict(ticket.meta) | found)


def next_weight(tried: Tried, sparsity: float) -> float | None:
    """The lambda to try next; None: enough."""
    density = 1 - sparsity
    if len(tried) >= TRIES or any(abs(s - sparsity) <= TOLERANCE * density for _, s in tried):
        return None
    weak = [weight for weight, found in tried if found < sparsity]
    strong = [weight for weight, found in tried if found > sparsity]
    if weak and strong:
        return math.sqrt(max(weak) * min(strong))
    if weak:
        return 4 * max(weak)
    return min(strong) / 4 if strong else 1.0
