"""Search methods by name, as the command line and comparisons know them: `cts`, `ltr:rate=0.3`, ..."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .fields import choose, control_of, objective_of, pairs, replaced
from .gates import Concrete
from .granularity import parse_granularity
from .recipe import MOST_EPOCHS, Recipe
from .scores import SCORES
from .search import (
    SET,
    ConcreteSearch,
    ContinuousSparsification,
    EdgePopup,
    GradualMagnitude,
    Iterative,
    JointSearch,
    OneShot,
    Rewinding,
    RigL,
    Search,
    StrongSearch,
)
from .search.gated import AbstractGateSearch
from .sparsities import DISTRIBUTIONS

if TYPE_CHECKING:
    from .experiment import Setup

# What takes time and memory before anything begins, by what it counts.
_COUNTS = {
    "epochs": "epochs",
    "pace": "epochs",
    "start_epoch": "start epoch",
    "rounds": "rounds",
    "updates": "updates",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
G = TypeVar("G", bound=AbstractGateSearch)


@dataclass(frozen=True)
class Method:
    """How a name becomes a search.

    Args:
        build: the search for a setup and a seed.
        says: one line for users.
        from_init: it looks at initial weights, whatever the setup's rewind point; what the setup trains before
            that point then belongs to the ticket's own training.
        trains: its batches are those of training, augmentation included, and not a search's.
        augments: its batches are a search's, augmented as those of training: where weights train in the search,
            it learns nothing more from plain images once they fit (bench/results/search-log.md).
    """

    build: "Callable[[Setup, int], Search]"
    says: str
    from_init: bool = False
    trains: bool = False
    augments: bool = False


def _with_gates(search: G, setup: "Setup", seed: int) -> G:
    """A gate search with what the setup says about all of them; None: the method's own."""
    options: dict[str, Any] = {
        "epochs": setup.search_epochs,
        "lr": setup.search_lr,
        "gain_lr": setup.gain_lr,
        "granularity": parse_granularity(setup.granularity),
        "dtype": DTYPES[setup.search_dtype],
        "channels_last": setup.channels_last,
        "seed": seed,
    }
    if setup.objective is not None:
        options["objective"] = objective_of(setup.objective)
    if setup.control is not None:
        options["control"] = control_of(setup.control)
    if setup.tau is not None and isinstance(search.gate, Concrete | None):
        options["gate"] = Concrete(setup.tau)
    given = {key: value for key, value in options.items() if value is not None}
    return replace(search, **given)


def _one_shot(score: str, says: str, distribution: str = "global") -> Method:
    def build(setup: "Setup", seed: int) -> OneShot:
        granularity = parse_granularity(setup.granularity)
        return OneShot(SCORES[score], granularity, seed, DISTRIBUTIONS[distribution])

    return Method(build, says)


def _iterative(score: str, says: str, batches: int | None = None) -> Method:
    def build(setup: "Setup", seed: int) -> Iterative:
        granularity = parse_granularity(setup.granularity)
        return Iterative(SCORES[score], 100, granularity, seed, batches)

    return Method(build, says)


def _search_recipe(setup: "Setup") -> Recipe:
    """The recipe at the search's batch; its rate scales with that, as usual (Goyal et al. 2017)."""
    recipe = setup.recipe
    return replace(recipe, lr=recipe.lr * setup.search_batch / recipe.batch)


def _joint(setup: "Setup", seed: int) -> JointSearch:
    return _with_gates(JointSearch(recipe=_search_recipe(setup)), setup, seed)


def _continuous(setup: "Setup", seed: int) -> ContinuousSparsification:
    search = ContinuousSparsification(
        recipe=_search_recipe(setup), granularity=parse_granularity(setup.granularity)
    )
    if setup.search_epochs is not None:
        search = replace(search, epochs=setup.search_epochs)
    return search if setup.control is None else replace(search, control=control_of(setup.control))


def _edge_popup(setup: "Setup", seed: int) -> EdgePopup:
    search = EdgePopup(granularity=parse_granularity(setup.granularity), seed=seed)
    epochs = setup.search_epochs
    return search if epochs is None else replace(search, epochs=epochs)


def _rewinding(rewind: str = "weights") -> "Callable[[Setup, int], Search]":
    def build(setup: "Setup", seed: int) -> Rewinding:
        return Rewinding(
            setup.recipe,
            epochs=setup.train_epochs,
            start_epoch=setup.rewind_epochs,
            rewind=rewind,
            granularity=parse_granularity(setup.granularity),
            seed=seed,
        )

    return build


def _dynamic(
    kind: "type[SET | RigL | GradualMagnitude]", **own: Any
) -> "Callable[[Setup, int], Search]":
    return lambda setup, seed: kind(
        setup.recipe,
        epochs=setup.train_epochs,
        start_epoch=setup.rewind_epochs,
        granularity=parse_granularity(setup.granularity),
        seed=seed,
        **own,
    )


METHODS: dict[str, Method] = {
    "cts": Method(
        lambda setup, seed: _with_gates(ConcreteSearch(), setup, seed),
        "Concrete Ticket Search: gates over frozen weights",
    ),
    "joint": Method(
        _joint,
        "Joint Concrete Search: gates and weights train together while the density falls",
        augments=True,
    ),
    "ltr": Method(
        _rewinding(),
        "iterative magnitude pruning, rewound to the rewind point",
        trains=True,
    ),
    "imp": Method(
        _rewinding(),
        "iterative magnitude pruning, rewound to initialisation (with --recipe stable)",
        from_init=True,
        trains=True,
    ),
    "lr-rewind": Method(
        _rewinding("learning-rate"),
        "iterative magnitude pruning that rewinds the learning rate alone",
        trains=True,
    ),
    "continuous": Method(
        _continuous,
        "continuous sparsification: deterministic gates that sharpen, trained with the weights",
        augments=True,
    ),
    "gradual": Method(
        _dynamic(GradualMagnitude, rewind=True),
        "one training under a magnitude mask that tightens, then rewound",
        trains=True,
    ),
    "gmp": Method(
        _dynamic(GradualMagnitude),
        "the same, used as it is trained",
        from_init=True,
        trains=True,
    ),
    "set": Method(
        _dynamic(SET),
        "sparse evolutionary training: the mask changes at random while the network trains",
        from_init=True,
        trains=True,
    ),
    "rigl": Method(
        _dynamic(RigL),
        "the rigged lottery: the mask grows where the gradient is large while the network trains",
        from_init=True,
        trains=True,
    ),
    "edge-popup": Method(
        _edge_popup,
        "hard top-k gates over untrained weights with straight-through gradients, never trained",
        from_init=True,
    ),
    "strong": Method(
        lambda setup, seed: _with_gates(StrongSearch(), setup, seed),
        "strong tickets: relaxed Bernoulli gates over untrained weights, never trained",
        from_init=True,
    ),
    "snip": _one_shot("snip", "|gradient x weight| over one pass of the data"),
    "iterative-snip": _iterative("snip", "the same in 100 rounds of one batch each", batches=1),
    "grasp": _one_shot("grasp", "weight x Hessian x gradient: what keeps the gradient flowing"),
    "synflow": _iterative("synflow", "synaptic flow in 100 rounds, without data"),
    "magnitude": _one_shot("magnitude", "the largest weights at the rewind point"),
    "erk": _one_shot("random", "random masks by layer, Erdos-Renyi-Kernel", "erk"),
    "uniform": _one_shot("random", "random masks, every layer as sparse", "uniform"),
    "random": _one_shot("random", "uniform noise: the floor that any method has to beat"),
}


def split(text: str) -> tuple[Method, dict[str, Any]]:
    """The method and the fields it sets: `ltr:rate=0.3:seed=1`.  Errors: ValueError, listing valid names."""
    name, *settings = text.split(":")
    return METHODS[choose("method", name, METHODS)], pairs(settings, f"method {name}")


def search_for(setup: "Setup", text: str, seed: int) -> Search:
    """The search that a method's name and fields describe.

    Errors: ValueError for bad ones, and for more than a million epochs, rounds or updates.
    """
    method, options = split(text)
    search: Any = method.build(setup, seed)
    _check_counts(options)
    if options:
        search = replaced(search, options, text.partition(":")[0])
    _check_counts({name: getattr(search, name, None) for name in _COUNTS})
    return search


def _check_counts(values: Mapping[str, Any]) -> None:
    for name, what in _COUNTS.items():
        count = values.get(name)
        if isinstance(count, int | float) and count > MOST_EPOCHS:
            raise ValueError(f"search {what}: expected at most {MOST_EPOCHS:,}, got {count:,}")
