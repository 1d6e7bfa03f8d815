"""Every kind of file that the library reads: how to come by a small valid one, and who reads it."""

import contextlib
import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import sparsecore as sc
from sparsecore.control import FixedPenalty, Lagrangian
from sparsecore.gates import HardConcrete
from sparsecore.linear_path import path_errors
from sparsecore.regions import round_paths
from sparsecore.scores import snip
from sparsecore.tickets import dense_state
from sparsecore.training import History

from .faults import Changes, Stopped, stop
from .judge import Failure, call, command
from .mutations import spoiled

EAGER = ["--engine", "eager", "--device", "cpu"]
DATA = ["--data", "digits", "--train-samples", "96", "--model-option", "width=0.05", "--recipe", "batch=32"]
SEARCH = ["search", *DATA, "--rewind-epochs", "1", "--epochs", "2", "--search-batch", "32", *EAGER]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        make: makes valid files in an empty folder, which is the current one.
        files: globs of those that are spoiled.
        read: gives them to who reads them, by one of several ways, in the current folder.
        writes: globs of what may be there afterwards besides.
        spoil: what a file might hold instead.
    """

    make: Callable[[], None]
    files: tuple[str, ...]
    read: Callable[[Random], str]
    writes: tuple[str, ...] = ()
    spoil: Callable[[Path, Random], bytes] = spoiled


# --- A task that takes milliseconds --------------------------------------------------------------------


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Points:
    """Four classes of points."""

    def __init__(self) -> None:
        self.y = torch.arange(48) % 4
        self.x = 3 * drawn(4, 6, seed=1)[self.y] + drawn(48, 6, seed=2)

    def __len__(self) -> int:
        return 3

    def epoch(self, index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(index))
        for part in order.split(16):
            yield self.x[part], self.y[part]


def network(norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 4)]
        return sc.sparsify_(nn.Sequential(*layers))


def finite(state: dict[str, torch.Tensor], what: str) -> None:
    """Errors: Failure for a number that is none."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Failure(f"{what}: {name} is not finite")


@contextlib.contextmanager
def interrupted(after: int) -> Iterator[None]:
    """What is done within ends when so many files have been put in their places."""
    changes = Changes(Path.cwd())
    with contextlib.suppress(Stopped), changes.fault(stop, after + 1, only=("os.rename",)):
        yield
        raise Failure(f"ended before file {after + 1}: {changes.count}")


# --- Tickets -------------------------------------------------------------------------------------------


def make_tickets() -> None:
    cts = ["--method", "cts:gate=hard-concrete", "--search-epochs", "2", "--sparsity", "0.7"]
    assert command([*SEARCH, *cts, "--watch", "--out", "t.safetensors"]) == "fine"


def read_ticket(rng: Random) -> str:
    commands = [
        ["info", "--json", "o.json"], ["info"], ["train", "--epochs", "1", "--json", "o.json", *EAGER],
        ["train", "--sanity", rng.choice(["shuffle", "invert", "reinit"]), "--epochs", "1", *EAGER],
        ["train", "--epochs", "1", "--plan", rng.choice(["csr", "state", "compact"]), *EAGER],
        ["train", "--epochs", "1", "--save", "w.safetensors", "--checkpoint", "c", *EAGER],
        ["plan", "--plan", "state", *EAGER], ["plan", "--plan-cache", "p.json", "--batch", "8", *EAGER],
        ["analyze", "layers", "--out", "a"], ["analyze", "gates", "--out", "a"],
        ["analyze", "progress", "--out", "a"],
    ]  # fmt: skip
    chosen = rng.choice(commands)
    place = 2 if chosen[0] == "analyze" else 1
    how = command([*chosen[:place], "t.safetensors", *chosen[place:]])
    if how == "fine" and Path("o.json").exists():
        told = json.loads(Path("o.json").read_text())
        if chosen[0] == "train" and not 0 <= told["accuracy"] <= 100:
            raise Failure(f"accuracy {told['accuracy']}")
    return how


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


def trained(name: str, plan: str, stop_epoch: float, checkpoint: Path | None) -> tuple[nn.Module, History]:
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
            if not all(0 <= e["accuracy"] <= 100 and math.isfinite(e["loss"]) for e in history.epochs):
                raise Failure(f"records that are none: {history.epochs}")
            if [e["epoch"] for e in history.epochs] != [1, 2, 3, 4]:
                raise Failure(f"epochs lost or added: {history.epochs}")
    return "refused" if "refused" in hows else "fine"


def make_command_checkpoint() -> None:
    make_tickets()
    with interrupted(2):
        command(TRAIN)


TRAIN = ["train", "t.safetensors", "--epochs", "3", "--checkpoint", "c", "--metrics", "m.jsonl", *EAGER]


def train_command(rng: Random) -> str:
    how = command([*TRAIN, "--json", "o.json"])
    if how == "fine":
        told = json.loads(Path("o.json").read_text())
        if not 0 <= told["accuracy"] <= 100 or len(told["epochs"]) != 3:
            raise Failure(f"told {told}")
        for line in Path("m.jsonl").read_text().splitlines():
            json.loads(line)
    return how


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
        return SEARCHES["cts"].many(network(), Points(), sparsities=[0.5, 0.8], checkpoint=Path("many.c"))[1]
    return SEARCHES[name](network(norm=name == "strong"), Points(), sparsity=0.7, checkpoint=Path(f"{name}.c"))


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


# --- Rounds ------------------------------------------------------------------------------------------------


def rewound() -> sc.Ticket:
    return replace(SEARCHES["rewinding"], rounds=Path("rounds"))(network(), Points(), sparsity=0.7)


def make_rounds() -> None:
    with interrupted(2):
        rewound()
    sc.Rewinding(SGD, 2, rate=0.4, rounds=Path("rounds"), engine="eager")(network(), Points(), sparsity=0.3)


def read_rounds(rng: Random) -> str:
    ways = [
        lambda: finite(dict(rewound().weights), "rounds"), lambda: sc.load_rounds("rounds"),
        lambda: round_paths(network(), sc.load_rounds("rounds"), Points(), points=3, folder=Path("paths")),
    ]  # fmt: skip
    return call(rng.choice(ways))


# --- Paths between trained networks --------------------------------------------------------------------------


def measured(checkpoint: str = "path.c") -> None:
    ends = [{k: v + 0.1 * i for k, v in dense_state(network()).items()} for i in range(2)]
    path = path_errors(network(), *ends, Points(), points=5, checkpoint=Path(checkpoint))
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
        network(), sc.Recipe(lr=0.05, batch=16, epochs=2), lambda seed: Points(), Points(), points=3, folder=Path("i"),
    )  # fmt: skip
    finite(found.first | {f"second {k}": v for k, v in found.second.items()}, "instability")


def make_instability() -> None:
    with interrupted(6):
        unstable()


RUN = ["analyze", "path", "t.safetensors", "a.safetensors", "b.safetensors", "--points", "3", "--out", "a"]


def make_runs() -> None:
    make_tickets()
    for seed, name in enumerate("ab"):
        train = ["train", "t.safetensors", "--epochs", "1", "--seed", str(seed), "--save", f"{name}.safetensors"]
        assert command([*train, *EAGER]) == "fine"


# --- Comparisons -----------------------------------------------------------------------------------------------

COMPARE = [
    "compare", *DATA, "--methods", "magnitude,magnitude+shuffle,cts", "--sparsities", "0.5", "--seeds", "1",
    "--rewind-epochs", "1", "--epochs", "1", "--search-epochs", "1", "--search-batch", "32", "--out", "c", *EAGER,
]  # fmt: skip


def make_comparison() -> None:
    assert command(COMPARE) == "fine"
    rows = Path("c/results.csv").read_text().splitlines(keepends=True)
    Path("c/results.csv").write_text("".join(rows[:3]))  # the rest is to be done again, from its tickets


def compare_on(rng: Random) -> str:
    how = command(COMPARE)
    if how == "fine":
        with Path("c/results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        accuracies = [float(row["accuracy"]) for row in rows]
        if not all(0 <= a <= 100 for a in accuracies):
            raise Failure(f"accuracies {accuracies}")
        cells = [(row["method"], row["seed"], row["sparsity"]) for row in rows]
        if len(set(cells)) != len(cells):
            raise Failure(f"rows are there twice: {cells}")
    return how


# --- Caches ------------------------------------------------------------------------------------------------------


def make_plans() -> None:
    make_tickets()
    assert command([*PLAN, *EAGER]) == "fine"


PLAN = ["plan", "t.safetensors", "--plan-cache", "p.json", "--batch", "8"]


def make_moments() -> None:
    from PIL import Image

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


# --- Start weights -----------------------------------------------------------------------------------------------


class Ran:
    """What code in a pickle would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("ran"), "code in a file was run")


WEIGHTS = [*SEARCH, "--method", "magnitude", "--sparsity", "0.5", "--out", "u.safetensors"]


def make_weights() -> None:
    make_tickets()
    train = ["train", "t.safetensors", "--epochs", "1", "--save", "w.safetensors", *EAGER]
    assert command(train) == "fine"
    torch.save(load_file("w.safetensors"), "w.pt")


def spoil_weights(path: Path, rng: Random) -> bytes:
    """As any file, and state_dicts of other things than tensors."""
    if path.suffix == ".pt" and rng.random() < 0.6:
        state = load_file("w.safetensors")
        key, odd = rng.choice(sorted(state)), rng.choice(_ODD)(next(iter(state.values())))
        whole = state | {key: odd}
        torch.save(rng.choice([whole, whole, {"state_dict": whole}, odd, [state]]), path)
        return path.read_bytes()
    return spoiled(path, rng)


def start_from(rng: Random) -> str:
    hows = [command([*WEIGHTS, "--weights", name]) for name in ("w.safetensors", "w.pt")]
    if Path("ran").exists():
        raise Failure("code in a file was run")
    return "refused" if "refused" in hows else "fine"


_ODD: list[Callable[[torch.Tensor], Any]] = [
    lambda t: Ran(), lambda t: None, lambda t: 3, lambda t: "x" * 1000, lambda t: t.to_sparse(), lambda t: t.to("meta"),
    lambda t: t.to(torch.complex64), lambda t: t.expand(1 << 12, *t.shape), lambda t: t[:0], lambda t: t * math.nan,
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), lambda t: nn.Parameter(t), lambda t: {"a": Ran()},
    lambda t: t.half(), lambda t: t.double() * 1e300, lambda t: torch.zeros(()).expand(1 << 40),
]  # fmt: skip


_RESULTS = ("a/*.csv", "a/*.png", "o.json")
KINDS: dict[str, Kind] = {
    "ticket": Kind(
        make_tickets, ("t.safetensors",), read_ticket, ("w.safetensors", "c", "p.json", *_RESULTS)
    ),
    "ticket in Python": Kind(make_applied, ("t",), apply_ticket, ("u",)),
    "training": Kind(make_training, ("*.checkpoint",), train_on),
    "train --checkpoint": Kind(make_command_checkpoint, ("c",), train_command, ("o.json",)),
    "train --metrics": Kind(make_command_checkpoint, ("m.jsonl",), train_command, ("o.json",)),
    **{f"search {name}": searching(name) for name in [*SEARCHES, "many"]},
    "rounds": Kind(make_rounds, ("rounds/round-*",), read_rounds, ("rounds/*.safetensors", "paths/*.checkpoint")),
    "path": Kind(make_path, ("path.c",), lambda rng: call(measured)),
    "instability": Kind(make_instability, ("i/*",), lambda rng: call(unstable), ("i/*.checkpoint",)),
    "trained weights": Kind(make_runs, ("[ab].safetensors",), lambda rng: command(RUN), _RESULTS),
    "comparison": Kind(
        make_comparison,
        ("c/setup.json", "c/results.csv", "c/rewind-*", "c/tickets/*"),
        compare_on,
        ("c/*.csv", "c/*.png", "c/*.safetensors"),
    ),
    "plan cache": Kind(make_plans, ("p.json",), lambda rng: command([*PLAN, *EAGER])),
    "moments": Kind(make_moments, ("images/.sparsecore-moments.safetensors",), look_at_images),
    "start weights": Kind(make_weights, ("w.*",), start_from, ("u.safetensors",), spoil_weights),
}
