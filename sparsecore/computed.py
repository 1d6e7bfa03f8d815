"""Weights that are computed from a parameter (gates, plans): no place to write, where that would be lost."""

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from .warned import SparsityWarning


class _Made(Tensor):
    """A tensor that was made for whoever asked, and sees when it or a view of it is written to or read.

    What is computed from it is plain, and so are copies, files and parameters made of it.
    """

    def noted(self, writes: bool) -> None:
        """It is written to, or read."""

    def viewed(self, view: Tensor) -> Self:
        """A view of it, which sees the same."""
        made = view.as_subclass(type(self))
        vars(made).update(vars(self))
        return made

    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict) -> Tensor:
        self.noted(False)
        return copy.deepcopy(self.plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.noted(False)
        return self.plain().__reduce_ex__(protocol)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param":  # nn.Parameter(weight), as load_state_dict(assign=True) makes one
            self.noted(False)
            self.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]
        else:
            super().__setattr__(name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [kwargs.get("out")]
        if _writes(func):
            written += args[:1] or kwargs.values()
        targets = [t for t in _flat(written) if isinstance(t, _Made)]
        for tensor in targets:
            tensor.noted(True)
        if getattr(func, "__name__", "") not in _ACCESS:
            for tensor in _flat((*args, *kwargs.values())):
                if isinstance(tensor, _Made) and not any(tensor is t for t in targets):
                    tensor.noted(False)
        weight = args[0] if args else None
        if isinstance(weight, ComputedWeight) and _name(func) == "grad":
            raise RuntimeError(
                f"layer.weight.grad: expected a parameter, got a weight computed under {weight.why}; read "
                "layer.raw_weight.grad"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return _guarded(result, weight) if isinstance(weight, _Made) else result


class ComputedWeight(_Made):
    """A weight as its layer computes it: to read and to differentiate.  Writing there would be lost, so it raises."""

    why = "a pattern"

    @classmethod
    def of(cls, weight: Tensor, why: str) -> Self:
        made = weight.as_subclass(cls)
        made.why = why
        return made

    def noted(self, writes: bool) -> None:
        if writes:
            raise RuntimeError(
                f"layer.weight: expected no writing to it, since it is computed under {self.why}; write to "
                "layer.raw_weight, the parameter it is computed from, or call sparsecore.densify_(model) first"
            )


class StateWeight(_Made):
    """A plan's weight in a state_dict: a copy, to be written to and loaded again.  What is written there and never
    read, as by averages that write through a state_dict (timm's ModelEma), is told once it is gone.
    """

    record: dict[str, bool]

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        made = weight.as_subclass(cls)
        made.record = {"lost": False}
        weakref.finalize(made, _tell_lost, made.record).atexit = False
        return made

    def noted(self, writes: bool) -> None:
        self.record["lost"] = writes


def _tell_lost(record: dict[str, bool]) -> None:
    if record["lost"]:
        warnings.warn(
            "state_dict: what was written into a planned layer's weight is lost, since that was a copy; load the "
            "state_dict, or call plan_(model, 'mask') for tools that write through it (averages): its weights are the "
            "parameters themselves",
            SparsityWarning,
            stacklevel=2,
        )


def _name(func: Any) -> str:
    """Its name; of a property, the property's."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name in _ACCESS else name


_ACCESS = ("__get__", "__set__", "__delete__")
_OPERATORS = {
    "__setitem__",
    "__set__",
    *(f"__i{name}__" for name in (
        "add", "and", "div", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor"
    )),
}  # fmt: skip
_HARMLESS = ("requires_grad_", "retain_grad", "register_hook", "share_memory_")


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name in _OPERATORS


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Values and those in lists among them, as `torch._foreach_mul_` takes them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _guarded(result: Any, weight: _Made) -> Any:
    """What was made of a weight: views of it see what is done to them as well."""
    if type(result) in (list, tuple):
        return type(result)(_guarded(one, weight) for one in result)
    if isinstance(result, np.ndarray) and isinstance(weight, ComputedWeight):
        result = result.view()
        result.flags.writeable = False
    elif _views(result, weight):
        return weight.viewed(result)  # pyright: ignore[reportArgumentType]
    return result


def _views(result: Any, weight: Tensor) -> bool:
    return (
        type(result) is Tensor
        and result.layout == torch.strided
        and result.numel() > 0
        and result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )
