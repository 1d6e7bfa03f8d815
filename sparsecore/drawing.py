"""What a user's data draws: generators in states that follow from an epoch's number while batches are made, and as
they were in between.
"""

import functools
import hashlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .functions import closed_over, is_of, names_in
from .process import drawing

_DEEPEST, _MOST, _LONGEST = 8, 5000, 100  # levels, objects, items of a container that are looked at
_KINDS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
# Whose functions draw from what they are given.
_LIBRARIES = ("torch", "torchvision", "numpy", "builtins")
_UNSEEN = "_iterator"  # of a DataLoader: processes, queues and threads


# The call before which it is seen what is drawn from: a function's, an iterator's and the first batch's lie behind.
_SETTLED = 4


class Source(NamedTuple):
    """A generator.

    fresh: the state that a seed gives.
    seed: what it was seeded with, in words, or its state when it was found.
    """

    key: int  # of the same bits, the same
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    fresh: Callable[[int], Any]
    seed: str


def sources_of(value: Any = None) -> list[Source]:
    """Those of the process, which a data set without workers augments by, and those that an object holds, as the user
    has seeded them by now.
    """
    with drawing:
        return [*global_sources(str(torch.initial_seed())), *held_sources(value)]


def global_sources(seed: str) -> list[Source]:
    """Torch's, Python's, and numpy's."""
    return [_source(generator, seed) for generator in (torch.default_generator, *_of_process())]


def held_sources(value: Any) -> list[Source]:
    """The generators of torch, Python and numpy that an object holds: in attributes, in what these hold, in closures
    and globals of its functions; of a DataLoader its own, its samplers' and its data set's.

    One that is made while data is read is not seen.
    """
    known = {source.key for source in global_sources("known")}
    found: dict[int, Source] = {}
    for generator in _generators(value):
        source = _source(generator)
        if source.key not in known:
            found.setdefault(source.key, source)
    return list(found.values())


class Drawing:
    """Sources in states that follow from `text` while a call is made, and in those they had otherwise.

    What a user has seeded is neither used up nor seeded anew, so that an epoch draws the same however often others
    were read before it.  Putting states of Python's and numpy's there and back takes a tenth of a millisecond, so those
    that nobody has drawn from by the first batch or two are left alone afterwards.
    """

    def __init__(self, sources: list[Source], text: str) -> None:
        self.sources = sources
        self.states = [source.fresh(_seed(f"{source.seed}/{text}")) for source in sources]
        self.fresh, self.calls = self.states, 0

    def __call__(self, run: Callable[[], Any]) -> Any:
        self.calls += 1
        if self.calls == _SETTLED:
            self._settle()
        with drawing:  # other threads draw from these sources too
            before = [source.read() for source in self.sources]
            try:
                for source, state in zip(self.sources, self.states, strict=True):
                    source.write(state)
                made = run()
                self.states = [source.read() for source in self.sources]
                return made
            finally:
                for source, state in zip(self.sources, before, strict=True):
                    source.write(state)

    def _settle(self) -> None:
        """Leaves alone what was not drawn from; torch's take next to nothing."""
        found = zip(self.sources, self.states, self.fresh, strict=True)
        drawn = [
            (source, state)
            for source, state, fresh in found
            if isinstance(state, Tensor) or not _same(state, fresh)
        ]
        self.sources = [source for source, _ in drawn]
        self.states = [state for _, state in drawn]


def _same(state: Any, fresh: Any) -> bool:
    """Whether a state of Python's or numpy's is that which it began with."""
    if isinstance(fresh, dict):  # numpy's generator adds what is left of a pair of normal numbers
        return all(_same(state[key], fresh[key]) for key in fresh)
    return np.array_equal(state, fresh) if isinstance(fresh, np.ndarray) else state == fresh


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _of_process() -> tuple[Any, Any]:
    """Python's generator and numpy's, whose methods are the functions of these modules."""
    return random.random.__self__, np.random.random.__self__  # type: ignore[attr-defined]


def _source(generator: Any, seed: str | None = None) -> Source:
    """seed: None: what it was seeded with, or its state."""
    if isinstance(generator, torch.Generator):
        device = generator.device

        def of_torch(seed: int) -> Tensor:
            return torch.Generator(device).manual_seed(seed).get_state()

        own = str(generator.initial_seed()) if seed is None else seed
        return Source(id(generator), generator.get_state, generator.set_state, of_torch, own)
    if isinstance(generator, random.Random):
        read = generator.getstate
        fresh = lambda n: random.Random(n).getstate()  # noqa: E731
        return Source(id(generator), read, generator.setstate, fresh, seed or _told(read()))
    if isinstance(generator, np.random.RandomState):
        read = functools.partial(generator.get_state, legacy=False)
        fresh = lambda n: getattr(np.random, read()["bit_generator"])(n).state  # noqa: E731
        return Source(id(generator), read, generator.set_state, fresh, seed or _told(read()))
    bits = generator.bit_generator
    read, write = (
        functools.partial(getattr, bits, "state"),
        functools.partial(setattr, bits, "state"),
    )
    return Source(id(bits), read, write, lambda n: type(bits)(n).state, seed or _told(read()))


def _told(state: Any) -> str:
    found = hashlib.sha256()
    for leaf in tree_leaves(state):
        found.update(leaf.tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode())
    return found.hexdigest()


def _generators(value: Any) -> Iterator[Any]:
    """All generators that can be come to, the nearest first; of what is too large or too deep none."""
    seen: dict[int, Any] = {}
    level = [value]
    for _ in range(_DEEPEST):
        following: list[Any] = []
        for item in level:
            if id(item) in seen or len(seen) >= _MOST:
                continue
            seen[id(item)] = item
            if isinstance(item, _KINDS):
                if not isinstance(item, random.SystemRandom):  # which has no state
                    yield item
            else:
                following += _parts(item)
        level = following


def _parts(item: Any) -> list[Any]:
    """What an object may draw by."""
    if isinstance(item, (Tensor, np.ndarray, types.ModuleType)):
        return []
    if isinstance(item, dict):
        return list(item.values()) if len(item) <= _LONGEST else []
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item) if len(item) <= _LONGEST else []
    if isinstance(item, functools.partial):
        return [item.func, item.args, item.keywords]
    if isinstance(item, (types.MethodType, types.BuiltinMethodType)):
        return [item.__self__, getattr(item, "__func__", None)]
    if isinstance(item, types.FunctionType):
        return _around(item)
    if isinstance(item, type):
        return (
            []
            if is_of(item, _LIBRARIES)
            else [getattr(f, "__func__", f) for f in vars(item).values()]
        )
    held = getattr(item, "__dict__", None)
    parts = [v for k, v in held.items() if k != _UNSEEN] if isinstance(held, dict) else []
    for kind in type(item).__mro__:
        slots = vars(kind).get("__slots__", ())
        parts += [getattr(item, s, None) for s in ([slots] if isinstance(slots, str) else slots)]
    return [*parts, *(kind for kind in type(item).__mro__ if not is_of(kind, _LIBRARIES))]


def _around(function: types.FunctionType) -> list[Any]:
    """What a function takes from around it."""
    named: list[Any] = []
    if not is_of(function, _LIBRARIES):  # a decorator of theirs holds what is the user's
        named = [function.__globals__.get(name) for name in names_in(function.__code__)]
    return [*closed_over(function), function.__defaults__, function.__kwdefaults__, *named]
