"""What the steps of a run need in memory at the least, compared with what there is before the first one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data import MOST_PIXELS, Dataset, folder_of
from .memory import gib, require_bytes
from .methods import split
from .outline import Outline
from .recipe import Recipe
from .recipes import outline_of
from .search import ContinuousSparsification, JointSearch
from .search.gated import AbstractGateSearch
from .setups import Setup
from .tickets import Ticket, TicketError

_LARGE = 256 << 20  # bytes: a model of more is built for a ticket of such alone
_TEST_BATCH = 1024  # as `experiment.loaders` evaluates


def check_memory(
    setup: Setup,
    data: Dataset,
    device: torch.device,
    *,
    methods: Sequence[str] = (),
    recipe: Recipe | None = None,
    ticket: Ticket | None = None,
) -> None:
    """What is counted is what cannot be done without: weights, gradients, moments, gates, what a forward keeps for its
    backward, and on a GPU the data.

    Args:
        methods: that search; their batches are the setup's of searches.
        recipe: of training; None: the setup's.
        ticket: whose model it is said to be.

    Errors: TicketError for a ticket of another model, one that is far larger; ValueError for a step of training, an
    evaluation or a search that needs more memory than `device` has left, as for a model that cannot be built.
    """
    known = outline_of(setup.model, data.shape, data.classes, setup.model_options)
    if known is None:  # only the model itself tells
        return
    if ticket is not None:
        _check_size(ticket, setup.model, known)
    there = _of_data(data) if device.type == "cuda" else 0
    recipe = recipe or setup.recipe
    batch = -(-min(recipe.batch, len(data.train)) // recipe.accumulate)
    _require(
        "a step of training", known, batch, _kept(recipe), recipe.amp is not None, there, device,
        "take a smaller --recipe batch= (or cut it by accumulate=), --image-size or model",
    )  # fmt: skip
    tested = 2 * known.largest * min(_TEST_BATCH, len(data.test))  # a layer's inputs and outputs
    require_bytes(
        "evaluation", known.weights + tested + there, "take a smaller --image-size or model", device
    )
    for method in methods:
        copies, batch = _of_search(setup, method), min(setup.search_batch, len(data.train))
        _require(
            f"a step of {method.partition(':')[0]}", known, batch, copies, setup.search_dtype != "fp32", there, device,
            "take a smaller --search-batch, --image-size or model",
        )  # fmt: skip


def check_size(ticket: Ticket, setup: Setup, data: Dataset) -> None:
    """Errors: TicketError for a ticket of another model than the setup's, one far larger, before it is built."""
    known = outline_of(setup.model, data.shape, data.classes, setup.model_options)
    if known is not None:
        _check_size(ticket, setup.model, known)


def _check_size(ticket: Ticket, model: str, known: Outline) -> None:
    own = sum(weight.nbytes for weight in ticket.weights.values())
    if known.weights > 2 * own + _LARGE:
        raise TicketError(
            f"the ticket is for another model: it has {own / 2**20:,.0f} MiB of weights, and {model}, which it names, "
            f"has {known.weights / 2**20:,.0f}"
        )


def _require(
    what: str, known: Outline, batch: int, copies: float, half: bool, there: int, device: torch.device, mend: str
) -> None:  # fmt: skip
    kept = known.activations * batch // (2 if half else 1)
    weights = known.weights + round(copies * known.parameters)
    of = f"{gib(weights)} of weights, gradients and moments, {gib(kept)} of activations of {batch:,} images"
    require_bytes(what, weights + kept + there, mend, device, of)


def _kept(recipe: Recipe) -> int:
    """Copies of the parameters beside themselves: gradients, moments, an average."""
    moments = int(recipe.momentum > 0) if recipe.optimizer == "sgd" else 2
    return 1 + moments + (recipe.ema is not None)


def _of_search(setup: Setup, method: str) -> float:
    """The same in a search: gates have gradients and two moments; the ticket's scores are as many."""
    kind = split(method)[0]
    search: Any = setup.search(method, 0)
    gated = isinstance(search, AbstractGateSearch | ContinuousSparsification)
    gates = 4 if gated and search.granularity.unit.single else 0
    if isinstance(search, JointSearch | ContinuousSparsification):
        return gates + _kept(search.recipe)
    if kind.trains:
        return _kept(setup.recipe)
    return max(gates, 1)


def _of_data(data: Dataset) -> int:
    parts = (data.train.images, data.test.images)
    return sum(images.numel() for images in parts if isinstance(images, Tensor))


def check_image_size(setup: Setup) -> None:
    """Errors: ValueError for images of a folder that make a model, or its step on one of them, larger than memory;
    before a folder is read, whose classes and count are not known yet."""
    side = setup.image_size
    if side is None or folder_of(setup.data) is None or not 1 <= side <= MOST_PIXELS:
        return
    known = outline_of(setup.model, (3, side, side), 2, setup.model_options)
    if known is not None:
        mend = "take a smaller --image-size or model"
        require_bytes("a step on one image", known.weights + known.activations, mend)
