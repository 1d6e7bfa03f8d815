"""Triton kernels and their PyTorch references.  Imported as `sparsecore.kernels`; needs torch and triton only."""

from .philox import uniform_
from .reference import (
    concrete_ref,
    concrete_slope_ref,
    gaussian_ref,
    gaussian_slope_ref,
    hard_concrete_ref,
    hard_concrete_slope_ref,
)

__all__ = [
    "concrete_ref",
    "concrete_slope_ref",
    "gaussian_ref",
    "gaussian_slope_ref",
    "hard_concrete_ref",
    "hard_concrete_slope_ref",
    "uniform_",
]
