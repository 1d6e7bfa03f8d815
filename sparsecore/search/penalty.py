"""The constant lambda that leads to the asked sparsity, found by search upon search."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from torch import nn

from .. import checkpoints, schema
from ..batches import EpochBatches
from ..control import FixedPenalty
from ..losses import Loss
from ..progress import Progress
from ..tickets import Ticket
from ..unsaved import Unsaved
from .epochs import Owned, read_own
from .protocol import Search, Watch

TRIES = 10
TOLERANCE = 0.1  # of the density, as much as GradBalance's slack

Penalty = Annotated[float, schema.Range(0, 1e30)]


class _Tried(Owned):
    penalties: list[tuple[Penalty, schema.Fraction]]


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
    begun, run = perf_counter(), ""
    tried: list[tuple[float, float]] = []
    if checkpoint is not None:
        run = checkpoints.fingerprint(model, batches, "penalty", facts, loss=loss)
        begun -= checkpoints.seconds(checkpoint)
        if checkpoint.exists():
            tried = read_own(checkpoint, run, _Tried)[1]["penalties"]
        begun -= checkpoints.seconds(_inner(checkpoint, len(tried)))

    def once(index: int, weight: float) -> Ticket:
        under: Search = replace(search, control=FixedPenalty(weight))  # type: ignore[type-var]
        return under(
            model,
            batches,
            sparsity=sparsity,
            progress=progress,
            checkpoint=_inner(checkpoint, index),
            watch=watch,
            loss=loss,
        )

    last: Ticket | None = None
    with progress.task("lambda", total=TRIES) as advance:
        advance(len(tried))
        while (weight := next_weight(tried, sparsity)) is not None:
            if last is not None and last.unsaved is not None:
                last.unsaved.saved()  # another is tried: it is not the one
            last = once(len(tried), weight)
            tried.append((weight, last.meta["natural_sparsity"]))
            if checkpoint is not None:
                seconds = perf_counter() - begun
                meta = {"penalties": tried, "run": run, "seconds": seconds}
                checkpoints.write(checkpoint, {}, meta)
            advance(1, weight=weight, sparsity=tried[-1][1])
    index = min(range(len(tried)), key=lambda i: abs(tried[i][1] - sparsity))
    is_last = last is not None and index == len(tried) - 1
    ticket = last if last is not None and is_last else once(index, tried[index][0])
    inner = [_inner(checkpoint, i) for i in range(len(tried))]
    found = {"penalties": [list(t) for t in tried], "search_seconds": perf_counter() - begun}
    left = Unsaved.of([checkpoint, *inner])[0]
    return replace(ticket, meta=dict(ticket.meta) | found, unsaved=left)


def _inner(checkpoint: Path | None, index: int) -> Path | None:
    """The checkpoint of the search under the lambda of this number."""
    return checkpoint and checkpoint.with_name(f"{checkpoint.name}.search-{index}")


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
