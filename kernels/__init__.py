"""Triton kernels and their PyTorch references.  Imported as `sparsecore.kernels`; needs torch and triton only."""

from .blocks.algebra import dds, dsd, sdd
from .blocks.plan import BlockPlan
from .blocks.products import pack, unpack
from .dsl import MISSING, OutOfResources
from .formats import Layer, kept_index
from .gated.layers import Choice, choice, forget, gated_conv2d, gated_linear
from .gates.balance import Rule
from .gates.bank import GateBank
from .gates.segments import is_channels_last, laid_out_as
from .gates.weight import gated_weight
from .philox import uniform_
from .reference import (
    BERNOULLI,
    CONCRETE,
    GAUSSIAN,
    HARD_CONCRETE,
    GateSpec,
    concrete_ref,
    concrete_slope_ref,
    density_ref,
    density_slope_ref,
    gaussian_ref,
    gaussian_slope_ref,
    hard_concrete_ref,
    hard_concrete_slope_ref,
    sample_ref,
    slope_ref,
    squares_ref,
)
from .sparse.layers import compute_dtype, sparse_layer
from .sparse.plan import BLOCK_TILES, FLOOR, FORMATS, PRODUCTS, Plan, is_format, obstacle, plan_of
from .sparse.state import one_graph
from .units import Unit, allowed_ref, apply_ref, gather_ref, project_ref, unit_shape

__all__ = [
    "BERNOULLI",
    "BLOCK_TILES",
    "CONCRETE",
    "FLOOR",
    "FORMATS",
    "GAUSSIAN",
    "HARD_CONCRETE",
    "MISSING",
    "PRODUCTS",
    "BlockPlan",
    "Choice",
    "GateBank",
    "GateSpec",
    "Layer",
    "OutOfResources",
    "Plan",
    "Rule",
    "Unit",
    "allowed_ref",
    "apply_ref",
    "choice",
    "compute_dtype",
    "concrete_ref",
    "concrete_slope_ref",
    "dds",
    "density_ref",
    "density_slope_ref",
    "dsd",
    "forget",
    "gated_conv2d",
    "gated_linear",
    "gated_weight",
    "gather_ref",
    "gaussian_ref",
    "gaussian_slope_ref",
    "hard_concrete_ref",
    "hard_concrete_slope_ref",
    "is_channels_last",
    "is_format",
    "kept_index",
    "laid_out_as",
    "obstacle",
    "one_graph",
    "pack",
    "plan_of",
    "project_ref",
    "sample_ref",
    "sdd",
    "slope_ref",
    "sparse_layer",
    "squares_ref",
    "uniform_",
    "unit_shape",
    "unpack",
]
