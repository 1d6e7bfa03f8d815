"""Find a sparse ticket in a network and train it."""

from .descriptors import open_closed
from .interrupts import end_quietly_while_importing, is_command_line

if is_command_line():
    open_closed()
end_quietly_while_importing()

# isort: split
# ruff: noqa: E402
from . import (
    connectivity,
    control,
    gates,
    granularity,
    kernels,
    models,
    objectives,
    regions,
    scores,
)
from .attention import SparseMultiheadAttention
from .batchnorm import recompute_statistics_
from .compaction import Compacted, compact
from .convert import advance_, densify_, is_prunable, sparse_layers, sparsify_
from .coverage import Coverage, coverage
from .data import Batches, load
from .decay import decay_groups
from .engine import EngineError, TrainStep, graphed
from .gated_product import gated_weight
from .losses import Loss
from .nn import (
    SparseBilinear,
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseEmbedding,
    SparseLinear,
)
from .patterns import Dense, Gated, Masked, Planned
from .plans import plan_, report
from .recipe import Recipe
from .recurrent import SparseGRU, SparseLSTM, SparseRNN
from .remasking import remask_
from .rounds import Round, load_rounds
from .search import (
    SET,
    ConcreteSearch,
    ContinuousSparsification,
    EdgePopup,
    GradualMagnitude,
    Iterative,
    JointSearch,
    OneShot,
    Rewinding,
    RigL,
    StrongSearch,
)
from .telling import SparsityWarning
from .tickets import Ticket, TicketError
from .training import evaluate, train

__version__ = "0.1.0"

__all__ = [
    "SET",
    "Batches",
    "Compacted",
    "ConcreteSearch",
    "ContinuousSparsification",
    "Coverage",
    "Dense",
    "EdgePopup",
    "EngineError",
    "Gated",
    "GradualMagnitude",
    "Iterative",
    "JointSearch",
    "Loss",
    "Masked",
    "OneShot",
    "Planned",
    "Recipe",
    "Rewinding",
    "RigL",
    "Round",
    "SparseBilinear",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseEmbedding",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparseRNN",
    "SparsityWarning",
    "StrongSearch",
    "Ticket",
    "TicketError",
    "TrainStep",
    "advance_",
    "compact",
    "connectivity",
    "control",
    "coverage",
    "decay_groups",
    "densify_",
    "evaluate",
    "gated_weight",
    "gates",
    "granularity",
    "graphed",
    "is_prunable",
    "kernels",
    "load",
    "load_rounds",
    "models",
    "objectives",
    "plan_",
    "recompute_statistics_",
    "regions",
    "remask_",
    "report",
    "scores",
    "sparse_layers",
    "sparsify_",
    "train",
]
