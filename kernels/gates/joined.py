"""Small layers side by side in memory: on a CPU calling an operator costs as much as thousands of its elements."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

JOINED = 2**18  # elements that are worth joining: 1 MiB of float32


class Held(NamedTuple):
    """The layers of one tensor of a role: the number of the first, and how many elements each has."""

    first: int
    sizes: list[int]

    def split(self, t: Tensor) -> Sequence[Tensor]:
        """[elements] of each layer."""
        memory = memory_of(t)
        return memory.split(self.sizes) if len(self.sizes) > 1 else [memory]


def memory_of(t: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie."""
    return t.as_strided((t.numel(),), (1,))


def runs(sizes: Sequence[int], groups: Sequence[int]) -> list[Held]:
    """Neighbours of one group, together as long as they have `JOINED` elements at most."""
    firsts, total = [], 0
    for i, size in enumerate(sizes):
        total += size
        if i == 0 or groups[i] != groups[i - 1] or total > JOINED:
            firsts.append(i)
            total = size
    return [Held(a, list(sizes[a:b])) for a, b in pairwise([*firsts, len(sizes)])]


def join(tensors: Sequence[Tensor], held: Sequence[Held]) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors of the same values, strides and shapes; the memory they share).  One alone stays what it is."""
    if not tensors:
        return [], []
    views, memories = [], []
    for first, sizes in held:
        mine = tensors[first : first + len(sizes)]
        if len(mine) == 1:
            views += mine
            memories += mine
            continue
        memory = torch.cat([memory_of(t) for t in mine])
        memories.append(memory)
        for t, part in zip(mine, memory.split(sizes), strict=True):
            views.append(part.as_strided(t.shape, t.stride(), part.storage_offset()))
    return views, memories


def held_in(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Held]:
    """Which layers each tensor holds, by the sizes of all."""
    first = 0
    for t in tensors:
        last, left = first, t.numel()
        while left > 0:
            left -= sizes[last]
            last += 1
        yield Held(first, list(sizes[first:last]))
        first = last
