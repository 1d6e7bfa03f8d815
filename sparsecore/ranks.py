"""Several ranks: what would leave them unequal stops first."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def ranks() -> int:
    """How many the process group has; 1 without one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def require_one_rank(what: str, instead: str) -> None:
    """Errors: ValueError in a process group of several ranks, each of which would come to a result of its own."""
    if (count := ranks()) > 1:
        raise ValueError(
            f"{what}: expected one process, got a process group of {count} ranks, which it would leave unequal; "
            f"{instead}"
        )


def require_equal_ranks(masks: Mapping[str, Tensor]) -> None:
    """All ranks ask this together.  Errors: ValueError if their masks differ."""
    if ranks() == 1:
        return
    # A sum over places, each with a weight of its own: the same for the same masks alone, nearly surely.
    digests = []
    for mask in masks.values():
        flat = mask.reshape(-1).to(torch.int64)
        places = torch.arange(len(flat), device=flat.device)
        digests.append((flat * (places * 2654435761 % 2147483647 + 1)).sum())
    mine = torch.stack(digests) if digests else torch.zeros(1, dtype=torch.int64)
    least, most = mine.clone(), mine.clone()
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise ValueError(
            "remask_: expected the same masks on every rank of the process group, got different ones; make them on "
            "one rank and broadcast them, or from the same seed"
        )
