"""Several searches of one model: where they gain by one program, and how they run in turn elsewhere."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import checkpoints
from ..batches import EpochBatches
from ..losses import Loss
from ..progress import Progress
from ..tickets import Ticket
from .epochs import read_own

if TYPE_CHECKING:
    from .gated import AbstractGateSearch, Member


def worth_stacking(device: torch.device, layers: Iterable[nn.Module]) -> bool:
    """Whether searches of these layers take no longer side by side than one after another.

    A stack of convolutions is one of so many groups, which a GPU computes more slowly than each by itself
    (bench/results/gpu-log.md); a stack of matrices is a batched product.
    """
    return device.type != "cuda" or all(isinstance(layer, nn.Linear) for layer in layers)


def in_turn(
    search: "AbstractGateSearch",
    model: nn.Module,
    batches: EpochBatches,
    members: list["Member"],
    *,
    progress: Progress,
    checkpoint: Path | None,
    loss: Loss,
) -> list[Ticket]:
    """The ticket of each member by a search of its own, which its provenance tells.

    Args:
        checkpoint: written after every search; the tickets found so far, and the search that runs, are
            beside it.

    Errors: what the search raises; SearchError for a checkpoint of other searches.
    """
    begun, run, inner, tickets = perf_counter(), "", None, list[Ticket]()
    beside: list[Path] = []
    if checkpoint is not None:
        inner = checkpoint.with_name(checkpoint.name + ".search")
        beside = [checkpoint.with_name(f"{checkpoint.name}.{i}") for i in range(len(members))]
        run = checkpoints.fingerprint(model, batches, "in turn", search._facts(members), loss=loss)
        begun -= checkpoints.seconds(checkpoint) + checkpoints.seconds(inner)
        if checkpoint.exists():
            done = read_own(checkpoint, run)[1]["done"]
            tickets = [Ticket.load(path) for path in beside[:done]]
    with progress.task("searches", total=len(members)) as advance:
        advance(len(tickets))
        for i, (sparsity, seed) in list(enumerate(members))[len(tickets) :]:
            ticket = replace(search, seed=seed)(
                model, batches, sparsity=sparsity, progress=progress, checkpoint=inner, loss=loss
            )
            ticket = replace(ticket, meta=ticket.meta | {"many": "in turn"})
            tickets.append(ticket)
            if checkpoint is not None:
                ticket.save(beside[i])
                meta = {"done": i + 1, "run": run, "seconds": perf_counter() - begun}
                checkpoints.write(checkpoint, {}, meta)
            advance()
    if checkpoint is not None:  # it first: it tells of the others
        checkpoint.unlink(missing_ok=True)
    for path in beside:
        path.unlink(missing_ok=True)
    return tickets
