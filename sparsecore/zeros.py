"""Pruned places of a masked layer's parameter are zero, whoever writes there, steps it or looks.

What a masked layer computes does not depend on that: it applies its mask in every forward.  But others take the
parameter by itself: files, tied embeddings, adapters, averages, code that reads `layer.weight`.  So a decided mask
keeps its parameter:

- its gradient is zero there, through whichever module it comes (a hook on the parameter), and again before a step if
  it was changed since (noise, centralisation);
- after the step of any optimiser of PyTorch's kind the places are zero again, and so is what the optimiser held for
  them: momentum from before the mask, updates that mix entries (Muon).  Optimisers that compute entry by entry
  leave zeros alone, so they are looked after only when their state or the mask is another one;
- whatever was written otherwise is put back by the layer's next forward, when it is read and when it is saved.  What
  is written in place past autograd, through `parameter.data`, no version tells of: it is put back when the weight is
  read or saved, and by every forward where others hold the parameter too or renormalise its rows.

A call with other parameters (`torch.func.functional_call`) leaves these alone.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import stateless
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

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

SHARDED = "expected whole weights, got shards (fully_shard); do this before the model is sharded"


class Keeper:
    """Keeps one parameter at its mask; belongs to the mask's pattern, and a copy of that begins anew.

    Args:
        still: whether the mask is still its layer's: a search may put another pattern there for a while.
        always: whether every forward puts places back, since others compute with the parameter as it is.
    """

    def __init__(self, still: Callable[..., bool], always: bool = False) -> None:
        self.still, self.always = still, always
        self.handles: list[Any] = []  # of hooks on the parameter
        # The parameter, its version and place in memory, and the mask, when it was last seen.
        self.parameter, self.version, self.place = 0, -1, 0
        self.mask: Tensor | None = None
        self.peers: Iterable[Keeper] = ()  # who keep the same parameter for other layers
        self.accumulated = _NOTHING  # the state of a gradient that has its zeros
        self.trusted: tuple[Any, ...] = ()
        self.passed: tuple[Any, int] = (None, 0)

    def knows(self, parameter: Tensor, mask: Tensor) -> bool:
        """Whether nothing has changed since it last saw to the places."""
        return (
            self.parameter == id(parameter)
            and self.mask is mask
            and self.version == parameter._version
            and self.place == parameter.data_ptr()
            and not self.always
            and self._hooked(parameter)
        )

    def keep(self, parameter: nn.Parameter, mask: Tensor) -> bool:
        """Puts the places back if the parameter, its values or its mask are others than those last seen.

        False for a parameter that is not the layer's own but stands in for it in one call, and for a shard.

        Errors: ValueError for a parameter that another layer keeps at another mask.
        """
        if self.knows(parameter, mask):
            return True
        if is_sharded(parameter) or (self.parameter != id(parameter) and _stands_in()):
            return False
        if self.parameter != id(parameter) or self.mask is not mask:
            require_one_mask(parameter, mask, self)
        self.watch(parameter)
        if capturing(parameter):
            # A graph would do it again in every replay, and forwards apply the mask anyway: later.
            self._saw(parameter, mask)
            self.version = -1
        else:
            self.put_back(parameter, mask)
        return True

    def _saw(self, parameter: nn.Parameter, mask: Tensor) -> None:
        self.parameter, self.mask = id(parameter), mask
        self.version, self.place = parameter._version, parameter.data_ptr()

    def watch(self, parameter: nn.Parameter) -> None:
        """Sees to the parameter's gradient and to its steps."""
        other = _keepers.get(id(parameter))
        if other is not None and other is not self:
            self.peers = weakref.WeakSet({other, *other.peers} - {self})
        _keepers[id(parameter)] = self
        if parameter.requires_grad and not self._hooked(parameter):
            me = weakref.ref(self)

            def hook(grad: Tensor) -> Tensor | None:
                keeper = me()
                return None if keeper is None else keeper.masked(grad)

            def after(parameter: Tensor) -> None:
                keeper, grad = me(), parameter.grad
                if keeper is not None and grad is not None:
                    alone = len(parameter._backward_hooks) == 1  # pyright: ignore
                    keeper.accumulated = _state_of(grad) if alone else _NOTHING

            hook.__torch_unserializable__ = True  # copies and files get a hook of their own
            self._unhook()
            self.handles = [
                parameter.register_hook(hook),
                parameter.register_post_accumulate_grad_hook(after),
            ]

    def _unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __del__(self) -> None:
        self._unhook()

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return _nobody, ()

    def _hooked(self, parameter: Tensor) -> bool:
        if not parameter.requires_grad:
            return True
        return bool(self.handles) and self.handles[0].id in (parameter._backward_hooks or ())

    def put_back(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Zeros where the mask says so, past autograd: a graph that is alive saw zeros there as well."""
        zero_outside_(parameter.data, mask)
        self._saw(parameter, mask)

    def masked(self, grad: Tensor) -> Tensor | None:
        """The parameter's gradient with its zeros; None, as hooks say it, where they are there."""
        of, version = self.passed
        if of is not None and of() is grad and grad._version == version:
            return None  # it came through the layer alone, which has masked it
        mask = self.mask
        if mask is None or not self.still() or grad.shape != mask.shape:
            return None
        if grad.is_sparse:  # an embedding's rows
            rows = grad.coalesce()
            values = rows.values() * mask[rows.indices()[0]]
            return torch.sparse_coo_tensor(rows.indices(), values, rows.shape, is_coalesced=True)
        return torch.where(mask, grad, 0)

    def note(self, grad: Tensor) -> None:
        """Tells of a gradient that has its zeros."""
        self.passed = (weakref.ref(grad), grad._version)

    def before_step(self, parameter: nn.Parameter) -> None:
        """Zeros in a gradient that was changed since the backward: noise, hooks of others, centralisation."""
        grad, mask = parameter.grad, self.mask
        if parameter._version != self.version:  # written since its zeros were seen: noise, say
            self.trusted = ()
        if grad is None or mask is None or _state_of(grad) == self.accumulated or not self.still():
            return
        if grad.layout == torch.strided and grad.shape == mask.shape and not is_sharded(grad):
            zero_outside_(grad, mask)
            self.accumulated = _state_of(grad)

    def stepped(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        """After a step: puts the places back where the optimiser may have moved them."""
        mask = self.mask
        if mask is None or not self.still():
            return
        held = optimizer.state.get(parameter, {}).values()
        seen = (id(optimizer), id(mask), *map(id, held))
        if seen == self.trusted:
            self.version = parameter._version
        elif mask.shape == parameter.shape:
            entrywise = type(optimizer) in _ENTRYWISE
            for value in held if entrywise else ():
                if isinstance(value, Tensor) and value.shape == mask.shape and not value.is_sparse:
                    zero_outside_(value, mask)
            self.put_back(parameter, mask)
            self.trusted = seen if entrywise else ()


def require_one_mask(parameter: nn.Parameter, mask: Tensor, mine: Keeper | None) -> None:
    """Errors: ValueError for a parameter that another layer, of whatever model, keeps at another mask."""
    latest = _keepers.get(id(parameter))
    for other in () if latest is None else (latest, *latest.peers):
        if other is mine or other.mask is None or not other.still(parameter):
            continue
        if other.mask.shape != mask.shape or not torch.equal(
            other.mask, mask.to(other.mask.device)
        ):
            raise ValueError(
                "expected one mask for one weight, got another one in a second layer that shares it; apply one ticket "
                "to a model that holds both, or give each layer a weight of its own"
            )


_NOTHING = (-1, 0)


def _state_of(grad: Tensor) -> tuple[int, int]:
    """What changes with a gradient: its version, and where it lies; of a sparse or sharded one nothing is known."""
    if type(grad) is Tensor and grad.layout is torch.strided:
        return grad._version, grad.data_ptr()
    return _NOTHING


def _nobody() -> None:
    """What stands in a copy for a keeper."""


def zero_outside_(values: Tensor, mask: Tensor) -> None:
    """values[~mask] = 0, without a graph."""
    with torch.no_grad():
        values.masked_fill_(mask.to(values.device).logical_not(), 0)


def _kept(optimizer: torch.optim.Optimizer) -> Iterator[tuple["Keeper", nn.Parameter]]:
    if not _keepers or torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            keeper = _keepers.get(id(parameter))
            if keeper is not None and keeper.parameter == id(parameter):
                yield keeper, parameter


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for keeper, parameter in _kept(optimizer):
        keeper.before_step(parameter)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for keeper, parameter in _kept(optimizer):
        keeper.stepped(parameter, optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


@contextmanager
def scaling(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Around what multiplies gradients and so leaves their zeros: clipping, a scaler's."""
    same = [
        (keeper, grad)
        for p in parameters
        if (grad := p.grad) is not None
        and (keeper := _keepers.get(id(p))) is not None
        and keeper.accumulated == _state_of(grad)
    ]
    yield
    for keeper, grad in same:
        keeper.accumulated = _state_of(grad)


_FUNCTIONAL_CALL = stateless._functional_call.__code__


def _stands_in() -> bool:
    """Whether modules compute with other parameters for one call (`torch.func.functional_call`)."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FUNCTIONAL_CALL:
            return True
        frame = frame.f_back
    return False


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold a part each (`fully_shard`): what is computed with is put together when it is needed."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph records what is done to the tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def plain_python() -> bool:
    """Whether nobody is tracing what Python does."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())
