"""What nobody would see of a ticket: layers that keep nothing, cannot learn or took no part.  Told as warnings.

Whoever differentiates in a search notes which layers a gradient came to (`note_gradients`), which costs nothing.  A
search tells of its ticket when it ends, `Ticket.apply_` of what is not told yet, once, however often a ticket is
applied.  What is applied within a search is the search's own affair.
"""

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from warnings import warn

from torch import Tensor, nn

from .convert import sparse_layers
from .layer import SparseLayer
from .loss_functions import own_parameters
from .losses import Loss
from .nn import by_output
from .warned import ShortSearchWarning as ShortSearchWarning
from .warned import SparsityWarning as SparsityWarning

if TYPE_CHECKING:
    from .tickets import Ticket


@dataclass
class Noted:
    """What the outermost search has come to know of layers, by name.

    Attributes:
        reached, missed: those that a gradient came to in some step, and those that it did not in some.
    """

    reached: set[str] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)

    @property
    def unreached(self) -> list[str]:
        """Layers that no gradient ever came to."""
        return sorted(self.missed - self.reached)


_within: ContextVar[Noted | None] = ContextVar("within a search", default=None)
_known: dict[int, "_Told"] = {}  # what has been told of tickets, by id


@dataclass
class _Told:
    """What has been told of a ticket."""

    ticket: weakref.ref["Ticket"]
    texts: set[str] = field(default_factory=set)
    applied: bool = False

    @classmethod
    def of(cls, ticket: "Ticket") -> "_Told":
        key = id(ticket)
        known = _known.get(key)
        if known is None or known.ticket() is not ticket:
            gone = lambda _: _known.pop(key, None)  # noqa: E731
            known = _known[key] = cls(weakref.ref(ticket, gone))
        return known


@contextmanager
def within_a_search() -> Iterator[Noted | None]:
    """What is noted, to the outermost search; in it nothing else tells of tickets, and gets None."""
    if _within.get() is not None:
        yield None
        return
    noted = Noted()
    token = _within.set(noted)
    try:
        yield noted
    finally:
        _within.reset(token)


def note_gradients(came: Mapping[str, bool]) -> None:
    """Notes, by layer, whether a gradient came to it, where a search asks."""
    if (noted := _within.get()) is not None:
        noted.reached.update(name for name, reached in came.items() if reached)
        noted.missed.update(name for name, reached in came.items() if not reached)


def note_training(model: nn.Module, unreached: Collection[str] | None) -> None:
    """Notes what a training's history says of its parameters (`History.unreached`); frozen layers are left out."""
    if unreached is None:
        return
    missed = {id(p) for name, p in model.named_parameters() if name in set(unreached)}
    weights = {name: layer.raw_weight for name, layer in sparse_layers(model).items()}
    note_gradients({n: id(w) not in missed for n, w in weights.items() if w.requires_grad})


def tell_loss(loss: Loss, model: nn.Module, *, stacklevel: int = 3) -> None:
    """Warns of a loss with parameters of its own, which nothing moves."""
    if _within.get() is None and (own := own_parameters(loss, model)):
        warn(
            f"loss {loss.name}: {_some([repr(name) for name in own])} of its own {_are(list(own))} not trained, as "
            "only the model's parameters are; make them a part of the model, or freeze them: requires_grad_(False)",
            SparsityWarning,
            stacklevel=stacklevel,
        )


def tell_found(
    ticket: "Ticket", model: nn.Module, unreached: Collection[str] = (), *, stacklevel: int = 3
) -> None:
    """Warns of all that is to be told of a ticket that a search of `model` has found.

    unreached: layers that no gradient came to in the search.
    """
    idle = of_scores(ticket, unreached)
    told = _Told.of(ticket).texts
    for text in (*of_masks(ticket.masks, model), *of_training(ticket, model), *idle):
        told.add(text)
        warn(text, SparsityWarning, stacklevel=stacklevel)
    if (text := short_search(ticket)) is not None:
        warn(text, ShortSearchWarning, stacklevel=stacklevel)


def tell_applied(ticket: "Ticket", model: nn.Module, *, stacklevel: int = 3) -> None:
    """Warns of what a ticket does to `model` and its search has not told, the first time that it is applied."""
    if _within.get() is not None or (known := _Told.of(ticket)).applied:
        return
    known.applied = True
    for text in [*of_masks(ticket.masks, model), *of_training(ticket, model)]:
        if text not in known.texts:
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
    layers = {} if model is None else _by_mask(model)
    for name, mask in masks.items():
        if name in empty:
            continue
        for place, layer in layers.get(name, [(name, None)]):
            alive = (mask if layer is None else by_output(layer, mask)).flatten(1).any(1)
            if not alive.all():
                dead[place] = f"{int((~alive).sum())} of {len(alive)} of {place!r}"
    if dead:
        yield (
            f"units cut off: {_some(list(dead.values()))} keep no weight and give their bias alone, whatever "
            "comes in; compact(model, x) and plan='auto' take them out, a lower sparsity keeps them"
        )


def _by_mask(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """The layers that compute under each mask, by name: one, and those that share its weight."""
    found = {layer: [(name, layer)] for name, layer in sparse_layers(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer) and module.leader in found:
            found[module.leader].append((name, module))
    return {layers[0][0]: list(layers) for layers in found.values()}


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


def of_scores(ticket: "Ticket", unreached: Iterable[str] = ()) -> Iterator[str]:
    """Layers that took no part in the search: nothing tells one unit of theirs from another.

    unreached: those of them that are known already.
    """
    alike = [
        name
        for name, score in (ticket.scores or {}).items()
        if score.numel() > 1 and bool((score == score.flatten()[0]).all())
    ]
    missed = [name for name in ticket.masks if name in set(unreached)]
    if alike:
        yield (
            f"{_layers(alike)} took no part in the search: all scores there are alike, as where the forward "
            "never calls a layer or no gradient comes to it, so what it keeps says nothing; call it, or leave "
            f"it dense: sparsify_(model, '!{alike[0]}')"
        )
    if missed := [name for name in missed if name not in alike]:
        yield (
            f"{_layers(missed)} took no part in the search: no gradient came to it, as where the forward never calls "
            "a layer, so what it keeps says nothing; call it, or leave it dense: "
            f"sparsify_(model, '!{missed[0]}')"
        )


def short_search(ticket: "Ticket") -> str | None:
    """Why a search's gates are far from what was asked for, if so: by a factor of 2, or a quarter of all weights."""
    natural, asked = ticket.meta.get("natural_sparsity"), ticket.sparsity
    if not isinstance(natural, float) or not 0 <= natural <= 1:  # of any file: it may say anything
        return None
    kept, room = 1 - natural, 1 - asked
    if abs(natural - asked) <= 0.25 and kept <= 2 * room and room <= 2 * kept:
        return None
    text = f"the gates ended {100 * natural:.1f} % sparse, not {100 * asked:.4g} %, so the ticket "
    if kept > room:
        return (
            text
            + "cuts what they still used: more epochs, a smaller search batch or a higher search lr brings "
            "them there"
        )
    return (
        text
        + "keeps what they had closed: more epochs, a higher start_density or a lower search lr brings them there"
    )


def _layers(names: list[str]) -> str:
    return f"layer{'s' if len(names) > 1 else ''} {_some([repr(name) for name in names])}"


def _some(parts: list[str]) -> str:
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def _s(names: list[str]) -> str:
    return "" if len(names) > 1 else "s"


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
