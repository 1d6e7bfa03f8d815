"""What nobody would see of a ticket: layers that keep nothing, cannot learn or took no part.  Told as warnings.

A search tells of its ticket when it ends, `Ticket.apply_` of a ticket once, however often it is applied.  What is
applied within a search is the search's own affair.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from warnings import warn

from torch import Tensor, nn

from .convert import sparse_layers

if TYPE_CHECKING:
    from .tickets import Ticket


class SparsityWarning(UserWarning):
    """A ticket that works otherwise than its user may think; the message says what to do about it."""


class ShortSearchWarning(SparsityWarning):
    """A search whose gates ended far from the sparsity asked for."""


_within: ContextVar[bool] = ContextVar("within a search", default=False)
_applied: dict[int, weakref.ref["Ticket"]] = {}  # tickets that `apply_` told of, by id


@contextmanager
def within_a_search() -> Iterator[bool]:
    """Whether this is the outermost search; in it, nothing else tells of tickets."""
    outermost = not _within.get()
    token = _within.set(True)
    try:
        yield outermost
    finally:
        _within.reset(token)


def tell_found(ticket: "Ticket", model: nn.Module, *, stacklevel: int = 3) -> None:
    """Warns of all that is to be told of a ticket that a search of `model` has found."""
    told = [*of_masks(ticket.masks, model), *of_training(ticket, model), *of_scores(ticket)]
    for text in told:
        warn(text, SparsityWarning, stacklevel=stacklevel)
    if (text := short_search(ticket)) is not None:
        warn(text, ShortSearchWarning, stacklevel=stacklevel)


def tell_applied(ticket: "Ticket", model: nn.Module, *, stacklevel: int = 3) -> None:
    """Warns of what a ticket does to `model`, the first time that this ticket is applied."""
    key = id(ticket)
    known = _applied.get(key)
    if _within.get() or (known is not None and known() is ticket):
        return
    _applied[key] = weakref.ref(ticket, lambda gone: _applied.pop(key, None))
    for text in [*of_masks(ticket.masks, model), *of_training(ticket, model)]:
        warn(text, SparsityWarning, stacklevel=stacklevel)


def of_masks(masks: Mapping[str, Tensor], model: nn.Module | None = None) -> Iterator[str]:
    """Layers that keep nothing, and output units that do in the others."""
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        layers = {} if model is None else sparse_layers(model)
        biases = [getattr(layers[name], "bias", None) for name in empty if name in layers]
        known = bool(biases)
        gives = "0" if known and all(bias is None for bias in biases) else "the bias alone"
        yield (
            f"{_layers(empty)} keep{_s(empty)} nothing: the output is {gives}, and no gradient passes through; ask "
            "for less sparsity, give every layer a sparsity of its own (OneShot(..., "
            "distribution=sparsities.erk_densities)), or leave it dense: "
            f"sparsify_(model, '!{empty[0]}')"
        )
    dead = {}
    for name, mask in masks.items():
        rows = int((~mask.flatten(1).any(1)).sum())
        if rows and name not in empty:
            dead[name] = f"{rows} of {mask.shape[0]} of {name!r}"
    if dead:
        yield (
            f"units cut off: {_some(list(dead.values()))} keep no weight and give their bias alone, whatever "
            "comes in; compact(model, x) and plan='auto' take them out, a lower sparsity keeps them"
        )


def of_training(ticket: "Ticket", model: nn.Module) -> Iterator[str]:
    """Layers that the ticket prunes and training will not move."""
    if ticket.finished or not any(p.requires_grad for p in model.parameters()):
        return  # nothing is to be trained
    frozen = [
        name
        for name, layer in sparse_layers(model).items()
        if name in ticket.masks
        and not layer.raw_weight.requires_grad
        and not ticket.masks[name].all()
    ]
    if frozen:
        yield (
            f"{_layers(frozen)} {_are(frozen)} frozen (requires_grad=False) and pruned: training cannot make "
            "up for what is removed there; call requires_grad_(True), or leave frozen layers dense: "
            f"sparsify_(model, '!{frozen[0]}')"
        )


def of_scores(ticket: "Ticket") -> Iterator[str]:
    """Layers that took no part in the search: nothing tells one unit of theirs from another."""
    alike = [
        name
        for name, score in (ticket.scores or {}).items()
        if score.numel() > 1 and bool((score == score.flatten()[0]).all())
    ]
    if alike:
        yield (
            f"{_layers(alike)} took no part in the search: all scores there are alike, as where the forward "
            "never calls a layer or no gradient comes to it, so what it keeps says nothing; call it, or leave "
            f"it dense: sparsify_(model, '!{alike[0]}')"
        )


def short_search(ticket: "Ticket") -> str | None:
    """Why a search by gates was too short, if it was: its gates kept twice what the ticket has room for."""
    natural = ticket.meta.get("natural_sparsity")  # of any file: it may say anything
    if not isinstance(natural, float) or 1 - natural <= 2 * (1 - ticket.sparsity):
        return None
    return (
        f"the gates ended {100 * natural:.1f} % sparse, not {100 * ticket.sparsity:.4g} %, so the ticket cuts "
        "what they still used: more epochs, a smaller search batch or a higher search lr brings them there"
    )


def _layers(names: list[str]) -> str:
    return f"layer{'s' if len(names) > 1 else ''} {_some([repr(name) for name in names])}"


def _some(parts: list[str]) -> str:
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def _s(names: list[str]) -> str:
    return "" if len(names) > 1 else "s"


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
