"""Misuse of the Python API: calls of which an argument or two are not what they should be.

They end as documented: a ValueError or one of its subclasses, a TypeError for what is of another kind altogether; and
what is refused has changed nothing, neither the model nor the global generators.
"""

import dataclasses
import math
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsecore as sc
from sparsecore import gates, granularity
from sparsecore.linear_path import path_errors
from sparsecore.recipe import Recipe
from sparsecore.scores import magnitude, snip, synflow
from sparsecore.tickets import dense_state

from .judge import Failure, call
from .mutations import TEXTS
from .of_calls import SEARCHES
from .pools import (
    BATCHES,
    FILTERS,
    GRANULARITIES,
    INPUTS,
    LOSSES,
    MODELS,
    NUMBER,
    OTHER,
    PATHS,
    PLANS,
    X,
    masks,
    planned,
    states,
)
from .task import Points, network

Draw = Callable[[random.Random], Any]


def made(pool: list[Callable[[], Any]], usual: Callable[[], Any]) -> Draw:
    return lambda rng: rng.choice(pool)() if rng.random() < 0.8 else rng.choice([*OTHER, usual()])


def of(pool: list[Any]) -> Draw:
    return lambda rng: rng.choice(pool)


# What each argument of a call usually is, and what it may be instead.
Arguments = Mapping[str, tuple[Callable[[], Any], Draw]]
MODEL = (network, made(MODELS, network))
DATA = (Points, made(BATCHES, Points))
_SEARCH: Arguments = {
    "model": MODEL, "batches": DATA, "sparsity": (lambda: 0.5, of([*NUMBER, *OTHER])), "loss": (lambda: None,
    of(LOSSES)),
    "checkpoint": (lambda: None, of(PATHS)), "watch": (lambda: None, of([lambda m: 1.0, lambda m: "x",
    lambda m: math.nan, *OTHER])),
    "steps_per_epoch": (lambda: None, of([*NUMBER, *OTHER])),
}  # fmt: skip
_TRAIN: Arguments = {
    "model": MODEL, "train_batches": DATA, "test_batches": DATA,
    "recipe": (lambda: Recipe(batch=16, epochs=2, lr=0.01), of([Recipe(lr=1e30, epochs=1, batch=16),
    Recipe(amp="fp16"), *OTHER])),
    **{k: v for k, v in _SEARCH.items() if k in ("loss", "checkpoint", "steps_per_epoch")},
    "metric": (lambda: None, of([*LOSSES, "accuracy"])), "metrics": (lambda: None, of(PATHS)),
    **{k: (lambda: 0, of([*NUMBER, *OTHER])) for k in ("start_epoch", "seed")},
    **{k: (lambda: 1, of([*NUMBER[:12], *OTHER])) for k in ("stop_epoch", "total_epochs", "repeats")},
    "snapshots": (tuple, of([[0.5], [99], ["x"], [math.nan], *OTHER])), "engine": (lambda: "eager", of(["graph", "x",
    *OTHER])),
    "penalty": (lambda: None, of([lambda: 3, lambda m: None, lambda m: X.sum(), *OTHER])),
    "after_step": (lambda: None, of(OTHER)),
}  # fmt: skip
_STATE = (lambda: dense_state(network()), lambda rng: rng.choice(states()))
_MASKS = (lambda: masks()[0], lambda rng: rng.choice(masks()))
_NUMBERS: Draw = of([*NUMBER, *OTHER])

CALLS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    **{name: (lambda s=s, **k: s(k.pop("model"), k.pop("batches"), **k), _SEARCH) for name, s in SEARCHES.items()},
    "snip": (lambda **k: sc.OneShot(snip)(k.pop("model"), k.pop("batches"), **k), _SEARCH),
    "magnitude": (lambda **k: sc.OneShot(magnitude)(k.pop("model"), k.pop("batches"), **k), _SEARCH),
    "train": (lambda **k: sc.train(*(k.pop(n) for n in ("model", "train_batches", "test_batches", "recipe")), **k),
    _TRAIN),
    "evaluate": (sc.evaluate, {"model": MODEL, "batches": DATA, "loss": (lambda: None, of(LOSSES))}),
    "apply_": (
        lambda masks, weights, model, x, plan: sc.Ticket(masks, weights).apply_(model, x, plan=plan),
        {"masks": _MASKS, "weights": _STATE, "model": MODEL, "x": (lambda: X, of(INPUTS)), "plan": (lambda: "csr",
        of(PLANS))},
    ),
    "Ticket": (
        lambda masks, weights, meta: [repr(sc.Ticket(masks, weights, meta)), sc.Ticket(masks, weights,
        meta).save("t")],
        {"masks": _MASKS, "weights": _STATE, "meta": (dict, of([{"a": X}, {"granularity": "x"}, {3: 4}, {"a": {1,
        2}}, *OTHER]))},
    ),
    "Ticket.load": (sc.Ticket.load, {"path": (lambda: "t", of(PATHS))}),
    "Ticket.save": (lambda path: sc.OneShot(synflow)(network(), Points(), sparsity=0.5).save(path),
    {"path": (lambda: "t", of(PATHS))}),
    "from_zeros": (sc.Ticket.from_zeros, {"model": MODEL}),
    "from_prune": (sc.Ticket.from_prune, {"model": MODEL}),
    "load_rounds": (sc.load_rounds, {"folder": (lambda: "r", of(PATHS))}),
    "load": (
        lambda name, data_dir, image_size: sc.load(name, data_dir, image_size=image_size),
        {"name": (lambda: "digits", of(["folder:.", "folder:", "folder:missing", "cats", *OTHER])),
        "data_dir": (lambda: ".", of(PATHS)),
         "image_size": (lambda: None, _NUMBERS)},
    ),
    "plan_": (
        lambda model, plan, x: sc.plan_(model, plan, x),
        {"model": (planned, MODEL[1]), "plan": (lambda: "csr", of(PLANS)), "x": (lambda: X, of(INPUTS))},
    ),
    "remask_": (sc.remask_, {"model": (planned, MODEL[1]), "masks": _MASKS}),
    "sparsify_": (lambda model, which: sc.sparsify_(model, which), {"model": MODEL, "which": (lambda: "*",
    of(FILTERS))}),
    "compact": (sc.compact, {"model": (planned, MODEL[1]), "example": (lambda: X, of(INPUTS))}),
    "coverage": (sc.coverage, {"model": MODEL}),
    "densify_": (sc.densify_, {"model": MODEL}),
    "decay_groups": (sc.decay_groups, {"model": MODEL, "weight_decay": (lambda: 0.1, _NUMBERS)}),
    "path_errors": (
        lambda **k: path_errors(k.pop("model"), k.pop("a"), k.pop("b"), k.pop("batches"), **k),
        {"model": MODEL, "a": _STATE, "b": _STATE, "batches": DATA, "points": (lambda: 3, of([0, 1, -1, 2.5, "x",
        None, math.nan])),
         "checkpoint": (lambda: None, of(PATHS)), "train_batches": (lambda: None, DATA[1]), "limit": (lambda: 2,
         of([0, -1, "x", None]))},
    ),
    "recompute_statistics_": (sc.recompute_statistics_, {"model": (lambda: network(True), MODEL[1]),
    "batches": DATA}),
    "parse_granularity": (granularity.parse_granularity, {"text": (lambda: "weight", of([*TEXTS, *OTHER]))}),
    "granularity": (
        lambda g: sc.OneShot(magnitude, g)(network(), Points(), sparsity=0.5), {"g": (granularity.Weight,
        of(GRANULARITIES))},
    ),
    "Block": (granularity.Block, {"h": (lambda: 2, _NUMBERS), "w": (lambda: 2, _NUMBERS)}),
    "NM": (granularity.NM, {"n": (lambda: 2, _NUMBERS), "m": (lambda: 4, _NUMBERS)}),
    "gates": (
        lambda kind, value: kind(value).init(0.5),
        {"kind": (lambda: gates.Concrete, of([gates.HardConcrete, gates.Gaussian, gates.Concrete])),
        "value": (lambda: 0.5, _NUMBERS)},
    ),
    "Loss": (sc.Loss, {"function": (lambda: "mse", of(LOSSES)), "class_axis": (lambda: 1, _NUMBERS)}),
    "Batches": (
        lambda data, split, size, seed: next(iter(sc.Batches(data, split, size, seed=seed))),
        {"data": (lambda: sc.load("digits"), of(OTHER)), "split": (lambda: "train", of(["x", *OTHER])),
         "size": (lambda: 16, _NUMBERS), "seed": (lambda: 0, _NUMBERS)},
    ),
}  # fmt: skip
_UNMET = [[], (), {}, None]  # of which no ticket can be told
_WITHOUT_DATA = ("magnitude", "synflow")


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    Path("folder").mkdir()
    if rng.random() < 0.15:
        return _constructed(rng)
    name = rng.choice(sorted(CALLS))
    function, arguments = CALLS[name]
    hostile = rng.sample(sorted(arguments), min(len(arguments), rng.choice([1, 1, 2])))
    values = {n: draw(rng) if n in hostile else usual() for n, (usual, draw) in arguments.items()}
    print(name, {n: _shown(values[n]) for n in hostile})
    before, generators = _state(values.get("model")), _generators()
    found: list[Any] = []
    how = call(lambda: found.append(function(**values)), (ValueError, TypeError))
    if not _same(generators, _generators()):
        raise Failure("a global generator was used")
    if how == "refused" and not _same(before, _state(values.get("model"))):
        raise Failure("the model was changed, and the call refused")
    if how == "fine" and isinstance(found[0], sc.Ticket) and "sparsity" in values:
        _check_ticket(found[0], name, values)
    return how


def _constructed(rng: random.Random) -> str:
    """A search, recipe or controller with a field that it should not have."""
    base = rng.choice(
        [*SEARCHES.values(), Recipe(), sc.control.GradBalance(), sc.control.Lagrangian()]
    )
    names = [f.name for f in dataclasses.fields(base) if f.init]
    if not names:
        return "fine"
    name = rng.choice(names)
    value = rng.choice([*NUMBER, *OTHER, *TEXTS[-12:]])
    print(type(base).__name__, name, _shown(value))
    return call(lambda: dataclasses.replace(base, **{name: value}), (ValueError, TypeError))


def _check_ticket(ticket: sc.Ticket, name: str, values: dict[str, Any]) -> None:
    if any(values["batches"] is u or (u is not None and _empty(values["batches"])) for u in _UNMET):
        if name not in _WITHOUT_DATA:
            raise Failure("a ticket of no data")
    for what, tensors in (("scores", ticket.scores or {}), ("weights", ticket.weights)):
        for key, t in tensors.items():
            if t.is_floating_point() and bool(t.isnan().any()) and not bool(_nan(values["model"])):
                raise Failure(f"{what} of {key} are no numbers")


def _empty(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) and not value


def _nan(model: Any) -> bool:
    return any(
        bool(p.isnan().any() or p.isinf().any()) for p in model.parameters() if not p.is_meta
    )


def _state(model: Any) -> list[Any]:
    """What a refused call leaves as it was."""
    if not isinstance(model, nn.Module):
        return []
    kinds = [type(m).__name__ + type(getattr(m, "pattern", None)).__name__ for m in model.modules()]
    values = [
        v.clone() for v in model.state_dict().values() if isinstance(v, Tensor) and not v.is_meta
    ]
    return [kinds, model.training, [p.requires_grad for p in model.parameters()], *values]


def _generators() -> list[Any]:
    return [
        torch.get_rng_state(),
        random.getstate(),
        str(np.random.get_state()),
        threading.active_count(),
    ]


def _same(a: list[Any], b: list[Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor):
            return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
        return x == y

    return len(a) == len(b) and all(map(equal, a, b))


def _shown(value: Any) -> str:
    text = (
        f"{type(value).__name__}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    )
    return text[:120]
