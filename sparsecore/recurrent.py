"""Sparse LSTM, GRU and RNN, networks and cells: PyTorch's with a pattern over each matrix.

A matrix is a layer: `ih_l0` and `hh_l0` of `weight_ih_l0` and `weight_hh_l0` (of a cell `ih` and `hh`), a row of which
belongs to one gate of one unit.  The parameters stay the network's, under its keys.  It computes as PyTorch does, with
the weights that their patterns give.
"""

from collections.abc import Collection
from typing import Any

from torch import nn
from typing_extensions import Self

from .layer import as_class
from .parts import Part, Whole, baked, parts, seen


class SparseRecurrent(Whole):
    """What networks and cells share; `from_dense` makes them."""

    def sparsify_(self, names: Collection[str]) -> Self:
        """Makes these of its dense matrices sparse layers that share their parameters."""
        for name in names:
            self.add_module(name, Part(self, name, f"weight_{name}"))
        return self

    @classmethod
    def from_dense(cls, layer: nn.Module, names: Collection[str] | None = None) -> Self:
        """A sparse network that shares `layer`'s parameters, hooks and settings.

        Args: names: of the `matrices` that become sparse layers; None: all.
        """
        plain = _PLAIN[cls]
        if type(layer) is not plain:
            raise TypeError(
                f"{cls.__name__}.from_dense: expected {plain.__name__}, got {type(layer).__name__}"
            )
        sparse = as_class(cls, layer)
        return sparse.sparsify_(matrices(layer) if names is None else names)

    def to_dense(self) -> nn.Module:
        """The plain network with the same keys, as `SparseLayer.to_dense` makes layers plain."""
        dense = as_class(_PLAIN[type(self)], self)
        baked(self, dense)
        return dense


class _Network(SparseRecurrent, nn.RNNBase):
    """PyTorch's forward takes all weights from one list."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_symbols(args[0] if args else None)
        for part in parts(self):
            part.look()
        weights = {part.key: part.effective_weight for part in parts(self)}
        own = self._flat_weights
        self.__dict__["_flat_weights"] = [
            weights[key] if key in weights else self._parameters[key]
            for key in self._flat_weights_names
        ]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.__dict__["_flat_weights"] = own

    def to_dense(self) -> nn.Module:
        dense: Any = super().to_dense()
        dense._flat_weights = [dense._parameters[key] for key in dense._flat_weights_names]
        return dense

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        part = self._modules.get(name.removeprefix("weight_")) if name != "_modules" else None
        return part.weight if isinstance(part, Part) and part.key == name else value

    def _init_flat_weights(self) -> None:
        self._flat_weights = [self._parameters[key] for key in self._flat_weights_names]
        self._flat_weight_refs = [None for _ in self._flat_weights]

    def _update_flat_weights(self) -> None:
        """Nothing: the forward does so."""

    def flatten_parameters(self) -> None:
        """Nothing: what is computed anew in every forward lies where it is computed."""


class SparseLSTM(_Network, nn.LSTM):
    """`nn.LSTM` with a pattern over each matrix."""


class SparseGRU(_Network, nn.GRU):
    """`nn.GRU` with a pattern over each matrix."""


class SparseRNN(_Network, nn.RNN):
    """`nn.RNN` with a pattern over each matrix."""


class _Cell(SparseRecurrent, nn.RNNCellBase):
    """PyTorch's forward reads both weights by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_symbols(args[0] if args else None)
        return super().forward(*args, **kwargs)

    weight_ih = seen("weight_ih", "ih")  # pyright: ignore[reportAssignmentType]
    weight_hh = seen("weight_hh", "hh")  # pyright: ignore[reportAssignmentType]


class SparseLSTMCell(_Cell, nn.LSTMCell):
    """`nn.LSTMCell` with a pattern over both matrices."""


class SparseGRUCell(_Cell, nn.GRUCell):
    """`nn.GRUCell` with a pattern over both matrices."""


class SparseRNNCell(_Cell, nn.RNNCell):
    """`nn.RNNCell` with a pattern over both matrices."""


_PLAIN: dict[type, type[nn.Module]] = {
    SparseLSTM: nn.LSTM,
    SparseGRU: nn.GRU,
    SparseRNN: nn.RNN,
    SparseLSTMCell: nn.LSTMCell,
    SparseGRUCell: nn.GRUCell,
    SparseRNNCell: nn.RNNCell,
}
RECURRENT = {plain: sparse for sparse, plain in _PLAIN.items()}


def matrix_keys(network: nn.Module) -> list[str]:
    """The keys of its matrices, whether they are parameters or not."""
    names = getattr(network, "_flat_weights_names", ["weight_ih", "weight_hh"])
    return [key for key in names if key.startswith("weight_")]


def matrices(network: nn.Module) -> dict[str, nn.Linear]:
    """Its matrices that are not sparse yet, as the linear layers that they are; parameters are shared."""
    found: dict[str, nn.Linear] = {}
    for key in matrix_keys(network):
        name, weight = key.removeprefix("weight_"), network._parameters.get(key)
        if weight is not None and name not in network._modules:
            n, k = weight.shape
            found[name] = nn.Linear(k, n, bias=False, device="meta")
            found[name].weight = weight
    return found
