"""SparseLayer: what all layers share whose weight is seen through a pattern.

`layer.weight` is the parameter itself under no pattern and under a decided mask, whose pruned places are zero
(`zeros`), so that what others do to a weight works: initialising, adapters that merge, `weight.grad`.  Under gates
and plans it is computed from the parameter, `raw_weight`, and refuses to be written to.  The parameter keeps its
key `weight` in the state_dict and in `named_parameters()`.

A weight that several layers share is one weight: the first of them leads, and its pattern is the others' too.
"""

from collections.abc import Container, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Self

from . import kernels
from .computed import ComputedWeight
from .decided import DecidedLayer
from .patterns import Dense, Gated, Masked, Planned
from .process import leaving_trainable
from .stored import StoredLayer
from .zeros import (
    SHARDED,
    capturing,
    is_sharded,
    plain_python,
    zero_outside_,
)


class SparseLayer(DecidedLayer, StoredLayer):
    """A layer with a parameter `weight` behind a `pattern`; the class beside it says what is computed.

    Whatever class of PyTorch's or one's own reads `self.weight` in its forward can stand there.
    """

    # Whether formats can take the layer's products over; of others a plan keeps the weights alone (`state`).
    multiplies = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pattern = Dense()

    @property
    def raw_weight(self) -> nn.Parameter:
        """The parameter itself, [n, k] or [n, k, *taps]; under `Planned` the kept weights, [nnz].

        Where another tool has put something computed in its place (`torch.nn.utils.prune`), that.
        """
        weight = self._parameters.get("weight")
        if weight is None and parametrize.is_parametrized(self, "weight"):
            return self.parametrizations.weight()  # pyright: ignore
        return self.__dict__["weight"] if weight is None else weight

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight the layer computes with: the parameter itself, or computed from it under gates and plans."""
        # nn.Module registers a parameter only if the attribute is absent: say so until it is there.
        if self._parameters.get("weight") is None and "weight" not in self.__dict__:
            raise AttributeError("weight")
        return self.seen_weight()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # Parameters go where nn.Module keeps them; this is what other tools compute, before each forward.
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        self.__dict__.pop("weight", None)

    @property
    def effective_weight(self) -> Tensor:
        """The weight the layer computes with, always computed by the pattern: to differentiate, not to write to."""
        return self.pattern(self.raw_weight)

    def seen_weight(self) -> Tensor:
        """What others see as the weight."""
        raw, pattern = self.raw_weight, getattr(self, "pattern", None)
        if pattern is None or isinstance(pattern, Dense):
            return raw
        if not plain_python():
            return pattern(raw)
        if isinstance(pattern, Masked) and pattern.decided and self._kept_by(pattern):
            # Even past what a version tells: `weight.data` may have been written to.
            if not capturing(raw):
                zero_outside_(raw.data, pattern.mask)
            return raw
        if is_sharded(raw):
            return raw
        kind = type(pattern).__name__
        return ComputedWeight.of(pattern(raw), f"{kind} ({pattern.extra_repr()})")

    def _operand(self, x: Any) -> Tensor:
        """The weight for a product with x."""
        if isinstance(
            x, torch.fx.Proxy
        ):  # whose graph takes parameters as they are, and all else as constants
            self._refuse_symbols(x)
            return self.seen_weight()
        pattern, raw = self.pattern, self.raw_weight
        self._look(pattern, raw)
        return pattern(raw)

    def _refuse_symbols(self, x: Any) -> None:
        """Errors: TypeError for torch.fx, which knows neither a plan's products nor what gates compute."""
        pattern = self.pattern
        if isinstance(x, torch.fx.Proxy) and not (
            isinstance(pattern, Dense) or (isinstance(pattern, Masked) and pattern.decided)
        ):
            raise TypeError(
                f"torch.fx: expected plain layers or masks, got {type(pattern).__name__}; trace "
                "sparsecore.densify_(copy.deepcopy(model)), or a copy under plan_(..., 'mask')"
            )

    @property
    def leader(self) -> "SparseLayer | None":
        """The layer whose pattern this one shares, since they share the weight."""
        return self.__dict__.get("_leader")

    def follow(self, leader: "SparseLayer | None") -> None:
        """Shares another layer's pattern, or has one of its own again (Dense)."""
        self.__dict__["_leader"] = None
        if leader is None:
            self.pattern = Dense()
        else:
            self._modules.pop("pattern", None)
            self.__dict__["_leader"] = leader  # no submodule: it has a name of its own

    @property
    def pattern(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the weight is seen through; a submodule, but found without nn.Module's search, in every forward."""
        leader = self.__dict__.get("_leader")
        try:
            return (self if leader is None else leader)._modules["pattern"]  # pyright: ignore
        except KeyError:
            raise AttributeError("pattern") from None

    @pattern.setter
    def pattern(self, value: nn.Module) -> None:
        self.__setattr__("pattern", value)  # which puts it where nn.Module keeps submodules

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pattern" and (leader := self.__dict__.get("_leader")) is not None:
            leader.pattern = value
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's.  Errors: ValueError for a weight that its mask or plan does not fit."""
        pattern = self._modules.get("pattern")
        if name == "weight" and isinstance(pattern, Masked | Planned) and param is None:
            raise ValueError("layer.weight: expected a parameter under its mask, got None")
        if name == "weight" and isinstance(pattern, Masked) and param is not None:
            if param.shape != pattern.mask.shape:
                raise ValueError(
                    f"layer.weight: expected a parameter of its mask's shape {tuple(pattern.mask.shape)}, got "
                    f"{tuple(param.shape)}; call sparsecore.densify_(model) first"
                )
        if name == "weight" and isinstance(pattern, Planned) and param is not None:
            if param.shape != pattern.index.shape:
                raise ValueError(
                    f"layer.weight: expected the {len(pattern.index)} kept weights of its plan, got a parameter "
                    f"{tuple(param.shape)}; call sparsecore.plan_(model, 'mask') first"
                )
        super().register_parameter(name, param)

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the weight, whatever the parameter's is."""
        pattern = self.pattern
        planned = isinstance(pattern, Planned)
        return torch.Size(pattern.layer.shape) if planned else self.raw_weight.shape

    @property
    def _channels_last(self) -> bool:
        """Whether the dense weight lies so."""
        pattern, raw = self.pattern, self.raw_weight
        return (
            pattern.channels_last if isinstance(pattern, Planned) else kernels.is_channels_last(raw)
        )

    def _sampling(self, x: Tensor) -> Gated | None:
        """The pattern, if `kernels.gated_linear` and `gated_conv2d` compute with it."""
        pattern = self.pattern
        if not isinstance(pattern, Gated) or not pattern.samples:
            return None
        # On the CPU there is nothing to choose among, and the pattern itself keeps z for the backward.
        return pattern if x.is_cuda or pattern.impl != "auto" else None

    def reset_parameters(self) -> None:
        """Draws the parameters anew as the plain layer does; of a masked or planned one those that are kept."""
        plain = as_class(plain_type(type(self)), self)
        plain._modules.pop("pattern", None)
        pattern = getattr(self, "pattern", None)
        if isinstance(pattern, Planned):
            raw = self.raw_weight
            dense = raw.new_empty(self.weight_shape)
            plain._parameters["weight"] = nn.Parameter(dense, requires_grad=False)
            plain.reset_parameters()  # pyright: ignore[reportCallIssue]
            with torch.no_grad():
                raw.copy_(pattern.kept(dense))
            return
        plain.reset_parameters()  # pyright: ignore[reportCallIssue]
        if pattern is not None:
            self.look()

    def _parametrizations(self) -> Sequence[nn.Module]:
        """What `torch.nn.utils.parametrize` computes the weight by."""
        if not parametrize.is_parametrized(self, "weight"):
            return ()
        return self.parametrizations["weight"]  # pyright: ignore

    def _require_parameter(self, what: str) -> None:
        """Errors: ValueError for a weight that is another tool's, or in shards."""
        if self._parameters.get("weight") is None or parametrize.is_parametrized(self):
            raise ValueError(
                f"{what}: expected a layer whose weight is its parameter, got one that another tool computes "
                "(torch.nn.utils.prune, weight_norm, parametrize, ...): remove that first"
            )
        if is_sharded(self.raw_weight):
            raise ValueError(f"{what}: {SHARDED}")

    @classmethod
    def from_dense(cls, layer: nn.Module) -> Self:
        """A sparse layer that shares `layer`'s parameters, hooks and settings; its pattern is Dense."""
        if not isinstance(layer, plain_type(cls)):
            raise TypeError(
                f"{cls.__name__}.from_dense: expected {plain_type(cls).__name__}, "
                f"got {type(layer).__name__}"
            )
        sparse = as_class(cls, layer)
        sparse.pattern = Dense()
        return sparse

    @leaving_trainable
    def to_dense(self) -> nn.Module:
        """A plain layer with the same keys: the pattern is applied to the weight once and dropped.

        A Dense or Masked layer keeps its parameter object (already zero where pruned); a Gated layer
        gets the gates' mean baked in.  Errors: ValueError for a weight that another tool computes.
        """
        self._require_parameter("to_dense")
        dense = as_class(plain_type(type(self)), self)
        if isinstance(self.pattern, Masked):
            self.pattern.keeper = None  # whoever still holds this layer
        dense._modules.pop("pattern", None)
        dense.__dict__.pop("_leader", None)
        dense._parameters["weight"] = self._baked()
        return dense

    def _baked(self) -> nn.Parameter:
        """A dense parameter of the weight that the layer computes with: its own, where that is dense."""
        raw = self.raw_weight
        if isinstance(self.pattern, Dense):
            return raw
        was_training = self.pattern.training
        with torch.no_grad():
            self.pattern.eval()
            effective = self.effective_weight.clone()
            self.pattern.train(was_training)
        if isinstance(self.pattern, Masked):
            raw.data.copy_(effective)
            return raw
        return nn.Parameter(effective, raw.requires_grad)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks first.  Errors: TypeError, since a pattern is Python's."""
        raise TypeError(_UNSCRIPTED)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "pattern" in self._modules and self._parameters.get("weight") is not None:
            self.look()  # a copy's parameter has no hooks


_UNSCRIPTED = (
    "torch.jit.script: expected plain layers, got sparse ones; script "
    "sparsecore.densify_(copy.deepcopy(model)), or trace or export this one"
)


@cache
def plain_type(cls: type) -> type[nn.Module]:
    """The class without sparsity."""
    own = SparseLayer.__mro__
    return next(c for c in cls.__mro__ if c not in own and not issubclass(c, SparseLayer))


_Module = TypeVar("_Module", bound=nn.Module)


def as_class(cls: type[_Module], module: nn.Module) -> _Module:
    """A module of another class with the same parameters, submodules, hooks and settings."""
    other = cls.__new__(cls)
    other.__dict__ = module.__dict__.copy()
    for table in ("_parameters", "_buffers", "_modules"):
        other.__dict__[table] = module.__dict__[table].copy()
    return other


def weight_key(layer: str, state: Container[str]) -> str:
    """A layer's weight in a model's state: `<layer>.weight`, or of a part (attention's, LSTM's) a bare parameter's."""
    parent, _, name = layer.rpartition(".")
    bare = (f"{layer}_weight", f"{parent}.weight_{name}".lstrip("."))
    keys = (f"{layer}.weight".lstrip("."), *bare)
    return next((key for key in keys if key in state), keys[0])
