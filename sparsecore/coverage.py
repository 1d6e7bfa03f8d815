"""Which share of a model a ticket covers, and what stays dense and why."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from .attention import SparseMultiheadAttention
from .kinds import checked
from .layer import SparseLayer
from .nn import computes_itself, sparse_type
from .patterns import Masked, Planned
from .recurrent import RECURRENT
from .tied import holders

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Covered:
    """One parameter tensor.

    Args:
        name: in the model; of a tensor in several places the first.
        count: numbers that the dense model has there.
        kept: of a sparse layer's weight, those that its mask keeps (all without one); None for a dense tensor.
        why: of a dense tensor, why it stays so.
    """

    name: str
    count: int
    kept: int | None
    why: str = ""


@dataclass(frozen=True)
class Coverage:
    """What `coverage` found; printed, it is a few lines."""

    rows: tuple[Covered, ...]

    @property
    def parameters(self) -> int:
        """Of the whole dense model, shared ones counted once."""
        return sum(row.count for row in self.rows)

    @property
    def covered(self) -> int:
        """Of the sparse layers' weights."""
        return sum(row.count for row in self.rows if row.kept is not None)

    @property
    def share(self) -> float:
        """Fraction of all parameters that sparse layers hold, so that a ticket can remove them."""
        return self.covered / max(self.parameters, 1)

    @property
    def sparsity(self) -> float:
        """Fraction of the sparse layers' weights that is removed; a ticket's own."""
        return self._removed / max(self.covered, 1)

    @property
    def model_sparsity(self) -> float:
        """Fraction of all parameters that is removed."""
        return self._removed / max(self.parameters, 1)

    @property
    def _removed(self) -> int:
        return sum(row.count - row.kept for row in self.rows if row.kept is not None)

    @property
    def dense(self) -> dict[str, int]:
        """Parameters that stay dense, by the reason, most first."""
        found: Counter[str] = Counter()
        for row in self.rows:
            if row.kept is None:
                found[row.why] += row.count
        return dict(found.most_common())

    def __str__(self) -> str:
        told = [told_share(self.covered, self.parameters, self.sparsity)]
        told += [f"  dense: {count:,} {why}" for why, count in self.dense.items()]
        return "\n".join(told)


def told_share(covered: int, parameters: int, sparsity: float) -> str:
    """A line on how much of a model a sparsity is of."""
    share = covered / max(parameters, 1)
    return (
        f"{100 * share:.1f} % of {parameters:,} parameters are weights of sparse layers, {100 * sparsity:.2f} % of "
        f"those are removed: {100 * share * sparsity:.2f} % of the whole model"
    )


@checked
def coverage(model: nn.Module) -> Coverage:
    """Which parameters sparse layers hold, how many their masks keep, and why the others stay dense."""
    layers: dict[int, SparseLayer] = {}
    for module in model.modules():
        if isinstance(module, SparseLayer):
            layers.setdefault(id(module.raw_weight), module)
    places = holders(model)
    rows = []
    for name, parameter in model.named_parameters():
        layer = layers.get(id(parameter))
        if layer is not None:
            rows.append(Covered(name, layer.weight_shape.numel(), _kept(layer)))
        elif isinstance(parameter, nn.parameter.UninitializedParameter):
            rows.append(Covered(name, 0, None, "in lazy layers that have not run yet"))
        elif ".pattern." not in f".{name}":  # gates are a search's
            rows.append(Covered(name, parameter.numel(), None, _why(model, places[id(parameter)])))
    return Coverage(tuple(rows))


def _kept(layer: SparseLayer) -> int:
    pattern = layer.pattern
    if isinstance(pattern, Planned):
        return len(pattern.index)
    if isinstance(pattern, Masked):
        return int(torch.count_nonzero(pattern.mask))
    return layer.weight_shape.numel()


def _why(model: nn.Module, places: list[str]) -> str:
    """Why a parameter is no sparse layer's weight."""
    path, _, key = places[0].rpartition(".")
    module = model.get_submodule(path)
    kind = type(module)
    if isinstance(module, _NORMS):
        return "in normalisation"
    if key.startswith("bias") or key.endswith("_bias"):
        return "in biases"
    wholes = (nn.MultiheadAttention, SparseMultiheadAttention, *RECURRENT, *RECURRENT.values())
    if isinstance(module, wholes) and kind not in wholes:
        return f"in {kind.__name__}, a subclass whose weights have no sparse form"
    if kind in wholes:
        return f"in matrices of {kind.__name__} that sparsify_ was not asked for"
    if path.endswith(("parametrizations.weight",)) or key in (
        "weight_orig",
        "weight_g",
        "weight_v",
    ):
        return "in weights that another tool computes (prune, weight_norm, parametrize)"
    if parametrize.is_parametrized(module) or sparse_type(kind) is None:
        return f"in {kind.__name__}, which has no sparse form"
    if isinstance(module, nn.Embedding):
        return "in embeddings, which sparsify_ takes when they are named"
    if computes_itself(kind):
        return f"in {kind.__name__}, whose forward is its own; sparsify_ takes it when it is named"
    return f"in {kind.__name__} layers that sparsify_ was not asked for"
