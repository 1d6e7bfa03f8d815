"""From names to a trained ticket: the pipeline that the command line and `compare` run.

`Setup` says what is searched; `rewind_point` trains densely up to it; `find_ticket` searches there;
`train_on` trains what was found.  Everything a ticket's training needs is in its provenance.
"""

from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from . import checkpoints
from .compaction import Compacted, compact
from .convert import Filter, dense_layers, is_prunable, sparsify_
from .data import Batches, Dataset, limited, load
from .fields import choose
from .methods import DTYPES, search_for, split
from .plans import plan_
from .progress import QUIET, Progress
from .recipe import Recipe
from .recipes import build, recipe_for
from .search import Rewinding, Search
from .sparsities import check_sparsity
from .start_weights import TRAINED, read_state, start_from_, start_trained_
from .tickets import Ticket, TicketError
from .training import History, evaluate, train

SANITIES = (
    "shuffle",
    "reinit",
    "invert",
)  # controls made of a ticket; "corrupt" is a search of its own


@dataclass(frozen=True)
class Setup:
    """One model on one data set and how tickets are searched and trained in it.

    Args:
        rewind_epochs: of dense training before the search, fractions too; tickets start there.
        train_epochs: of training after the rewind point.
        search_epochs, search_lr, gain_lr, tau, objective, control: of searches by gates; None: the method's.
        train_samples: how many of the training data are used, for reduced runs; None: all.
        sparse_layers: globs on layer names, of which those that begin with "!" exclude (`convert.sparsify_`);
            None: all that `convert.is_prunable` takes.
        weights: where training begins, a file's state_dict or DEFAULT, torchvision's trained weights; None: freshly
            initialised.
        drop_last: whether a last, smaller batch of training is left out.

    Errors: ValueError, listing valid names.
    """

    model: str
    data: str
    recipe: Recipe
    model_options: dict[str, Any] = field(default_factory=dict)
    rewind_epochs: float = 2
    train_epochs: float = 12
    search_epochs: int | None = None
    search_batch: int = 512
    search_lr: float | None = None
    gain_lr: float | None = None
    tau: float | None = None
    search_dtype: str = "fp32"
    channels_last: bool | None = None
    objective: str | None = None
    control: str | None = None
    granularity: str = "weight"
    train_samples: int | None = None
    sparse_layers: str | tuple[str, ...] | None = None
    weights: str | None = None
    drop_last: bool = False

    def __post_init__(self) -> None:
        recipe_for(self.model)  # an unknown model is told at once
        choose("search dtype", self.search_dtype, DTYPES)
        self.search("cts", seed=0)  # refuses its bad names and numbers
        for name, least in (("rewind_epochs", 0), ("train_epochs", 0), ("search_batch", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(
                    f"{name.replace('_', ' ')}: expected at least {least}, got {getattr(self, name)}"
                )

    @property
    def filter(self) -> Filter:
        return self.sparse_layers or is_prunable

    @property
    def total_epochs(self) -> float:
        """What the schedule of a whole training spans."""
        return self.rewind_epochs + self.train_epochs

    def search(self, method: str, seed: int) -> Search:
        """The search behind a method's name, such as `cts` or `ltr:rate=0.3`."""
        return search_for(self, method, seed)

    def start_of(self, method: str) -> "Setup":
        """This setup with the method's own rewind point; the schedule's end stays where it is."""
        if not split(method)[0].from_init or not self.rewind_epochs:
            return self
        return replace(self, rewind_epochs=0, train_epochs=self.total_epochs)


def data_of(setup: Setup, data_dir: Path | None = None, image_size: int | None = None) -> Dataset:
    """The setup's data.  Errors: `data.DataError`."""
    return limited(load(setup.data, data_dir, image_size=image_size), setup.train_samples)


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
    return sparsify_(model, setup.filter)


def _check_layers(setup: Setup, model: nn.Module) -> None:
    """Every glob has to name a layer: one with a slip of the pen would be passed over in silence."""
    globs = setup.sparse_layers or ()
    names = list(dense_layers(model))
    for glob in (globs,) if isinstance(globs, str) else globs:
        if not any(fnmatchcase(name, glob.removeprefix("!")) for name in names):
            raise ValueError(
                f"layers: no layer matches {glob!r}; the model's are {', '.join(names[:8])}"
                f"{', …' if len(names) > 8 else ''}"
            )


def loaders(
    dataset: Dataset, recipe: Recipe, seed: int, device: torch.device, drop_last: bool = False
) -> tuple[Batches, Batches]:
    """Training and test batches of a recipe."""
    augment = recipe.augment and dataset.flip_crop
    train_batches = Batches(
        dataset,
        "train",
        recipe.batch,
        seed=seed,
        augment=augment,
        drop_last=drop_last or None,
        device=device,
    )
    if not len(train_batches):
        raise ValueError(
            f"drop last: expected a batch of at most {len(dataset.train)}, the training images, got {recipe.batch}"
        )
    test_batches = Batches(dataset, "test", 1024, seed=seed, shuffle=False, device=device)
    return train_batches, test_batches


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
        train(
            model,
            *loaders(dataset, setup.recipe, seed, device, setup.drop_last),
            setup.recipe,
            stop_epoch=setup.rewind_epochs,
            total_epochs=setup.total_epochs,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
            engine=engine,
        )
    return model


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
    if hasattr(search, "engine"):
        search = replace(search, engine=engine)  # type: ignore[type-var]
    kind, recipe = split(method)[0], setup.recipe
    if not kind.trains:
        recipe = replace(recipe, batch=setup.search_batch, augment=recipe.augment and kind.augments)
    training, test = loaders(dataset, recipe, seed, device, setup.drop_last)
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
    return replace(ticket, meta=meta | {"search": method, "setup": asdict(setup)}), seconds


def setup_of(ticket: Ticket) -> Setup:
    """The setup a ticket was found in.  TicketError if its provenance does not say."""
    try:
        stored = dict(ticket.meta["setup"])
        recipe = dict(stored.pop("recipe"))
        recipe["milestones"] = tuple(recipe["milestones"])
        if isinstance(stored.get("sparse_layers"), list):
            stored["sparse_layers"] = tuple(stored["sparse_layers"])
        return Setup(recipe=Recipe(**recipe), **stored)
    except (KeyError, TypeError, ValueError) as error:
        raise TicketError(
            "the ticket's provenance does not name a model, data set and recipe this version can "
            f"build ({error}); build the model yourself and use Ticket.apply_(model)"
        ) from None


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
    finished tickets, there is the accuracy alone.
    """
    recipe = recipe or setup.recipe
    end = setup.rewind_epochs + epochs
    device = next(model.parameters()).device
    train_batches, test_batches = loaders(dataset, recipe, seed, device, setup.drop_last)
    if not epochs:
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
    """The model a ticket was found in, at the ticket's start weights and under its masks."""
    return ticket.apply_(new_model(setup_of(ticket), dataset, seed=0)).to(device)


@dataclass(frozen=True)
class PlannedModel:
    """A ticket's model as it trains: the full one, or a smaller one without its dead units."""

    full: nn.Module
    small: Compacted | None
    told: str  # what became of dead units

    @property
    def model(self) -> nn.Module:
        return self.full if self.small is None else self.small.model

    def restored(self) -> nn.Module:
        """The full model with what has been trained."""
        return self.full if self.small is None else self.small.restore_(self.full)


def plan_for(
    model: nn.Module,
    plan: str,
    dataset: Dataset,
    recipe: Recipe,
    cache: Path | None = None,
    engine: str = "auto",
) -> PlannedModel:
    """Plans a masked model for a recipe's batch, precision and engine on its device; "auto" drops dead units first."""
    device = next(model.parameters()).device
    x = next(iter(Batches(dataset, "train", recipe.batch, device=device)))[0]
    x = x.chunk(recipe.accumulate)[0]
    small, told = None, "dead units stay under a named plan"
    if plan == "auto":
        small, told = _compacted(model, x, recipe)
    planned = PlannedModel(model, small, told)
    # Steps become graphs there unless that was refused.
    captured = device.type == "cuda" and engine in ("auto", "graph", "compile-graph")
    example = [x] if plan == "auto" else []
    with recipe.autocast(device):
        try:
            plan_(planned.model, plan, *example, cache=cache, captured=captured)
        except RuntimeError:  # what no graph can hold is launched one by one
            if not captured:
                raise
            plan_(planned.model, plan, *example, cache=cache)
    return planned


def _compacted(model: nn.Module, x: torch.Tensor, recipe: Recipe) -> tuple[Compacted | None, str]:
    """The model without dead units, if there are any and it may train so, and what to say about it."""
    if recipe.optimizer == "adam" and recipe.weight_decay:
        return None, "dead units stay: Adam's coupled weight decay can bring one back to life"
    try:
        small = compact(model, x[:2])
    except ValueError as error:  # a model that cannot be traced trains all the same
        return None, f"dead units stay: {error}"
    return (small if small.removed else None), small.table()


def apply_sanity(ticket: Ticket, sanity: str, dataset: Dataset, seed: int) -> Ticket:
    """A control of the ticket: `shuffle`, `reinit` or `invert`."""
    if choose("sanity", sanity, SANITIES) == "shuffle":
        return ticket.shuffled(seed)
    if sanity == "invert":
        return ticket.inverted()
    # A seed next to the ticket's own would draw the weights it came from.
    fresh = new_model(setup_of(ticket), dataset, seed + 1_000_003)
    return ticket.reinitialised(fresh.state_dict())
