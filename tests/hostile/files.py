"""Spoiled files: each is given to the command or call that reads it, and is refused or does no harm."""

import functools
import shutil
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from . import of_calls, of_commands
from .judge import Failure, Guard, contents
from .sandbox import Run
from .task import Kind

KINDS = of_commands.KINDS | of_calls.KINDS


def prepared(name: str, cache: Path) -> Run:
    """Makes valid files of a kind in the cache, and has them read."""

    def run(seed: int, folder: Path) -> str:
        kind = KINDS[name]
        kind.make()
        shutil.copytree(folder, cache / name)
        how = kind.read(Random(0))
        _check(kind, folder, set(contents(cache / name)))
        return how

    return run


def spoiling(name: str, cache: Path) -> Run:
    """Reads the valid files of a kind, of which one is spoiled."""
    return functools.partial(_run, KINDS[name], cache / name)


def _run(kind: Kind, valid: Path, seed: int, folder: Path) -> str:
    rng, guard = Random(seed), Guard(folder)
    shutil.copytree(valid, folder, dirs_exist_ok=True)
    found = {path for pattern in kind.files for path in folder.glob(pattern) if path.is_file()}
    path = rng.choice(sorted(found))
    data = kind.spoil(path, rng)
    path.write_bytes(data)
    before, guard.strict = set(contents(folder)), True
    print(f"{path.relative_to(folder)}: {len(data):,} bytes")
    how = kind.read(rng)
    guard.check()
    if how == "refused" and not _came_to_a_round(path) and path.read_bytes() != data:
        raise Failure(f"{path.name} was refused, and changed")
    _check(kind, folder, before)
    return how


def _came_to_a_round(path: Path) -> bool:
    """Whether it was a training that was taken and ended: what is refused then is the training of a later round."""
    done = path.with_name(path.name.replace("training-", "round-"))
    return not path.exists() and done != path and done.exists()


def _check(kind: Kind, folder: Path, before: set[str]) -> None:
    """Errors: Failure for files that nobody was to write: leftovers of writing."""
    more = {name for name in contents(folder) if not any(fnmatch(name, w) for w in kind.writes)}
    if more := sorted(more - before):
        raise Failure(f"left behind: {', '.join(more)}")
