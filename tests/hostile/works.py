"""Commands that write files, what they come to undisturbed, and how much work that is."""

import csv
import hashlib
import json
import math
import mmap
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

import sparsecore as sc
from sparsecore.writing import _PART

from .faults import Changes, stop
from .judge import Failure, call, command, contents
from .of_calls import searched
from .of_commands import DATA as SMALL
from .of_commands import EAGER, PLAN, make_tickets
from .sandbox import Run

DATA = [*SMALL, "--rewind-epochs", "2", "--epochs", "4", "--search-batch", "32", *EAGER]
_UNSURE = ("seconds", "search_seconds", "train_seconds")  # what differs from run to run


@dataclass(frozen=True)
class Work:
    """A command or call.

    Args:
        run: does it in the current folder: "fine" or "refused".
        result: what it has come to, as JSON, from the files that it wrote.
        make: what it needs.
        saved: whether its result is safe, so that nothing is lost if it begins anew.
        unit: how many passes backward may be lost by a fault: those of an epoch, or of what is kept as a whole;
            infinite where clocks say how many there are.
    """

    run: Callable[[], str]
    result: Callable[[], Any]
    make: Callable[[], None] = lambda: None
    saved: Callable[[], bool] = lambda: Path("t").exists()
    unit: float = 4


@dataclass(frozen=True)
class Reference:
    """What the work comes to undisturbed: result, changes of files, passes, names and sizes of files, seconds."""

    result: Any
    changes: int
    passes: int
    names: list[str]
    largest: int
    total: int
    seconds: float


class Passes:
    """Counts passes backward, of child processes too; for a process's whole life."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8)
        run = torch.autograd._engine_run_backward  # pyright: ignore[reportAttributeAccessIssue]

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.memory[:8] = (self.count + 1).to_bytes(8, "little")
            return run(*args, **kwargs)

        torch.autograd._engine_run_backward = counted  # pyright: ignore[reportAttributeAccessIssue]

    def forget(self) -> None:
        self.memory[:8] = bytes(8)

    @property
    def count(self) -> int:
        return int.from_bytes(self.memory[:8], "little")


def state_of(path: str) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def ticket_of(path: str) -> list[str]:
    return [sc.Ticket.load(path).hash, state_of(path)]


def json_of(path: str) -> Any:
    return _sure(json.loads(Path(path).read_text()))


def lines_of(path: str) -> Any:
    return [_sure(json.loads(line)) for line in Path(path).read_text().splitlines()]


def rows_of(path: str) -> Any:
    with Path(path).open(newline="") as file:
        return [_sure(row) for row in csv.DictReader(file)]


def _sure(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _sure(v) for k, v in value.items() if k not in _UNSURE}
    return [_sure(v) for v in value] if isinstance(value, list) else value


def searching(method: str, *more: str, unit: float = 4) -> Work:
    argv = [
        "search",
        *DATA,
        "--method",
        method,
        "--sparsity",
        "0.7",
        "--out",
        "t",
        "--json",
        "o.json",
        *more,
    ]
    return Work(lambda: command(argv), lambda: [ticket_of("t"), json_of("o.json")], unit=unit)


def in_python(name: str) -> Work:
    """A search whose ticket is saved by hand: what one does who has no command."""
    return Work(lambda: call(lambda: searched(name).save("t")), lambda: ticket_of("t"), unit=4)


_TRAIN = [
    "train",
    "t.safetensors",
    "--epochs",
    "5",
    "--checkpoint",
    "c",
    "--metrics",
    "m",
    "--save",
    "w",
    "--json",
    "o",
]
_COMPARE = [
    "compare", *DATA, "--methods", "cts,magnitude,cts+shuffle", "--sparsities", "0.5", "--seeds", "2",
    "--search-epochs", "3", "--out", "c",
]  # fmt: skip
_INSTABILITY = [
    "analyze",
    "instability",
    "t.safetensors",
    "--points",
    "3",
    "--out",
    "a",
    "--json",
    "o",
]

WORKS: dict[str, Work] = {
    "search cts": searching("cts", "--search-epochs", "5"),
    "search joint": searching("joint", "--search-epochs", "5"),
    "search ltr": searching("ltr:rate=0.5", unit=5),
    "search ltr --rounds": searching("ltr:rate=0.5", "--rounds", "r", unit=5),
    "search edge-popup": searching("edge-popup", "--search-epochs", "5"),
    "search rigl": searching("rigl:interval=4"),
    "search magnitude": searching("magnitude"),
    "search synflow": searching("synflow"),
    "Search.save": in_python("cts"),
    "Rewinding.save": in_python("rewinding"),
    "many.save": replace(in_python("many"), unit=12),
    "train": Work(
        lambda: command([*_TRAIN, *EAGER]),
        lambda: [json_of("o"), lines_of("m"), state_of("w")],
        make_tickets,
    ),
    "compare": Work(
        lambda: command(_COMPARE),
        lambda: [rows_of("c/results.csv"), *map(ticket_of, map(str, sorted(Path("c/tickets").glob("*"))))],
        unit=14,
    ),
    "analyze instability": Work(
        lambda: command(_INSTABILITY), lambda: [json_of("o"), rows_of("a/instability.csv")], make_tickets
    ),
    "plan": Work(
        lambda: command([*PLAN, *EAGER]), lambda: None, make_tickets, unit=math.inf
    ),
}  # fmt: skip


def drawn(rng: Random) -> str:
    """The work of a try: its seed's first draw."""
    return rng.choice(sorted(WORKS))


def referred(name: str, cache: Path) -> Run:
    """Does the work undisturbed, and notes what it came to in the cache."""

    def run(seed: int, folder: Path) -> str:
        work = WORKS[name]
        (cache / "inputs").mkdir(parents=True, exist_ok=True)
        work.make()
        shutil.copytree(folder, cache / "inputs" / name)
        changes, passes, start = Changes(folder), Passes(), time.monotonic()
        with changes.fault(stop, -1):
            how = work.run()
        seconds, sizes = time.monotonic() - start, [len(b) for b in contents(folder).values()]
        found = Reference(
            work.result(), changes.count, passes.count, sorted(contents(folder)), max(sizes), sum(sizes), seconds
        )  # fmt: skip
        (cache / f"{name}.json").write_text(json.dumps(asdict(found)))
        return how

    return run


def reference_of(name: str, cache: Path) -> Reference:
    return Reference(**json.loads((cache / f"{name}.json").read_text()))


def check_again(name: str, cache: Path, passes: Passes, faults: int) -> str:
    """Does the work once more where it was disturbed: it goes on, and comes to what it would have come to.

    Errors: Failure for another end, another result, work that is done twice, and files that should not be there.
    """
    work, undisturbed, folder = WORKS[name], reference_of(name, cache), Path.cwd()
    # What a killed write had begun may be empty, and is gone below.
    left = (n for n, data in contents(folder).items() if not data and not n.endswith(_PART))
    if empty := [n for n in left if n != "m"]:
        raise Failure(f"empty files were left: {empty}")
    if (how := work.run()) != "fine":
        raise Failure(f"the same command again was {how}")
    result = json.loads(json.dumps(work.result()))
    if result != undisturbed.result:
        raise Failure(f"another result: {str(result)[:300]} for {str(undisturbed.result)[:300]}")
    if more := sorted(set(contents(folder)) ^ set(undisturbed.names)):
        raise Failure(f"left behind, or lacking: {', '.join(more)}")
    if passes.count > undisturbed.passes + faults * work.unit:
        raise Failure(
            f"work was done twice: {passes.count} passes for {undisturbed.passes}, of which each of {faults} faults "
            f"may cost {work.unit}"
        )
    return how
