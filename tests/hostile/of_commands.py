"""Files that commands read: small valid ones, and the commands."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .judge import Failure, command
from .mutations import spoiled
from .task import Kind, interrupted

EAGER = ["--engine", "eager", "--device", "cpu"]
DATA = [
    "--data",
    "digits",
    "--train-samples",
    "96",
    "--model-option",
    "width=0.05",
    "--recipe",
    "batch=32",
]
SEARCH = ["search", *DATA, "--rewind-epochs", "1", "--epochs", "2", "--search-batch", "32", *EAGER]


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


def make_command_checkpoint() -> None:
    make_tickets()
    with interrupted(2):
        command(TRAIN)


TRAIN = [
    "train",
    "t.safetensors",
    "--epochs",
    "3",
    "--checkpoint",
    "c",
    "--metrics",
    "m.jsonl",
    *EAGER,
]


def train_command(rng: Random) -> str:
    how = command([*TRAIN, "--json", "o.json"])
    if how == "fine":
        told = json.loads(Path("o.json").read_text())
        if not 0 <= told["accuracy"] <= 100 or len(told["epochs"]) != 3:
            raise Failure(f"told {told}")
        for line in Path("m.jsonl").read_text().splitlines():
            json.loads(line)
    return how


RUN = [
    "analyze",
    "path",
    "t.safetensors",
    "a.safetensors",
    "b.safetensors",
    "--points",
    "3",
    "--out",
    "a",
]


def make_runs() -> None:
    make_tickets()
    for seed, name in enumerate("ab"):
        train = [
            "train",
            "t.safetensors",
            "--epochs",
            "1",
            "--seed",
            str(seed),
            "--save",
            f"{name}.safetensors",
        ]
        assert command([*train, *EAGER]) == "fine"


COMPARE = [
    "compare", *DATA, "--methods", "magnitude,magnitude+shuffle,cts", "--sparsities", "0.5", "--seeds", "1",
    "--rewind-epochs", "1", "--epochs", "1", "--search-epochs", "1", "--search-batch", "32", "--out", "c", *EAGER,
]  # fmt: skip


def make_comparison() -> None:
    assert command(COMPARE) == "fine"
    rows = Path("c/results.csv").read_text().splitlines(keepends=True)
    Path("c/results.csv").write_text(
        "".join(rows[:3])
    )  # the rest is to be done again, from its tickets


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


def make_plans() -> None:
    make_tickets()
    assert command([*PLAN, *EAGER]) == "fine"


PLAN = ["plan", "t.safetensors", "--plan-cache", "p.json", "--batch", "8"]


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
    lambda t: Ran(), lambda t: None, lambda t: 3, lambda t: "x" * 1000, lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.to(torch.complex64), lambda t: t.expand(1 << 12, *t.shape), lambda t: t[:0], lambda t: t * math.nan,
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), lambda t: nn.Parameter(t), lambda t: {"a": Ran()},
    lambda t: t.half(), lambda t: t.double() * 1e300, lambda t: torch.zeros(()).expand(1 << 40),
]  # fmt: skip


_RESULTS = ("a/*.csv", "a/*.png", "o.json")
KINDS: dict[str, Kind] = {
    "ticket": Kind(
        make_tickets, ("t.safetensors",), read_ticket, ("w.safetensors", "c", "p.json", *_RESULTS)
    ),
    "train --checkpoint": Kind(make_command_checkpoint, ("c",), train_command, ("o.json",)),
    "train --metrics": Kind(make_command_checkpoint, ("m.jsonl",), train_command, ("o.json",)),
    "trained weights": Kind(make_runs, ("[ab].safetensors",), lambda rng: command(RUN), _RESULTS),
    "comparison": Kind(
        make_comparison,
        ("c/setup.json", "c/results.csv", "c/rewind-*", "c/tickets/*"),
        compare_on,
        ("c/*.csv", "c/*.png", "c/*.safetensors"),
    ),
    "plan cache": Kind(make_plans, ("p.json",), lambda rng: command([*PLAN, *EAGER])),
    "start weights": Kind(make_weights, ("w.*",), start_from, ("u.safetensors",), spoil_weights),
}
