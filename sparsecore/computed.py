"""A weight that is computed from a parameter (gates, plans) is no place to write: it refuses."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class ComputedWeight(Tensor):
    """A weight as its layer computes it: to read and to differentiate.  Writing there would be lost, so it raises.

    What is computed from it is plain, and so are copies, files and parameters made of it; views refuse as it does.
    """

    why = "a pattern"
    mend = (
        "write to layer.raw_weight, the parameter it is computed from, or call "
        "sparsecore.densify_(model) first"
    )

    @classmethod
    def of(cls, weight: Tensor, why: str, mend: str = mend) -> "ComputedWeight":
        made = weight.as_subclass(cls)
        made.why, made.mend = why, mend
        return made

    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return copy.deepcopy(self.plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param":  # nn.Parameter(weight), as load_state_dict(assign=True) makes one
            self.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]
        else:
            super().__setattr__(name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [kwargs.get("out")]
        if _writes(func):
            written += args[:1] or kwargs.values()
        for tensor in _flat(written):
            if isinstance(tensor, cls):
                raise RuntimeError(
                    f"layer.weight: expected no writing to it, since it is computed under {tensor.why}; {tensor.mend}"
                )
        if isinstance(args[0] if args else None, cls) and _name(func) == "grad":
            raise RuntimeError(
                f"layer.weight.grad: expected a parameter, got a weight computed under {args[0].why}; read "
                "layer.raw_weight.grad"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        weight = args[0] if args else None
        return _guarded(result, weight) if isinstance(weight, cls) else result


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


def _guarded(result: Any, weight: ComputedWeight) -> Any:
    """What was made of a weight: views of it refuse to be written to as well."""
    if type(result) in (list, tuple):
        return type(result)(_guarded(one, weight) for one in result)
    if isinstance(result, np.ndarray):
        result = result.view()
        result.flags.writeable = False
    elif _views(result, weight):
        return ComputedWeight.of(result, weight.why, weight.mend)
    return result


def _views(result: Any, weight: Tensor) -> bool:
    return (
        type(result) is Tensor
        and result.layout == torch.strided
        and result.numel() > 0
        and result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )
