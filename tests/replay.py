"""What a CUDA graph does to a step, without a GPU: record it once, then replay with no Python and poisoned memory.

A graph keeps launches, addresses and numbers.  Memory that was allocated during the recording is shared by the
graph's kernels, so what a replay finds there is anything; here NaN, and in integers a huge value.  Triton's
kernels count as one operation each, and run in the interpreter.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from sparsecore import capture
from sparsecore.kernels import philox
from sparsecore.kernels.gates import bank as gate_bank

# What makes the host wait for a value, or brings one of its own: by operator, and by function of Python.
_READS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "unique",
)
_MAKES = ("lift_fresh", "lift_fresh_copy")
_TOUCHES = ("tolist", "numpy", "cpu", "pin_memory", "from_numpy", "as_tensor", "frombuffer")


class _Operation(NamedTuple):
    call: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    fresh: list[tuple[int, Tensor]]  # results in memory of their own, by place


class Recording(TorchDispatchMode):
    """One call of `run`: its operations, what it allocated, and what it read that was there before.

    All that was there before is put back when the call has been recorded, since a capture computes nothing.

    Attributes:
        touches: where the host read a value or made a tensor out of its own, in words.
        present: the recording that is being made.
    """

    present: ClassVar["Recording | None"] = None

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.inside: dict[int, Tensor] = {}  # by storage: a tensor of all its memory
        self.outside: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # and what was in it
        self.touches: list[str] = []
        self._within = False  # an operation, whose own parts are not recorded
        Recording.present = self
        try:
            with _launches(self), _HostTouches(self.touches), self:
                run()
        finally:
            Recording.present = None
        with torch.no_grad():
            for memory, before in self.outside.values():
                _of(memory, before.dtype).copy_(before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs or {})

    def record(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._within:
            return func(*args, **kwargs)
        with _unseen():
            return self._record(func, args, kwargs)

    def _record(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "").split(".")[0]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in _READS:
            self.touches.append(name)
        if name in _MAKES:  # of numbers of the host's, which no replay brings
            self.touches.append("a tensor from the host")
            self.inside |= {_key(t): _flat(t) for t in given}
        self.touch(given)
        self._within = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._within = False
        if name.startswith("_record_function"):  # the profiler's
            return result
        known, fresh = {_key(t) for t in given}, []
        for i, t in enumerate(tree_leaves(result)):
            if isinstance(t, Tensor) and _key(t) not in known:
                fresh.append((i, t))
                self.inside.setdefault(_key(t), _flat(t))
        self.operations.append(_Operation(func, args, kwargs, fresh))
        return result

    def touch(self, tensors: Iterable[Tensor]) -> None:
        """Notes memory that was there before."""
        with _unseen():
            for t in tensors:
                if _key(t) not in self.inside and _key(t) not in self.outside:
                    self.outside[_key(t)] = t.untyped_storage(), _flat(t).clone()

    @torch.no_grad()
    def __call__(self) -> None:
        """A replay."""
        for memory in self.inside.values():
            _poison_(memory)
        for call, args, kwargs, fresh in self.operations:
            found = tree_leaves(call(*args, **kwargs))
            for i, t in fresh:
                t.detach().copy_(found[i])

    def lost(self) -> int:
        """How much of what a replay reads nothing else keeps.  There is no replay afterwards."""
        refs = [StorageWeakRef(storage) for storage, _ in self.outside.values()]
        for held in (self.operations, self.inside, self.outside):
            held.clear()
        gc.collect()
        return sum(ref.expired() for ref in refs)


@contextmanager
def _unseen() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class _HostTouches(TorchFunctionMode):
    """Functions that read or make values without any operation."""

    def __init__(self, touches: list[str]) -> None:
        super().__init__()
        self.touches = touches

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _TOUCHES:
            self.touches.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _launches(recording: Recording) -> Iterator[None]:
    """Each interpreted launch that is no part of an operation is one."""
    run = InterpretedFunction.run

    def launch(self, *args, **kwargs):
        return recording.record(run, (self, *args), kwargs)

    InterpretedFunction.run = launch  # type: ignore[method-assign]
    try:
        yield
    finally:
        InterpretedFunction.run = run  # type: ignore[method-assign]


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _flat(t: Tensor) -> Tensor:
    """All the memory that a tensor's is a part of."""
    return _of(t.untyped_storage(), t.dtype)


def _of(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage)  # type: ignore[arg-type]


def _poison_(memory: Tensor) -> None:
    if memory.dtype == torch.bool:
        memory.fill_(True)
    elif memory.is_floating_point():
        memory.fill_(torch.nan)
    else:
        memory.fill_(torch.iinfo(memory.dtype).max)


# --- In place of a GPU ------------------------------------------------------------------------------


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """`capture.Captured` records as above, and banks go a GPU's way; all recordings that were made."""
    made: list[Recording] = []

    def record(run: Callable[[], Any], *_: Any) -> Recording:
        with torch.random.fork_rng(devices=[]):  # a capture draws nothing
            made.append(Recording(run))
        return made[-1]

    def noted(launch: Callable[..., None]) -> Callable[..., None]:
        @wraps(launch)
        def call(*args: Any) -> None:
            # Kernels reach a list's other tensors by their distance from the first.
            if Recording.present is not None:
                Recording.present.touch(t for t in tree_leaves(args) if isinstance(t, Tensor))
            launch(*args)

        return call

    def uniform_(*args: Any, **options: Any) -> Tensor:
        # Kernels' bits on a CPU too, and one operation, as a launch is.
        options["exact"] = True
        if Recording.present is None:
            return draw(*args, **options)
        return Recording.present.record(draw, args, options)

    draw = philox.uniform_
    for module in [m for m in sys.modules.values() if getattr(m, "uniform_", None) is draw]:
        monkeypatch.setattr(module, "uniform_", uniform_)
    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(capture, "aside", lambda device: torch.random.fork_rng(devices=[]))
    monkeypatch.setattr(capture, "possible_on", lambda device: True)
    monkeypatch.setattr(gate_bank, "plain_on", lambda device: False)
    for name, launch in (
        ("_sample", gate_bank.launch_sample_gates),
        ("_backward", gate_bank.launch_gates_backward),
        ("_step", gate_bank.launch_bank_step),
    ):
        monkeypatch.setattr(gate_bank, name, noted(launch))
    return made
