"""From names to a trained ticket: the pipeline that the command line and `compare` run.

`Setup` says what is searched; `rewind_point` trains densely up to it; `find_ticket` searches there;
`train_on` trains what was found.  Everything a ticket's training needs is in its provenance.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from . import checkpoints
from .convert import dense_layers, require_sparse_layers, sparsify_
from .data import Batches, Dataset, folder_of, limited, load
from .fields import choose
from .forecheck import check_search
from .granularity import parse_granularity
from .methods import split
from .needs import check_image_size, check_size
from .progress import QUIET, Progress
from .provenance import setup_of
from .recipe import Recipe
from .recipes import build
from .search import Rewinding
from .setups import Setup as Setup
from .sparsities import check_extent, check_sparsity
from .start_weights import TRAINED, read_state, start_from_, start_trained_
from .tickets import Ticket
from .training import History, evaluate, train

SANITIES = (
    "shuffle",
    "reinit",
    "invert",
)  # controls made of a ticket; "corrupt" is a search of its own


def data_of(setup: Setup, data_dir: Path | None = None) -> Dataset:
    """The setup's data.  Errors: `data.DataError`; ValueError for an image size beyond the machine's memory."""
    check_image_size(setup)
    found = load(setup.data, data_dir, image_size=setup.image_size)
    return limited(found, setup.train_samples)


def new_model(setup: Setup, dataset: Dataset, seed: int) -> nn.Module:
    """The setup's model, freshly initialised from `seed`, its chosen layers sparse-capable."""
    return _sparse(setup, _dense(setup, dataset, seed))


def start_model(setup: Setup, dataset: Dataset, seed: int) -> nn.Module:
    """`new_model` at the setup's start weights.  Errors: ValueError for weights that do not fit, or are not there."""
    model = _dense(setup, dataset, seed)
    if setup.weights == TRAINED:
        start_trained_(model, setup.model, dataset.shape, setup.model_options)
    elif setup.weights is not None:
        start_from_(model, read_state(Path(setup.weights)), setup.weights)
    return _sparse(setup, model)


def _dense(setup: Setup, dataset: Dataset, seed: int) -> nn.Module:
    return build(setup.model, dataset.shape, dataset.classes, seed=seed, **setup.model_options)


def _sparse(setup: Setup, model: nn.Module) -> nn.Module:
    _check_layers(setup, model)
    sparse = sparsify_(model, setup.filter)
    shapes = {name: layer.weight_shape for name, layer in require_sparse_layers(sparse).items()}
    check_extent(shapes, parse_granularity(setup.granularity))
    return sparse


def _check_layers(setup: Setup, model: nn.Module) -> None:
    """Every glob has to name a layer: one with a slip of the pen would be passed over in silence."""
    names = list(dense_layers(model))
    for glob in setup.globs:
        if not any(fnmatchcase(name, glob.removeprefix("!")) for name in names):
            raise ValueError(
                f"layers: no layer matches {glob!r}; the model's are {', '.join(names[:8])}"
                f"{', …' if len(names) > 8 else ''}"
            )


def loaders(
    dataset: Dataset,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    drop_last: bool = False,
    facts: Sequence[Any] = (),
) -> tuple[Batches, Batches]:
    """Training and test batches of a recipe.  facts: as `data.Batches` takes them."""
    augment = recipe.augment and dataset.flip_crop
    train_batches = Batches(
        dataset,
        "train",
        recipe.batch,
        seed=seed,
        augment=augment,
        drop_last=drop_last or None,
        device=device,
        facts=facts,
    )
    if not len(train_batches):
        raise ValueError(
            f"drop last: expected a batch of at most {len(dataset.train)}, the training images, got {recipe.batch}"
        )
    test_batches = Batches(dataset, "test", 1024, seed=seed, shuffle=False, device=device)
    return train_batches, test_batches


def batches_of_setup(
    setup: Setup, dataset: Dataset, recipe: Recipe, seed: int, device: torch.device
) -> tuple[Batches, Batches]:
    """`loaders` of a setup. A checkpoint then knows the model's options, which weights need not tell, and all data."""
    facts = (setup.model, sorted(setup.model_options.items()), dataset.digest)
    return loaders(dataset, recipe, seed, device, setup.drop_last, facts)


def rewind_point(
    setup: Setup,
    dataset: Dataset,
    seed: int,
    device: torch.device,
    progress: Progress = QUIET,
    checkpoint: Path | None = None,
    engine: str = "auto",
) -> nn.Module:
    """The model after `rewind_epochs` of dense training: where searches look and tickets start."""
    model = start_model(setup, dataset, seed).to(device)
    if setup.rewind_epochs:
        training, test = batches_of_setup(setup, dataset, setup.recipe, seed, device)
        _tell_no_steps("rewind epochs", 0, setup.rewind_epochs, len(training))
        train(
            model,
            training,
            test,
            setup.recipe,
            stop_epoch=setup.rewind_epochs,
            total_epochs=setup.total_epochs,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
            engine=engine,
        )
    return model


def check_found(
    setup: Setup, model: nn.Module, dataset: Dataset, method: str, sparsity: float
) -> None:
    """Errors: what `find_ticket` would have after the rewind point was trained, whatever the model's weights."""
    some = dataset.train.images[torch.arange(min(2, len(dataset.train)))].float() / 255
    check_search(setup.start_of(method).search(method, 0), model, sparsity, some)


def _tell_no_steps(what: str, start: float, epochs: float, length: int) -> None:
    """Warns where a fraction of an epoch is less than half a batch: nothing is trained then."""
    if round((start + epochs) * length) <= round(start * length):
        warnings.warn(
            f"{what}: {epochs:g} of an epoch of {length} batches is no step, so nothing is trained",
            stacklevel=3,
        )


def find_ticket(
    setup: Setup,
    model: nn.Module,
    dataset: Dataset,
    method: str,
    sparsity: float,
    seed: int,
    device: torch.device,
    progress: Progress = QUIET,
    checkpoint: Path | None = None,
    *,
    rounds: Path | None = None,
    watched: bool = False,
    engine: str = "auto",
) -> tuple[Ticket, float]:
    """A ticket at the model's present weights with full provenance, and the seconds the search took.

    Args:
        rounds: folder for the trained networks of methods that have rounds; other sparsities reuse them.
        watched: whether the provenance says how test accuracy went as the search progressed.
        engine: how steps are launched, in searches that train.
    """
    check_sparsity(sparsity)
    setup = setup.start_of(method)
    search = setup.search(method, seed)
    if rounds is not None and isinstance(search, Rewinding):
        search = replace(search, rounds=rounds)
    if hasattr(search, "engine") and engine != "auto":  # which a method's own field may name
        search = replace(search, engine=engine)  # type: ignore[type-var]
    kind, recipe = split(method)[0], setup.recipe
    if not kind.trains:
        recipe = replace(recipe, batch=setup.search_batch, augment=recipe.augment and kind.augments)
    training, test = batches_of_setup(setup, dataset, recipe, seed, device)
    start = perf_counter() - checkpoints.seconds(checkpoint)  # an interrupted search's time counts
    ticket = search(
        model, training, sparsity=sparsity, progress=progress, checkpoint=checkpoint,
        watch=(lambda net: evaluate(net, test)) if watched else None,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    meta = dict(ticket.meta)
    # A search that took up what another run had done knows better what all of it took.
    seconds = meta.pop("search_seconds", perf_counter() - start)
    if folder_of(setup.data) is not None:  # the median may be another when images are added
        setup = replace(setup, image_size=dataset.shape[-1])
    told = {"search": method, "setup": asdict(setup), "data_digest": dataset.digest}
    told |= {"sparsity": sparsity, "seed": seed}
    return replace(ticket, meta=meta | told), seconds


def train_on(
    model: nn.Module,
    setup: Setup,
    dataset: Dataset,
    epochs: float,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    metrics: Path | None = None,
    checkpoint: Path | None = None,
    progress: Progress = QUIET,
    engine: str = "auto",
) -> History:
    """Trains a model at its rewind point for `epochs` more epochs, with a fresh optimiser.

    The schedule is indexed by the absolute epoch: it spans rewind_epochs + epochs.  After 0 epochs, for
    finished tickets, there is the accuracy alone, as after so few that the sum is rewind_epochs.
    """
    recipe = recipe or setup.recipe
    end = setup.rewind_epochs + epochs
    device = next(model.parameters()).device
    train_batches, test_batches = batches_of_setup(setup, dataset, recipe, seed, device)
    if epochs:
        _tell_no_steps("epochs", setup.rewind_epochs, epochs, len(train_batches))
    if end == setup.rewind_epochs:
        start = perf_counter()
        accuracy = evaluate(model, test_batches)
        record = {"epoch": end, "accuracy": accuracy, "seconds": perf_counter() - start}
        return History([record])
    return train(
        model,
        train_batches,
        test_batches,
        recipe,
        start_epoch=setup.rewind_epochs,
        stop_epoch=end,
        total_epochs=end,
        seed=seed,
        metrics=metrics,
        checkpoint=checkpoint,
        progress=progress,
        engine=engine,
    )


def model_of(ticket: Ticket, dataset: Dataset, device: torch.device) -> nn.Module:
    """The model a ticket was found in, at the ticket's start weights and under its masks.

    Errors: TicketError for a ticket of another model, one that is far larger before it is built.
    """
    setup = setup_of(ticket)
    check_size(ticket, setup, dataset)
    return ticket.apply_(new_model(setup, dataset, seed=0)).to(device)


def apply_sanity(ticket: Ticket, sanity: str, dataset: Dataset, seed: int) -> Ticket:
    """A control of the ticket: `shuffle`, `reinit` or `invert`."""
    if choose("sanity", sanity, SANITIES) == "shuffle":
        return ticket.shuffled(seed)
    if sanity == "invert":
        return ticket.inverted()
    # A seed next to the ticket's own would draw the weights it came from.
    fresh = new_model(setup_of(ticket), dataset, seed + 1_000_003)
    return ticket.reinitialised(fresh.state_dict())
