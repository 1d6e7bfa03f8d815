"""Around every search: one process alone, the user's loss as it was, and warnings of what its ticket hides."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.parameter import is_lazy

from ..claims import only_looking, sole
from ..coverage import coverage
from ..kinds import of_kinds
from ..loaders import batches_of
from ..locks import held
from ..loss_functions import untouched
from ..losses import loss_of
from ..ranks import ranks
from ..telling import tell_found, tell_loss, within_a_search
from ..tickets import Ticket
from ..watching import looking, number_in
from .bypass import left_behind, require_through
from .protocol import SearchError, Watch

Method = TypeVar("Method", bound=Callable[..., Ticket | list[Ticket]])


def telling(search: Method) -> Method:
    """A search's method that has its model for itself, refuses several ranks, and in the end warns of what its tickets
    hide.

    Errors: SearchError in a process group of more than one rank; FileError for a checkpoint that somebody else writes;
    as `claims.sole`.
    """

    @functools.wraps(search)
    @sole("a search", differentiates=True)
    def told(
        self: Any, model: nn.Module, batches: Any, *args: Any, **kwargs: Any
    ) -> Ticket | list[Ticket]:
        (_, _, _, *rest), kwargs = of_kinds(search, (self, model, batches, *args), kwargs)
        _require_one_rank()
        _require_shapes(model)
        loss = loss_of(kwargs.get("loss"))
        if dense := left_behind(model):
            batches = batches_of(batches, model, kwargs.get("steps_per_epoch"), empty=True)
            for batch in islice(batches.epoch(0), 1):
                require_through(model, dense, batch, loss)
        if kwargs.get("watch") is not None:
            kwargs["watch"] = functools.partial(_watched, kwargs["watch"])
        tell_loss(loss, model, stacklevel=4)
        with held(kwargs.get("checkpoint")), within_a_search() as noted, untouched(loss):
            found = search(self, model, batches, *rest, **kwargs)
        if noted is None:
            return found
        seen = coverage(model)
        covered = {"parameters": seen.parameters, "dense": seen.dense}
        tickets = [found] if isinstance(found, Ticket) else found
        tickets = [replace(ticket, meta=ticket.meta | covered) for ticket in tickets]
        for ticket in tickets:
            tell_found(ticket, model, noted.unreached, stacklevel=4)
        return tickets[0] if isinstance(found, Ticket) else tickets

    return cast(Method, told)


def _watched(watch: Watch, model: nn.Module) -> float:
    """What `watch` says, as a number that a ticket can keep.  Errors: SearchError for what is none."""
    with only_looking(model), looking(model):
        said = watch(model)
    try:
        return number_in(said)
    except ValueError as error:
        raise SearchError(str(error)) from None


def _require_shapes(model: nn.Module) -> None:
    """Errors: SearchError for parameters that a first forward is to make."""
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise SearchError(
            f"model: expected parameters with shapes, got lazy ones ({', '.join(lazy[:4])}); run the model once on a "
            "batch before the search"
        )


def _require_one_rank() -> None:
    """Ranks see other data and draw other noise: each would find a ticket of its own."""
    if (count := ranks()) > 1:
        raise SearchError(
            f"search: expected one process, got a process group of {count} ranks, each of which would find another "
            "ticket; search before init_process_group or in a program of its own, save the ticket, and apply "
            "it on every rank"
        )
