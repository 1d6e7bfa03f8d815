"""From names to a trained ticket: the pipeline that the command line and `compare` run.

`Setup` says what is searched; `rewind_point` trains densely up to it; `find_ticket` searches there;
`train_on` trains what was found.  Everything a ticket's training needs is in its provenance.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .compaction import Compacted, compact
from .control import CONTROLS
from .convert import Filter, is_prunable, sparsify_
from .data import Batches, Dataset
from .gates import Concrete
from .granularity import parse_granularity
from .objectives import OBJECTIVES
from .plans import plan_
from .progress import QUIET, Progress
from .recipes import build, recipe_for
from .scores import SCORES
from .search import ConcreteSearch, OneShot
from .sparsities import check_sparsity
from .tickets import Ticket, TicketError
from .training import History, Recipe, train

METHODS = ("cts", *SCORES)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SANITIES = ("shuffle", "reinit", "invert")


def choose(what: str, name: str, valid: Any) -> str:
    """`name` if it is one of `valid`, else a ValueError that lists them."""
    if name not in valid:
        raise ValueError(f"{what}: expected one of {', '.join(valid)}, got {name!r}")
    return name


@dataclass(frozen=True)
class Setup:
    """One model on one data set and how tickets are searched in it.  Errors: ValueError, listing valid names."""

    model: str
    data: str
    recipe: Recipe
    model_options: dict[str, Any] = field(default_factory=dict)
    rewind_epochs: int = 2
    search_epochs: int = 10
    search_batch: int = 512
    search_lr: float = 0.1
    gain_lr: float = 0.01
    tau: float = 1.0
    search_dtype: str = "fp32"
    channels_last: bool = False
    objective: str = "reverse-kl"
    control: str = "gradbalance"
    granularity: str = "weight"
    sparse_layers: str | None = None  # a glob on layer names; None: every linear and convolution

    def __post_init__(self) -> None:
        recipe_for(self.model)  # an unknown model is told at once
        choose("objective", self.objective, OBJECTIVES)
        choose("control", self.control, CONTROLS)
        choose("search dtype", self.search_dtype, _DTYPES)
        parse_granularity(self.granularity)
        self.search("cts", seed=0)  # refuses its bad numbers
        for name, least in (("rewind_epochs", 0), ("search_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name.replace('_', ' ')}: expected at least {least}, got {getattr(self, name)}"
                )

    @property
    def filter(self) -> Filter:
        return self.sparse_layers or is_prunable

    def search(self, method: str, seed: int) -> ConcreteSearch | OneShot:
        """The search behind a method's name."""
        granularity = parse_granularity(self.granularity)
        if choose("method", method, METHODS) == "cts":
            return ConcreteSearch(
                epochs=self.search_epochs,
                objective=OBJECTIVES[self.objective],
                control=CONTROLS[self.control](),
                gate=Concrete(self.tau),
                granularity=granularity,
                lr=self.search_lr,
                gain_lr=self.gain_lr,
                dtype=_DTYPES[self.search_dtype],
                channels_last=self.channels_last,
                seed=seed,
            )
        return OneShot(SCORES[method], granularity, seed)


def new_model(setup: Setup, dataset: Dataset, seed: int) -> nn.Module:
    """The setup's model, freshly initialised from `seed`, its chosen layers sparse-capable."""
    model = build(setup.model, dataset.shape, dataset.classes, seed=seed, **setup.model_options)
    return sparsify_(model, setup.filter)


def loaders(
    dataset: Dataset, recipe: Recipe, seed: int, device: torch.device
) -> tuple[Batches, Batches]:
    """Training and test batches of a recipe."""
    augment = recipe.augment and dataset.flip_crop
    train_batches = Batches(
        dataset, "train", recipe.batch, seed=seed, augment=augment, device=device
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
) -> nn.Module:
    """The model after `rewind_epochs` of dense training: where searches look and tickets start."""
    model = new_model(setup, dataset, seed).to(device)
    if setup.rewind_epochs:
        train(
            model,
            *loaders(dataset, setup.recipe, seed, device),
            setup.recipe,
            stop_epoch=setup.rewind_epochs,
            total_epochs=max(setup.recipe.epochs, setup.rewind_epochs),
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
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
) -> tuple[Ticket, float]:
    """A ticket at the model's present weights with full provenance, and the seconds the search took."""
    check_sparsity(sparsity)
    batches = Batches(dataset, "train", setup.search_batch, seed=seed, device=device)
    search = setup.search(method, seed)
    start = perf_counter()
    if isinstance(search, ConcreteSearch):
        ticket = search(model, batches, sparsity=sparsity, progress=progress, checkpoint=checkpoint)
    else:
        ticket = search(model, batches, sparsity=sparsity)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = perf_counter() - start
    return replace(ticket, meta=ticket.meta | {"setup": asdict(setup)}), seconds


def setup_of(ticket: Ticket) -> Setup:
    """The setup a ticket was found in.  TicketError if its provenance does not say."""
    try:
        stored = dict(ticket.meta["setup"])
        recipe = dict(stored.pop("recipe"))
        recipe["milestones"] = tuple(recipe["milestones"])
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
    epochs: int,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    metrics: Path | None = None,
    checkpoint: Path | None = None,
    progress: Progress = QUIET,
) -> History:
    """Trains a model at its rewind point for `epochs` more epochs, with a fresh optimiser.

    The schedule is indexed by the absolute epoch: it spans rewind_epochs + epochs.
    """
    recipe = recipe or setup.recipe
    end = setup.rewind_epochs + epochs
    return train(
        model,
        *loaders(dataset, recipe, seed, next(model.parameters()).device),
        recipe,
        start_epoch=setup.rewind_epochs,
        stop_epoch=end,
        total_epochs=end,
        seed=seed,
        metrics=metrics,
        checkpoint=checkpoint,
        progress=progress,
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
    model: nn.Module, plan: str, dataset: Dataset, recipe: Recipe, cache: Path | None = None
) -> PlannedModel:
    """Plans a masked model for a recipe's batch and precision on its device; "auto" drops dead units first."""
    device = next(model.parameters()).device
    x = next(iter(Batches(dataset, "train", recipe.batch, device=device)))[0]
    x = x.chunk(recipe.accumulate)[0]
    small, told = None, "dead units stay under a named plan"
    if plan == "auto":
        small, told = _compacted(model, x, recipe)
    planned = PlannedModel(model, small, told)
    with recipe.autocast(device):
        plan_(planned.model, plan, *([x] if plan == "auto" else []), cache=cache)
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
