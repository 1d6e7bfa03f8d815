"""Pruned places of a masked layer's parameter are zero, whoever writes there, steps it or looks.

What a masked layer computes does not depend on that: it applies its mask in every forward.  But others take the
parameter by itself: files, tied embeddings, adapters, averages, code that reads `layer.weight`.  So a decided mask
keeps its parameter:

- its gradient is zero there, through whichever module it comes (a hook on the parameter);
- after the step of any optimiser of PyTorch's kind the places are zero again, and so is what the optimiser held for
  them: momentum from before the mask, updates that mix entries (Muon).  Optimisers that compute entry by entry
  leave zeros alone, so they are looked after only when their state or the mask is another one;
- whatever was written otherwise is put back by the layer's next forward, when it is read and when it is saved.

A weight that is computed from a parameter (gates, plans) is no place to write: `ComputedWeight` refuses.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Entry by entry: no gradient, no state and a weight of 0 give a weight of 0.
_ENTRYWISE = {
    getattr(torch.optim, name)
    for name in (
        "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD", "SparseAdam",
    )
}  # fmt: skip

# Keepers by the id of their parameter; what nobody holds any more goes by itself.
_keepers: "weakref.WeakValueDictionary[int, Keeper]" = weakref.WeakValueDictionary()


class Keeper:
    """Keeps one parameter at its mask; belongs to the mask's pattern, and a copy of that begins anew.

    Args:
        still: whether the mask is still its layer's: a search may put another pattern there for a while.
    """

    def __init__(self, still: Callable[[], bool]) -> None:
        self.still = still
        # The parameter, its version and the mask when it was last seen.
        self.known: tuple[Any, ...] = ()
        self.handle: Any = None
        self.trusted: tuple[Any, ...] = ()
        self.passed: tuple[Any, int] = (None, 0)

    def keep(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Puts the places back if the parameter, its values or its mask are others than those last seen."""
        now = (id(parameter), parameter._version, mask)
        if (
            self.known
            and self.known[:2] == now[:2]
            and self.known[2] is mask
            and self._hooked(parameter)
        ):
            return
        self.watch(parameter)
        if capturing(parameter):
            # A graph would do it again in every replay, and forwards apply the mask anyway: later.
            self.known = (id(parameter), None, mask)
        else:
            self.put_back(parameter, mask)

    def watch(self, parameter: nn.Parameter) -> None:
        """Sees to the parameter's gradient and to its steps."""
        _keepers[id(parameter)] = self
        if parameter.requires_grad and not self._hooked(parameter):
            me = weakref.ref(self)

            def hook(grad: Tensor) -> Tensor | None:
                keeper = me()
                return None if keeper is None else keeper.masked(grad)

            hook.__torch_unserializable__ = True  # copies and files get a hook of their own
            if self.handle is not None:
                self.handle.remove()
            self.handle = parameter.register_hook(hook)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return _nobody, ()

    def _hooked(self, parameter: nn.Parameter) -> bool:
        if not parameter.requires_grad:
            return True
        return self.handle is not None and self.handle.id in (parameter._backward_hooks or ())

    def put_back(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Zeros where the mask says so, past autograd: a graph that is alive saw zeros there as well."""
        zero_outside_(parameter.data, mask)
        self.known = (id(parameter), parameter._version, mask)

    def masked(self, grad: Tensor) -> Tensor | None:
        """The parameter's gradient with its zeros; None, as hooks say it, where they are there."""
        of, version = self.passed
        if of is not None and of() is grad and grad._version == version:
            return None  # it came through the layer alone, which has masked it
        mask = self.known[2]
        if not self.still() or grad.shape != mask.shape:
            return None
        if grad.is_sparse:  # an embedding's rows
            rows = grad.coalesce()
            values = rows.values() * mask[rows.indices()[0]]
            return torch.sparse_coo_tensor(rows.indices(), values, rows.shape, is_coalesced=True)
        return torch.where(mask, grad, 0)

    def note(self, grad: Tensor) -> None:
        """Tells of a gradient that has its zeros."""
        self.passed = (weakref.ref(grad), grad._version)

    def stepped(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        """After a step: puts the places back where the optimiser may have moved them."""
        mask = self.known[2]
        if not self.still() or mask.shape != parameter.shape:
            return
        held = [
            value
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.shape == parameter.shape and not value.is_sparse
        ]
        seen = (id(optimizer), id(mask), id(parameter), *map(id, held))
        entrywise = type(optimizer) in _ENTRYWISE
        if not entrywise or seen != self.trusted:
            for value in held if entrywise else ():
                zero_outside_(value, mask)
            self.put_back(parameter, mask)
            self.trusted = seen
        self.known = (id(parameter), parameter._version, mask)


def _nobody() -> None:
    """What stands in a copy for a keeper."""


def zero_outside_(values: Tensor, mask: Tensor) -> None:
    """values[~mask] = 0, without a graph."""
    with torch.no_grad():
        values.masked_fill_(mask.to(values.device).logical_not(), 0)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _keepers or torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            keeper = _keepers.get(id(parameter))
            if keeper is not None and keeper.known and keeper.known[0] == id(parameter):
                keeper.stepped(parameter, optimizer)


register_optimizer_step_post_hook(_after_step)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what is done to the tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def plain_python() -> bool:
    """Whether nobody is tracing what Python does."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


class ComputedWeight(Tensor):
    """A weight as its layer computes it: to read and to differentiate.  Writing there would be lost, so it raises.

    What is computed from it is plain; views of it refuse as it does.
    """

    why = "a pattern"

    @classmethod
    def of(cls, weight: Tensor, why: str) -> "ComputedWeight":
        made = weight.as_subclass(cls)
        made.why = why
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [kwargs.get("out")]
        if _writes(func):
            written += args[:1] or kwargs.values()
        if any(isinstance(tensor, cls) for tensor in written):
            raise RuntimeError(
                f"layer.weight: expected no writing to it, since it is computed under {_why(written)}; write to "
                "layer.raw_weight, the parameter it is computed from, or call sparsecore.densify_(model) first"
            )
        if isinstance(args[0] if args else None, cls) and _name(func) == "grad":
            raise RuntimeError(
                f"layer.weight.grad: expected a parameter, got a weight computed under {args[0].why}; read "
                "layer.raw_weight.grad"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(args[0] if args else None, cls) and _views(result, args[0]):
            return cls.of(result, args[0].why)
        return result


def _why(tensors: Iterable[Any]) -> str:
    return next(t.why for t in tensors if isinstance(t, ComputedWeight))


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


def _views(result: Any, weight: Tensor) -> bool:
    return (
        type(result) is Tensor
        and result.layout == torch.strided
        and result.numel() > 0
        and result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )
