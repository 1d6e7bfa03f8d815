"""Misuse of the Python API: calls of which an argument or two are not what they should be.

They end as documented: a ValueError or one of its subclasses, a TypeError for what is of another kind altogether; and
what is refused has changed nothing, neither the model nor the global generators.
"""

import dataclasses
import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsecore as sc
from sparsecore import gates, granularity
from sparsecore.linear_path import path_errors
from sparsecore.recipe import Recipe
from sparsecore.scores import magnitude, snip, synflow
from sparsecore.tickets import dense_state

from .judge import Failure, call
from .mutations import NUMBERS, TEXTS
from .valid import SEARCHES, Points, drawn, network

X, Y = Points().x[:16], Points().y[:16]
NAN = X.clone().fill_(math.nan)


class Raw:
    """An object of nobody's."""

    def __repr__(self) -> str:
        return "Raw()"


OTHER = [None, True, "", "x", b"x", [], {}, (), Raw(), 3, 0.5, print, torch.zeros(0), torch.zeros(3), Raw]
NUMBER = [n for n in NUMBERS if not isinstance(n, int) or abs(n) not in (2**31, 7, 255)]
NUMBER = [*NUMBER, math.nan, math.inf, -math.inf, torch.tensor(0.5), np.float32(0.5), np.int64(3)]


def planned() -> nn.Module:
    model = sc.OneShot(magnitude)(network(), Points(), sparsity=0.5).apply_(network())
    return sc.plan_(model, "state")


def with_values(value: float) -> nn.Module:
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(value)
    return model


def frozen_layer() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)
    return model


# Each is called for a new value: what a call does to one must not reach the next.
MODELS: list[Callable[[], Any]] = [
    lambda: nn.Linear(6, 4), nn.Sequential, lambda: nn.ReLU(), lambda: network().requires_grad_(False), frozen_layer,
    lambda: network().double(), lambda: network().half(), lambda: network().to("meta"), lambda: with_values(math.nan),
    lambda: with_values(math.inf), lambda: with_values(0.0), lambda: with_values(1e38), planned, lambda: network(True),
    lambda: sc.sparsify_(nn.Linear(5, 4)), lambda: sc.sparsify_(nn.Linear(6, 1)), lambda: sc.sparsify_(nn.Conv2d(3, 4, 3)),
    lambda: sc.sparsify_(nn.Linear(6, 4, bias=False)), lambda: nn.ModuleList([network()]), lambda: network().eval(),
    lambda: sc.sparsify_(nn.Sequential(nn.Linear(6, 4), nn.Softmax(1))), lambda: network().state_dict(), lambda: network,
]  # fmt: skip


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield X, Y


BATCHES: list[Callable[[], Any]] = [
    lambda: [], lambda: [()], lambda: [(X,)], lambda: [X], lambda: [(X, Y)], lambda: [(X[:1], Y[:1])], lambda: [(X[:0], Y[:0])],
    lambda: [(NAN, Y)], lambda: [(X * math.inf, Y)], lambda: [(X, Y + 100)], lambda: [(X, Y - 1)], lambda: [(X, Y.float())],
    lambda: [(X, Y.bool())], lambda: [(X.long(), Y)], lambda: [(X.double(), Y)], lambda: [(X[:, :3], Y)], lambda: [(X, Y[:3])],
    lambda: [(X, Y[:, None])], lambda: [(X.numpy(), Y.numpy())], lambda: [(X, None)], lambda: [(None, Y)], lambda: [{"x": X}],
    lambda: [(X, Y), (X[:, :2], Y)], lambda: [(X, Y), None], lambda: [(X, Y), (NAN, Y)], lambda: iter([(X, Y)]), lambda: iter([]),
    endless, lambda: DataLoader(TensorDataset(X, Y), 4), lambda: DataLoader(TensorDataset(X[:1], Y[:1]), 4),
    lambda: DataLoader(TensorDataset(X[:0], Y[:0]), 4), lambda: DataLoader([], 4), lambda: TensorDataset(X, Y), lambda: (X, Y),
    lambda: X, lambda: [("ab", "cd")], lambda: [(X.to("meta"), Y)], lambda: [(X.to_sparse(), Y)], lambda: [(X * 1e38, Y)],
    lambda: [(X[..., None], Y)], lambda: [(X + 1j, Y)], lambda: lambda: iter([(X, Y)]), lambda: lambda: None, lambda: lambda: [],
    lambda: [(X.clone().requires_grad_(), Y)], lambda: [(X, F_ONE_HOT)], lambda: [(X, Y.to(torch.uint8))],
]  # fmt: skip
F_ONE_HOT = nn.functional.one_hot(Y, 4)

LOSSES = [
    "mse", "bce", "lm", "cross-entropy", "none", "", nn.CrossEntropyLoss, nn.CrossEntropyLoss(reduction="none"), nn.MSELoss(),
    lambda output, target: output.sum() * math.nan, lambda output, target: 3.0, lambda output, target: None,
    lambda output: output.sum(), lambda output, target: output, lambda output, target: output.detach().sum(),
    lambda model, batch: model(batch[0]).sum(), lambda model, batch: batch, *OTHER,
]  # fmt: skip
PATHS = ["c", Path("c"), Path("missing/c"), Path(), Path("folder"), "/dev/null", "a\x00b", "x" * 300, *OTHER]
PLANS = ["mask", "auto", "csr", "state", "compact", "block", "block:16x16", "block:0x0", "block:3x3", *TEXTS[-12:], *OTHER]
FILTERS = ["0", "!0", "*", "nothing", "[", ["0", "!2"], nn.Linear, int, lambda n, m: True, lambda n, m: None, lambda: 3, *OTHER]
GRANULARITIES = [
    granularity.Block(2, 2), granularity.Block(3, 5), granularity.Block(100, 100), granularity.NM(2, 4), granularity.NM(1, 3),
    granularity.Channel(), granularity.Weight(), "block:2x2", "2:4", *OTHER,
]  # fmt: skip
INPUTS = [X, X[:1], X[:0], NAN, X.double(), X[:, :3], X.long(), X.numpy(), X.to("meta"), *OTHER]


def states() -> list[Any]:
    own = dense_state(network())
    key = next(iter(own))
    odd: list[Any] = [v.clone() for v in (X, NAN)] + [None, own[key].T, own[key][:0], own[key] + 1j, own[key].bool(), "x"]
    return [
        own, {}, dict(list(own.items())[:-1]), own | {"more": X}, {k.upper(): v for k, v in own.items()},
        *({**own, key: value} for value in odd), own | {key: own[key] * math.nan}, network(), *OTHER,
    ]  # fmt: skip


def masks() -> list[Any]:
    own = {n: drawn(*m.weight_shape, seed=1) > 0 for n, m in sc.sparse_layers(network()).items()}
    key = next(iter(own))
    odd = [own[key].float(), own[key].T, own[key][:0], own[key].long(), None, own[key].tolist(), own[key].to("meta")]
    odd += [torch.ones(()).bool(), own[key].numpy(), own[key] & False, own[key] | True, own[key].to_sparse()]
    return [
        own, {}, {key: own[key]}, own | {"more": own[key]}, *({**own, key: value} for value in odd), list(own.values()),
        {3: own[key]}, *OTHER,
    ]  # fmt: skip


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
    "model": MODEL, "batches": DATA, "sparsity": (lambda: 0.5, of([*NUMBER, *OTHER])), "loss": (lambda: None, of(LOSSES)),
    "checkpoint": (lambda: None, of(PATHS)), "watch": (lambda: None, of([lambda m: 1.0, lambda m: "x", lambda m: math.nan, *OTHER])),
    "steps_per_epoch": (lambda: None, of([*NUMBER, *OTHER])),
}  # fmt: skip
_TRAIN: Arguments = {
    "model": MODEL, "train_batches": DATA, "test_batches": DATA,
    "recipe": (lambda: Recipe(batch=16, epochs=2, lr=0.01), of([Recipe(lr=1e30, epochs=1, batch=16), Recipe(amp="fp16"), *OTHER])),
    **{k: v for k, v in _SEARCH.items() if k in ("loss", "checkpoint", "steps_per_epoch")},
    "metric": (lambda: None, of([*LOSSES, "accuracy"])), "metrics": (lambda: None, of(PATHS)),
    **{k: (lambda: 0, of([*NUMBER, *OTHER])) for k in ("start_epoch", "seed")},
    **{k: (lambda: 1, of([*NUMBER[:12], *OTHER])) for k in ("stop_epoch", "total_epochs", "repeats")},
    "snapshots": (tuple, of([[0.5], [99], ["x"], [math.nan], *OTHER])), "engine": (lambda: "eager", of(["graph", "x", *OTHER])),
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
    "train": (lambda **k: sc.train(*(k.pop(n) for n in ("model", "train_batches", "test_batches", "recipe")), **k), _TRAIN),
    "evaluate": (sc.evaluate, {"model": MODEL, "batches": DATA, "loss": (lambda: None, of(LOSSES))}),
    "apply_": (
        lambda masks, weights, model, x, plan: sc.Ticket(masks, weights).apply_(model, x, plan=plan),
        {"masks": _MASKS, "weights": _STATE, "model": MODEL, "x": (lambda: X, of(INPUTS)), "plan": (lambda: "csr", of(PLANS))},
    ),
    "Ticket": (
        lambda masks, weights, meta: [repr(sc.Ticket(masks, weights, meta)), sc.Ticket(masks, weights, meta).save("t")],
        {"masks": _MASKS, "weights": _STATE, "meta": (dict, of([{"a": X}, {"granularity": "x"}, {3: 4}, {"a": {1, 2}}, *OTHER]))},
    ),
    "Ticket.load": (sc.Ticket.load, {"path": (lambda: "t", of(PATHS))}),
    "Ticket.save": (lambda path: sc.OneShot(synflow)(network(), Points(), sparsity=0.5).save(path), {"path": (lambda: "t", of(PATHS))}),
    "from_zeros": (sc.Ticket.from_zeros, {"model": MODEL}),
    "from_prune": (sc.Ticket.from_prune, {"model": MODEL}),
    "load_rounds": (sc.load_rounds, {"folder": (lambda: "r", of(PATHS))}),
    "load": (
        lambda name, data_dir, image_size: sc.load(name, data_dir, image_size=image_size),
        {"name": (lambda: "digits", of(["folder:.", "folder:", "folder:missing", "cats", *OTHER])), "data_dir": (lambda: ".", of(PATHS)),
         "image_size": (lambda: None, _NUMBERS)},
    ),
    "plan_": (
        lambda model, plan, x: sc.plan_(model, plan, x),
        {"model": (planned, MODEL[1]), "plan": (lambda: "csr", of(PLANS)), "x": (lambda: X, of(INPUTS))},
    ),
    "remask_": (sc.remask_, {"model": (planned, MODEL[1]), "masks": _MASKS}),
    "sparsify_": (lambda model, which: sc.sparsify_(model, which), {"model": MODEL, "which": (lambda: "*", of(FILTERS))}),
    "compact": (sc.compact, {"model": (planned, MODEL[1]), "example": (lambda: X, of(INPUTS))}),
    "coverage": (sc.coverage, {"model": MODEL}),
    "densify_": (sc.densify_, {"model": MODEL}),
    "decay_groups": (sc.decay_groups, {"model": MODEL, "weight_decay": (lambda: 0.1, _NUMBERS)}),
    "path_errors": (
        lambda **k: path_errors(k.pop("model"), k.pop("a"), k.pop("b"), k.pop("batches"), **k),
        {"model": MODEL, "a": _STATE, "b": _STATE, "batches": DATA, "points": (lambda: 3, of([0, 1, -1, 2.5, "x", None, math.nan])),
         "checkpoint": (lambda: None, of(PATHS)), "train_batches": (lambda: None, DATA[1]), "limit": (lambda: 2, of([0, -1, "x", None]))},
    ),
    "recompute_statistics_": (sc.recompute_statistics_, {"model": (lambda: network(True), MODEL[1]), "batches": DATA}),
    "parse_granularity": (granularity.parse_granularity, {"text": (lambda: "weight", of([*TEXTS, *OTHER]))}),
    "granularity": (
        lambda g: sc.OneShot(magnitude, g)(network(), Points(), sparsity=0.5), {"g": (granularity.Weight, of(GRANULARITIES))},
    ),
    "Block": (granularity.Block, {"h": (lambda: 2, _NUMBERS), "w": (lambda: 2, _NUMBERS)}),
    "NM": (granularity.NM, {"n": (lambda: 2, _NUMBERS), "m": (lambda: 4, _NUMBERS)}),
    "gates": (
        lambda kind, value: kind(value).init(0.5),
        {"kind": (lambda: gates.Concrete, of([gates.HardConcrete, gates.Gaussian, gates.Concrete])), "value": (lambda: 0.5, _NUMBERS)},
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
    base = rng.choice([*SEARCHES.values(), Recipe(), sc.control.GradBalance(), sc.control.Lagrangian()])
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
    return any(bool(p.isnan().any() or p.isinf().any()) for p in model.parameters() if not p.is_meta)


def _state(model: Any) -> list[Any]:
    """What a refused call leaves as it was."""
    if not isinstance(model, nn.Module):
        return []
    kinds = [type(m).__name__ + type(getattr(m, "pattern", None)).__name__ for m in model.modules()]
    values = [v.clone() for v in model.state_dict().values() if isinstance(v, Tensor) and not v.is_meta]
    return [kinds, model.training, [p.requires_grad for p in model.parameters()], *values]


def _generators() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), str(np.random.get_state()), threading.active_count()]  # noqa: NPY002


def _same(a: list[Any], b: list[Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor):
            return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
        return x == y

    return len(a) == len(b) and all(map(equal, a, b))


def _shown(value: Any) -> str:
    text = f"{type(value).__name__}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text[:120]
