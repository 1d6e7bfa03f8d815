"""What belongs to the process and not to a model, with one owner: generators that are seeded for a while and put back,
and switches that are thrown and put back.  Threads take turns at the first and share the second.
"""

import functools
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Condition, Lock, get_ident
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .interrupts import ending_with, signals_later

F = TypeVar("F", bound=Callable[..., Any])

_FORKED = ("cpu", "cuda")  # whose generators are put back; others are the process's


class Turn:
    """One thread at a time, first come first served, as often as it likes.

    A lock of Python's may be taken again by who has just given it, so that others would wait for a whole run.
    """

    def __init__(self) -> None:
        self._free()
        self._waiting: deque[object] = deque()

    def _free(self) -> None:
        # A Condition takes and gives its lock in Python, where an interrupt may come between: the lock itself does not.
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._owner, self.depth = 0, 0

    @property
    def wanted(self) -> bool:
        """Whether another thread waits for it."""
        return bool(self._waiting)

    @property
    def mine(self) -> bool:
        return self._owner == get_ident()

    def __enter__(self) -> None:
        depth = self.depth if self.mine else 0
        try:
            with self._lock:
                if not self.mine:
                    self._await()
                self.depth = depth + 1
        except BaseException:  # an interrupt
            self._back_to(depth)
            raise

    def __exit__(self, *error: object) -> None:
        depth = self.depth - 1
        try:
            self._back_to(depth)
        except BaseException:
            self._back_to(depth)
            raise

    def _back_to(self, depth: int) -> None:
        with self._lock:
            if self.mine:
                self._owner, self.depth = self._owner if depth else 0, depth
                self._changed.notify_all()

    def _await(self) -> None:
        place = object()
        try:
            self._waiting.append(place)
            self._changed.wait_for(lambda: self._owner == 0 and self._waiting[0] is place)
            self._owner = get_ident()
        finally:  # an interrupt, too, wherever it comes
            if place in self._waiting:
                self._waiting.remove(place)
            self._changed.notify_all()

    def begin_anew(self) -> None:
        """In a forked process, which has the thread that forked alone."""
        mine, depth = self.mine, self.depth
        self._free()
        self._waiting.clear()
        if mine:
            self._owner, self.depth = get_ident(), depth


drawing = Turn()
"""Held while the process's generators, or those that data hold, are in states of a call's own."""


_States: TypeAlias = tuple[list[Tensor], Any, Any]  # torch's, Python's, numpy's


class _Seeded:
    """The states in which a thread's draws have left the generators, and those that they had before."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.cuda = [d for d in devices if d.type == "cuda"]
        self.other = self._read()

    def _read(self) -> _States:
        cuda = [torch.cuda.get_rng_state(d) for d in self.cuda]
        return [torch.get_rng_state(), *cuda], random.getstate(), np.random.get_state(legacy=False)

    def swap(self) -> None:
        """From the one to the other."""
        (states, pythons, numpys), self.other = self.other, self._read()
        torch.set_rng_state(states[0])
        for device, state in zip(self.cuda, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(pythons)
        np.random.set_state(numpys)


_seeded: list[_Seeded] = []  # of the thread whose turn it is


@contextmanager
def seeded(seed: int | None = None, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Draws inside, from torch's, Python's and numpy's generators, leave them as they were, in other threads too.

    Another thread that wants to draw waits until this one leaves, or is between steps (`between_steps`).  What draws
    without asking, as `torch.randn` in a thread of the user's own, is not held up and draws from these states.

    Args:
        seed: in which they are inside; None: as they are.
        devices: GPUs whose generators count beside the CPU's.
    """
    with drawing:
        mine = _Seeded(devices)
        try:
            _seeded.append(mine)
            if seed is not None:
                _seed(seed, devices)
            yield
        finally:
            with signals_later():
                if mine in _seeded:
                    _seeded.remove(mine)
                mine.swap()


def _seed(seed: int, devices: Sequence[torch.device]) -> None:
    random.seed(seed)
    kind = np.random.get_state(legacy=False)[
        "bit_generator"
    ]  # another than numpy's own may be in its place
    np.random.set_state(getattr(np.random, kind)(seed % 2**64).state)
    if any(device.type not in _FORKED for device in devices):
        torch.manual_seed(seed)  # which knows them
        return
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)


def between_steps() -> None:
    """Lets another thread draw, if one waits and nothing around this thread's `seeded` holds generators too."""
    if not (drawing.mine and drawing.wanted and drawing.depth == 1 and _seeded):
        return
    mine, interrupt = _seeded[-1], None
    try:
        with signals_later():
            _seeded.remove(mine)
            mine.swap()
            drawing.__exit__()
    except BaseException as error:
        interrupt = error
    while not drawing.mine:  # whoever leaves `seeded` has to have it, an interrupt notwithstanding
        try:
            drawing.__enter__()
        except BaseException as error:
            interrupt = error
    with signals_later():
        mine.swap()
        _seeded.append(mine)
    if interrupt is not None:
        raise interrupt


class Shared:
    """A switch of the process: `with switch():` throws it for the first thread that enters, and puts it back for the
    last one that leaves.

    By itself each would put back what it found: one that came second, what the first one had thrown.

    Args:
        throw: makes the context that throws it and puts it back.
    """

    def __init__(self, throw: Callable[[], AbstractContextManager[object]]) -> None:
        self._throw, self._lock, self._within = throw, Lock(), 0
        self._context: AbstractContextManager[object] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        inside = list[bool]()

        def leave() -> None:
            with signals_later(), self._lock:
                if not inside:
                    return
                inside.clear()
                self._within -= 1
                if self._within == 0:
                    assert self._context is not None
                    self._context.__exit__(None, None, None)
                    self._context = None

        with ending_with(leave):
            with signals_later(), self._lock:
                if self._within == 0:
                    self._context = self._throw()
                    self._context.__enter__()
                self._within += 1
                inside.append(True)
            yield


@contextmanager
def torch_that_trains(differentiates: bool = False) -> Iterator[None]:
    """Outside of inference mode, and with gradients if they are taken."""
    if not torch.is_inference_mode_enabled():
        with torch.set_grad_enabled(differentiates or torch.is_grad_enabled()):
            yield
        return
    with torch.inference_mode(False), torch.set_grad_enabled(differentiates):
        yield


def leaving_trainable(function: F) -> F:
    """A function whose tensors can train, under `torch.inference_mode` too."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch_that_trains(False):
            return function(*args, **kwargs)

    return cast(F, outside)


if hasattr(os, "register_at_fork"):  # a loader's workers are forked
    os.register_at_fork(after_in_child=drawing.begin_anew)
