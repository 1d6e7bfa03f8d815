"""Files that calls in Python read: small valid ones, and the calls."""

import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import nn

import sparsecore as sc
from sparsecore.control import FixedPenalty, Lagrangian
from sparsecore.gates import HardConcrete
from sparsecore.linear_path import path_errors
from sparsecore.regions import round_paths
from sparsecore.scores import snip
from sparsecore.tickets import dense_state
from sparsecore.training import History

from .judge import Failure, call
from .task import Kind, Points, drawn, finite, interrupted, network


def make_applied() -> None:
    sc.JointSearch(epochs=2, engine="eager")(network(True), Points(), sparsity=0.5).save("t")


def apply_ticket(rng: Random) -> str:
    found: list[sc.Ticket] = []
    if call(lambda: found.append(sc.Ticket.load("t"))) == "refused":
        return "refused"
    ticket, model = found[0], network(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ways = [
        lambda: ticket.apply_(model), lambda: ticket.apply_(model, drawn(5, 6, seed=3), plan="csr"),
        lambda: ticket.apply_(model, weights=False), lambda: ticket.inverted().apply_(model),
        lambda: ticket.shuffled(3).apply_(model), lambda: ticket.prune_(sc.densify_(model)),
        lambda: (repr(ticket), ticket.hash, ticket.sparsity, ticket.save("u"), sc.Ticket.load("u")),
    ]  # fmt: skip
    how = call(rng.choice(ways))
    after = model.state_dict()
    if how == "refused" and not all(torch.equal(before[k], after[k]) for k in before if k in after):
        raise Failure("the model was changed before the ticket was refused")
    return how


# --- Checkpoints of training -----------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "nesterov": {"optimizer": "sgd", "lr": 0.05, "nesterov": True, "ema": 0.9},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "ema": 0.9},
    "bf16": {"optimizer": "adamw", "lr": 1e-3, "amp": "bf16"},
}
PLANS = ("dense", "mask", "csr")


def trained(
    name: str, plan: str, stop_epoch: float, checkpoint: Path | None
) -> tuple[nn.Module, History]:
    model = network(norm=name in ("sgd", "adamw"))
    if plan != "dense":
        masks = {n: drawn(*m.weight_shape, seed=4) > 0 for n, m in sc.sparse_layers(model).items()}
        sc.Ticket(masks, dense_state(model)).apply_(model)
        sc.plan_(model, plan, drawn(16, 6, seed=3))
    history = sc.train(
        model, Points(), Points(), sc.Recipe(batch=16, epochs=4, **RECIPES[name]), stop_epoch=stop_epoch,
        total_epochs=4, snapshots=[1.0], checkpoint=checkpoint, engine="eager",
    )  # fmt: skip
    return model, history


def make_training() -> None:
    for name in RECIPES:
        for plan in PLANS:
            trained(name, plan, 2, Path(f"{name}-{plan}.checkpoint"))


def train_on(rng: Random) -> str:
    """Every file is tried: one of them is spoiled."""
    hows = []
    for path in sorted(Path().glob("*.checkpoint")):
        name, plan = path.stem.split("-")
        done: list[tuple[nn.Module, History]] = []
        hows.append(call(lambda n=name, p=plan, c=path, d=done: d.append(trained(n, p, 4, c))))
        for model, history in done:
            finite(dense_state(model), str(path))
            # A record of a file may be one of a run without test data.
            measured = [
                history.accuracy,
                *(e["accuracy"] for e in history.epochs if "accuracy" in e),
            ]
            losses = [e["loss"] for e in history.epochs]
            if not (all(0 <= m <= 100 for m in measured) and all(map(math.isfinite, losses))):
                raise Failure(f"records that are none: {history.epochs}")
            if [e["epoch"] for e in history.epochs] != [1, 2, 3, 4]:
                raise Failure(f"epochs lost or added: {history.epochs}")
    return "refused" if "refused" in hows else "fine"


# --- Checkpoints of searches -----------------------------------------------------------------------------

ADAM = sc.Recipe(optimizer="adam", lr=1e-2, batch=16)
SGD = sc.Recipe(lr=0.05, batch=16)
SEARCHES: dict[str, Any] = {
    "joint": sc.JointSearch(epochs=3, engine="eager", recipe=SGD),
    "cts": sc.ConcreteSearch(epochs=3, engine="eager"),
    "cts-blocks": sc.ConcreteSearch(
        epochs=3, engine="eager", gate=HardConcrete(), granularity=sc.granularity.Block(2, 2),
    ),
    "cts-lagrangian": sc.ConcreteSearch(epochs=3, engine="eager", control=Lagrangian()),
    "strong": sc.StrongSearch(epochs=3, engine="eager"),
    "continuous": sc.ContinuousSparsification(epochs=3, engine="eager", recipe=ADAM),
    "continuous-sgd": sc.ContinuousSparsification(epochs=3, engine="eager", recipe=SGD),
    "edge-popup": sc.EdgePopup(epochs=3, engine="eager"),
    "set": sc.SET(ADAM, 3, engine="eager"),
    "rigl": sc.RigL(SGD, 3, interval=2, engine="eager"),
    "gradual": sc.GradualMagnitude(ADAM, 3, updates=3, rewind=True, engine="eager"),
    "synflow": sc.Iterative(rounds=4),
    "iterative-snip": sc.Iterative(snip, rounds=4),
    "penalty": sc.ConcreteSearch(epochs=2, engine="eager", control=FixedPenalty()),
    "rewinding": sc.Rewinding(SGD, 2, rate=0.4, engine="eager"),
    "lr-rewinding": sc.Rewinding(ADAM, 2, rate=0.4, rewind="learning-rate", engine="eager"),
}  # fmt: skip
_STOPS = {"penalty": 4, "rewinding": 4, "lr-rewinding": 5}


def searched(name: str) -> sc.Ticket:
    if name == "many":
        return SEARCHES["cts"].many(
            network(), Points(), sparsities=[0.5, 0.8], checkpoint=Path("many.c")
        )[1]
    return SEARCHES[name](
        network(norm=name == "strong"), Points(), sparsity=0.7, checkpoint=Path(f"{name}.c")
    )


def searching(name: str) -> Kind:
    def make() -> None:
        with interrupted(_STOPS.get(name, 2)):
            searched(name)

    def read(rng: Random) -> str:
        found: list[sc.Ticket] = []
        how = call(lambda: found.append(searched(name)))
        for ticket in found:
            finite(dict(ticket.weights), name)
            finite(dict(ticket.scores or {}), name)
            ticket.save("t")
            if set(ticket.masks) != set(sc.sparse_layers(network(norm=name == "strong"))):
                raise Failure(f"masks of {sorted(ticket.masks)}")
        return how

    own = (f"{name}.c", f"{name}.c.search", f"{name}.c.[01]", f"{name}.c/*.safetensors")
    return Kind(make, own, read, ("t", *own))


# --- Rounds, paths, moments --------------------------------------------------------------------------------


def rewound() -> sc.Ticket:
    return replace(SEARCHES["rewinding"], rounds=Path("rounds"))(network(), Points(), sparsity=0.7)


def make_rounds() -> None:
    with interrupted(2):
        rewound()
    sc.Rewinding(SGD, 2, rate=0.4, rounds=Path("rounds"), engine="eager")(
        network(), Points(), sparsity=0.3
    )


def read_rounds(rng: Random) -> str:
    ways = [
        lambda: finite(dict(rewound().weights), "rounds"), lambda: sc.load_rounds("rounds"),
        lambda: round_paths(network(), sc.load_rounds("rounds"), Points(), points=3, folder=Path("paths")),
    ]  # fmt: skip
    return call(rng.choice(ways))


def measured(checkpoint: str = "path.c") -> None:
    a = dense_state(network())
    b = {k: v + 0.1 for k, v in a.items()}
    path = path_errors(network(), a, b, Points(), points=5, checkpoint=Path(checkpoint))
    sc.connectivity.barrier(path)
    if len(path.rows) != 5 or not all(map(math.isfinite, path.losses)):
        raise Failure(f"a path of {path.rows}")
    if not all(0 <= e <= 100 for e in path.errors) or list(path.alphas) != [0, 0.25, 0.5, 0.75, 1]:
        raise Failure(f"a path of {path.rows}")


def make_path() -> None:
    with interrupted(3):
        measured()


def unstable() -> None:
    found = sc.connectivity.instability(
        network(), sc.Recipe(lr=0.05, batch=16, epochs=2), lambda seed: Points(), Points(), points=3,
        folder=Path("i"),
    )  # fmt: skip
    finite(found.first | {f"second {k}": v for k, v in found.second.items()}, "instability")


def make_instability() -> None:
    with interrupted(6):
        unstable()


def make_moments() -> None:
    rng = Random(0)
    for split in ("train", "test"):
        for label in "ab":
            folder = Path("images", split, label)
            folder.mkdir(parents=True)
            for i in range(4):
                Image.frombytes("RGB", (8, 8), rng.randbytes(192)).save(folder / f"{i}.png")
    sc.load("folder:images")


def look_at_images(rng: Random) -> str:
    def load() -> None:
        data = sc.load("folder:images")
        if not all(map(math.isfinite, [*data.mean, *data.std])) or min(data.std) <= 0:
            raise Failure(f"moments {data.mean} {data.std}")

    return call(load)


KINDS: dict[str, Kind] = {
    "ticket in Python": Kind(make_applied, ("t",), apply_ticket, ("u",)),
    "training": Kind(make_training, ("*.checkpoint",), train_on),
    **{f"search {name}": searching(name) for name in [*SEARCHES, "many"]},
    "rounds": Kind(
        make_rounds,
        ("rounds/round-*",),
        read_rounds,
        ("rounds/*.safetensors", "paths/*.checkpoint"),
    ),
    "path": Kind(make_path, ("path.c",), lambda rng: call(measured)),
    "instability": Kind(
        make_instability, ("i/*",), lambda rng: call(unstable), ("i/*.checkpoint",)
    ),
    "moments": Kind(make_moments, ("images/.sparsecore-moments.safetensors",), look_at_images),
}
