"""Find a sparse ticket in a network and train it."""

from . import control, gates, granularity, kernels, models, objectives, scores
from .compaction import Compacted, compact
from .convert import advance_, densify_, is_prunable, sparse_layers, sparsify_
from .data import Batches, load
from .nn import SparseConv2d, SparseLinear
from .patterns import Dense, Gated, Masked, Planned, gated_weight
from .plans import plan_, remask_, report
from .search import ConcreteSearch, OneShot
from .tickets import Ticket, TicketError
from .training import Recipe, evaluate, train

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "Compacted",
    "ConcreteSearch",
    "Dense",
    "Gated",
    "Masked",
    "OneShot",
    "Planned",
    "Recipe",
    "SparseConv2d",
    "SparseLinear",
    "Ticket",
    "TicketError",
    "advance_",
    "compact",
    "control",
    "densify_",
    "evaluate",
    "gated_weight",
    "gates",
    "granularity",
    "is_prunable",
    "kernels",
    "load",
    "models",
    "objectives",
    "plan_",
    "remask_",
    "report",
    "scores",
    "sparse_layers",
    "sparsify_",
    "train",
]
