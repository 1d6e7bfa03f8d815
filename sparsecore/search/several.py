"""Several searches of one model: where they gain by one program, and how they run in turn elsewhere."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import checkpoints, schema
from ..batches import EpochBatches
from ..losses import Loss
from ..progress import Progress
from ..tickets import Ticket
from ..unsaved import Unsaved
from .epochs import Owned, read_own

if TYPE_CHECKING:
    from .gated import AbstractGateSearch, Member


class _Done(Owned):
    done: schema.Count


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
    begun, run, tickets = perf_counter(), "", list[Ticket]()
    beside: list[Path] = []
    inner: list[Path | None] = [None] * len(members)
    if checkpoint is not None:
        inner = [checkpoint.with_name(f"{checkpoint.name}.search-{i}") for i in range(len(members))]
        beside = [checkpoint.with_name(f"{checkpoint.name}.{i}") for i in range(len(members))]
        run = checkpoints.fingerprint(model, batches, "in turn", search._facts(members), loss=loss)
        begun -= checkpoints.seconds(checkpoint)
        if checkpoint.exists():
            done = read_own(checkpoint, run, _Done)[1]["done"]
            tickets = [Ticket.load(path) for path in beside[:done]]
        begun -= checkpoints.seconds(inner[len(tickets)]) if len(tickets) < len(members) else 0
    with progress.task("searches", total=len(members)) as advance:
        advance(len(tickets))
        for i, (sparsity, seed) in list(enumerate(members))[len(tickets) :]:
            ticket = replace(search, seed=seed)(
                model, batches, sparsity=sparsity, progress=progress, checkpoint=inner[i], loss=loss
            )
            left = ticket.unsaved
            ticket = replace(ticket, meta=ticket.meta | {"many": "in turn"}, unsaved=None)
            tickets.append(ticket)
            if checkpoint is not None and left is not None:
                ticket.save(beside[i])
                meta = {"done": i + 1, "run": run, "seconds": perf_counter() - begun}
                checkpoints.write(checkpoint, {}, meta)
                left.saved()  # once the checkpoint knows of the ticket
            advance()
    # The checkpoint first: it tells of the others.
    owners = Unsaved.of([checkpoint, *beside, *inner], len(tickets))
    return [replace(t, unsaved=own) for t, own in zip(tickets, owners, strict=True)]
