"""A task that takes milliseconds, and what a kind of file is."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import nn

import sparsecore as sc

from .faults import Changes, Stopped, stop
from .judge import Failure
from .mutations import spoiled


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
        layers = [
            nn.Linear(6, 8),
            *([nn.BatchNorm1d(8)] if norm else []),
            nn.ReLU(),
            nn.Linear(8, 4),
        ]
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
