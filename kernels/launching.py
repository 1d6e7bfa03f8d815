"""Launching the same kernel again, without asking Triton again which one it is.

`kernel[grid](...)` finds by all arguments the compiled kernel among those of its source, which takes longer than
many of them run.  A `Launch` has decided all but the tensors, so that what Triton would compile another kernel for
is only their types, which of them are None and whether their addresses are multiples of 16.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

# What shapes alone decide, for as many of them as a few large models have.
remembered = lru_cache(maxsize=4096)


class Launch:
    """A kernel with its grid, numbers, constants and compiler options; called with its tensors, which come first.

    The first launch of a kind goes Triton's way, which compiles and checks.  So do launches of tensors that are not
    aligned, under hooks, and in the interpreter.
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
        usual = not (bits % 16 or self.kernel.pre_run_hooks or _hooked())
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


def _hooked() -> bool:
    """Whether somebody, as a profiler, wants to know of launches; a hook may be a chain without any."""
    start, end = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(start, "calls", start) or getattr(end, "calls", end))
