"""Launching the same kernel again, without asking Triton again which one it is.

`kernel[grid](...)` finds by all arguments the compiled kernel among those of its source, which takes longer than
many of them run.  A `Launch` has decided all but the tensors, so that what Triton would compile another kernel for
is only their types, which of them are None and whether their addresses are multiples of 16.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.library import wrap_triton

from .dsl import JITFunction, driver, knobs

Function = TypeVar("Function", bound=Callable)


def remembered(decide: Function) -> Function:
    """Keeps what shapes alone decide, for as many of them as a few large models have."""
    kept = lru_cache(maxsize=4096)(decide)

    @wraps(decide)
    def found(*args):
        try:
            return kept(*args)
        except TypeError:  # a size that a compiler leaves open cannot be looked up
            return decide(*args)

    found.cache_clear = kept.cache_clear  # pyright: ignore[reportAttributeAccessIssue]
    return found  # pyright: ignore[reportReturnType]


class Launch:
    """A kernel with its grid, numbers, constants and compiler options; called with its tensors, which come first.

    The first launch of a kind goes Triton's way, which compiles and checks.  So do launches under hooks and in the
    interpreter.  While a compiler traces it becomes a part of the graph.
    """

    __slots__ = ("compiled", "constants", "grid", "kernel", "numbers", "options", "rest")

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[int],
        constants: Mapping[str, Any],
        options: Mapping[str, int],
    ) -> None:
        self.kernel, self.numbers = kernel, numbers
        self.constants, self.options = constants, options
        self.grid = (*grid, 1, 1)[:3]
        self.compiled: dict[tuple, Any] | None = None
        if isinstance(kernel, JITFunction):
            self.compiled = {}
            names = kernel.arg_names[-len(constants) :]
            self.rest = (*numbers, *(constants[name] for name in names))

    def __call__(self, *tensors: Tensor | None) -> None:
        if self.compiled is None:
            self.launch(tensors)
            return
        if type(tensors[0]) not in _PLAIN:
            kernel = wrap_triton(self.kernel)[self.grid]
            kernel(*tensors, *self.numbers, **self.constants, **self.options)
            return
        active, where = driver.active, tensors[0].get_device()  # pyright: ignore[reportOptionalMemberAccess]
        if where != active.get_current_device():
            with torch.cuda.device(where):
                self(*tensors)
            return
        addresses, kind, bits = [], [where], 0
        for t in tensors:
            if t is None:
                addresses.append(None)
                kind.append(None)
            else:
                address = t.data_ptr()
                bits |= address
                addresses.append(address)
                kind.append(t.dtype)
        if bits % 16:  # all are aligned more often than not
            kind += [a is None or a % 16 == 0 for a in addresses]
        usual = not (self.kernel.pre_run_hooks or _hooked())
        found = self.compiled.get(key := tuple(kind)) if usual else None
        if found is None:
            compiled = self.launch(tensors)
            if usual and compiled is not None:
                self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = found
        stream = active.get_current_stream(where)
        run(*self.grid, stream, function, metadata, None, None, None, *addresses, *self.rest)

    def launch(self, tensors: Sequence[Tensor | None]) -> Any:
        """Triton's way; returns the compiled kernel."""
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)


_PLAIN = (Tensor, nn.Parameter)  # no stand-ins


def _hooked() -> bool:
    """Whether somebody, as a profiler, wants to know of launches; a hook may be a chain without any."""
    start, end = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(start, "calls", start) or getattr(end, "calls", end))
