"""Weights of a module that holds several of them, each as a layer: an attention's projections, an LSTM's matrices.

The parameters stay the whole's, under its keys; a part is a layer with a pattern.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .nn import SparseLinear
from .patterns import Dense, Masked, Planned
from .stored import understood


class Part(SparseLinear):
    """A weight [n, k] of another module, its `whole`, which knows when to multiply by it."""

    whole: Any
    name: str
    key: str  # of the whole's parameter
    multiplies = False  # an attention's projections do

    def __init__(self, whole: nn.Module, name: str, key: str) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(whole=whole, name=name, key=key)  # no submodule: it holds this one
        self._parameters["bias"] = None  # where a projection has a property of that name
        self.out_features, self.in_features = self.raw_weight.shape
        self.pattern = Dense()
        self.train(whole.training)

    @property
    def raw_weight(self) -> nn.Parameter:
        weight = self.whole._parameters.get(self.key)
        if weight is None and parametrize.is_parametrized(self.whole, self.key):
            return self.whole.parametrizations[self.key]()
        return self.whole.__dict__[self.key] if weight is None else weight

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.seen_weight()

    def _parametrizations(self) -> Sequence[nn.Module]:
        if not parametrize.is_parametrized(self.whole, self.key):
            return ()
        return self.whole.parametrizations[self.key]

    def _require_parameter(self, what: str) -> None:
        if self.whole._parameters.get(self.key) is None:
            raise ValueError(
                f"{what}: expected {self.key} to be a parameter, got one that another tool computes; remove that first"
            )

    def reset_parameters(self) -> None:
        raise TypeError(
            f"{self.name}: expected a layer of its own, got a weight of {type(self.whole).__name__}; initialise "
            "that, or raw_weight"
        )

    def to_dense(self) -> nn.Module:
        raise TypeError(
            f"{self.name}: expected a layer of its own, got a weight of {type(self.whole).__name__}; "
            "make that dense (densify_ of the model does)"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # its whole, which is not there yet, will look

    def _weight_at(self, prefix: str) -> str:
        path = prefix.removesuffix(".")
        return f"{path.removesuffix(self.name)}{self.key}"


def seen(key: str, name: str) -> property:
    """The weight that the part `name` computes with, in the place of the parameter `key`."""

    def read(self: nn.Module) -> Tensor | None:
        # nn.Module registers a parameter only if the attribute is absent: say so until it is there.
        if key not in self._parameters and key not in self.__dict__:
            raise AttributeError(key)
        layer = self._modules.get(name)
        if isinstance(layer, Part):
            return layer.weight
        return self._parameters[key] if key in self._parameters else self.__dict__[key]

    def write(self: nn.Module, value: Tensor) -> None:
        self.__dict__[key] = value  # what another tool computes

    return property(read, write)


def parts(whole: nn.Module) -> Iterator[Part]:
    """Its parts."""
    return (part for part in whole._modules.values() if isinstance(part, Part))


class Whole(nn.Module):
    """A module with parts: how files, copies and tracers see it."""

    def refuse_symbols(self, x: Any) -> None:
        """Errors: TypeError for torch.fx where it looks inside."""
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                f"torch.fx: expected plain layers, got {type(self).__name__}, which computes by Python; trace "
                "sparsecore.densify_(copy.deepcopy(model))"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (state := loaded(self, state_dict, prefix, rest[-1])) is not None:
            super()._load_from_state_dict(state, prefix, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for part in parts(self):  # a copy's parameters have no hooks
            if "pattern" in part._modules:
                part.look()


def loaded(
    whole: nn.Module, state_dict: dict[str, Any], prefix: str, errors: list[str]
) -> dict[str, Any] | None:
    """The state as the whole's own parameters take it, before its parts read their masks; None after errors."""
    for part in parts(whole):
        at = f"{prefix}{part.name}."
        state_dict = understood(state_dict, at, part._weight_at(at))
        if isinstance(part.pattern, Planned):  # it takes the kept weights alone
            if found := part._mismatches(state_dict, at):
                errors.extend(found)
                return None
            state_dict = part._planned_state(state_dict, at)
    return state_dict


def baked(whole: nn.Module, plain: nn.Module) -> None:
    """Puts what its parts compute with into a plain module of the same parameters, without the parts."""
    for part in parts(whole):
        if isinstance(part.pattern, Masked):
            part.pattern.keeper = None  # whoever still holds this layer
        del plain._modules[part.name]
        plain._parameters[part.key] = part._baked()
