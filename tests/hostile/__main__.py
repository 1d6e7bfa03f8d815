"""`python -m tests.hostile --count 2000 --seed 0`: exit code 1 where an input broke a promise."""

import argparse
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import api, damage, signals
from .disk import filling
from .files import KINDS, prepared, spoiling
from .kill import interrupting, killing
from .sandbox import SECONDS, Input, Outcome, Run, outcomes
from .together import together
from .typed import before_typing, typing
from .works import drawn, referred

DISTURBED = ("full disk", "kill", "interrupt", "two at once")  # commands that write


def kinds(cache: Path) -> dict[str, Run]:
    """Every kind of input by its name."""
    files = {name: spoiling(name, cache) for name in KINDS}
    return files | {
        "data": damage.run,
        "options": typing(cache),
        "Python": api.run,
        "full disk": filling(cache),
        "kill": killing(cache),
        "interrupt": interrupting(cache),
        "signal": signals.run,
        "two at once": together(cache),
    }


def needed(inputs: Sequence[Input], cache: Path) -> list[Input]:
    """What is made before: valid files, and what the commands that will be disturbed come to undisturbed."""
    names = dict.fromkeys(given.kind for given in inputs)
    made = {name: prepared(name, cache) for name in names if name in KINDS}
    if "options" in names:
        made["options"] = before_typing(cache)
    disturbed = {drawn(Random(g.seed)) for g in inputs if g.kind in DISTURBED}
    made |= {f"undisturbed {name}": referred(name, cache) for name in sorted(disturbed)}
    return [Input(name, 0, run, seconds=60) for name, run in made.items()]


def limit_of(kind: str) -> float:
    """Seconds of a try: those of a command, or of the three that one is which is disturbed and done again."""
    return SECONDS * (3 if kind in DISTURBED else 1)


def seed_of(kind: str, seed: int, index: int) -> int:
    """Of a kind's input: the same whatever other kinds are run."""
    return zlib.crc32(f"{kind}/{seed}/{index}".encode())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="*", help="glob of kinds")
    parser.add_argument("--only", type=int, help="one input, by the seed that a failure told")
    parser.add_argument("--at-once", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hostile-valid-") as folder:
        cache = Path(folder)
        chosen = {name: run for name, run in kinds(cache).items() if fnmatch(name, given.kind)}
        if not chosen:
            parser.error(f"--kind: expected one of {', '.join(kinds(cache))}")
        tries = range(-(-given.count // len(chosen)) if given.only is None else 1)
        inputs = [
            Input(
                name,
                seed_of(name, given.seed, index) if given.only is None else given.only,
                run,
                limit_of(name),
            )
            for index in tries
            for name, run in chosen.items()
        ][: given.count]
        counts = {name: Counter[str]() for name in chosen}
        lacking = set()
        for found in outcomes(needed(inputs, cache), at_once=given.at_once):
            if found.how != "fine":
                tell(found, "(before any input) ")
                lacking.add(found.input.kind)
                counts.setdefault(found.input.kind, Counter())["failed"] += 1
        inputs = [i for i in inputs if i.kind not in lacking]
        for found in outcomes(inputs, at_once=given.at_once):
            counts[found.input.kind][found.how] += 1
            if found.how == "failed":
                tell(found)
    print(table(counts))
    return 1 if any(count["failed"] for count in counts.values()) else 0


def tell(found: Outcome, what: str = "") -> None:
    given = found.input
    print(f"FAILED  {what}--kind {given.kind!r} --only {given.seed}: {found.why[:300]}")
    for line in found.said.strip().splitlines()[-25:]:
        print("    " + line[:400].encode("ascii", "backslashreplace").decode())
    sys.stdout.flush()


def table(counts: dict[str, Counter[str]]) -> str:
    """Tries, refused, fine and failed by kind, and in all."""

    def row(name: str, count: Counter[str]) -> list[Any]:
        return [name, count.total(), count["refused"], count["fine"], count["failed"]]

    head = ["kind", "tries", "refused", "fine", "failures"]
    rows = [row(name, count) for name, count in counts.items()]
    total = row("in all", sum(counts.values(), Counter()))
    return "\n".join(
        f"{r[0]:28}" + "".join(f"{v:>10}" for v in r[1:]) for r in [head, *rows, total]
    )


if __name__ == "__main__":
    sys.exit(main())
