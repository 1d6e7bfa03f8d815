"""Products of activations with the packed panels of a plan, and the kept weights they are made of.

Plain functions without autograd.  Activations are best feature-major, [T, c] of strides (1, T): others
are copied, and results are feature-major views.  Sums are in float32 and always in the same order.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..device import on_its_device
from ..formats import check_device, check_dtype
from ..moves import pack_values
from .gemm import launch_dvalues, launch_dx, launch_fwd
from .plan import PanelPlan


def panel_pack(values: Float[Tensor, "nnz"], plan: PanelPlan, dtype: torch.dtype) -> Tensor:
    """Kept weights, in row-major order of the mask, as packed [vectors, V]; 0 where there is none."""
    return pack_values(values, plan.source, plan.slot, (plan.vectors, plan.height), dtype)


@on_its_device
def panel_forward(
    x: Float[Tensor, "t k"],
    packed: Float[Tensor, "vectors v"],
    bias: Float[Tensor, "n"] | None,
    plan: PanelPlan,
) -> Float[Tensor, "t n"]:
    """x @ W.T + bias in x's dtype, of strides (1, T)."""
    _check(x, "x [T, k]", plan.shape[1], plan, packed)
    if bias is not None and (bias.shape != plan.shape[:1] or bias.device != x.device):
        raise ValueError(
            f"expected bias ({plan.shape[0]},) on {x.device}, got {tuple(bias.shape)} on {bias.device}"
        )
    y = _empty(x, plan.shape[0])
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        launch_fwd(y, feature_major(x), packed.contiguous(), bias, plan)
    return y


@on_its_device
def panel_grad_input(
    dy: Float[Tensor, "t n"], packed: Float[Tensor, "vectors v"], plan: PanelPlan
) -> Float[Tensor, "t k"]:
    """dy @ W in dy's dtype, of strides (1, T)."""
    _check(dy, "dy [T, n]", plan.shape[0], plan, packed)
    dx = _empty(dy, plan.shape[1])
    if dx.numel():
        launch_dx(dx, feature_major(dy), packed.contiguous(), plan)
    return dx


@on_its_device
def panel_grad_values(
    dy: Float[Tensor, "t n"], x: Float[Tensor, "t k"], plan: PanelPlan, dtype: torch.dtype
) -> Float[Tensor, "nnz"]:
    """The gradient of the kept weights, in row-major order of the mask.  Only stored vectors are computed."""
    _check(x, "x [T, k]", plan.shape[1], plan)
    _check(dy, "dy [T, n]", plan.shape[0], plan)
    if len(x) != len(dy) or x.dtype != dy.dtype:
        raise ValueError(
            f"expected x and dy of as many tokens and one dtype, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(dy.shape)} {dy.dtype}"
        )
    out = torch.empty(plan.nnz, dtype=dtype, device=x.device)
    if len(x) == 0:
        return out.zero_()
    if len(out):
        launch_dvalues(out, feature_major(x), feature_major(dy), plan)
    return out


def feature_major(x: Float[Tensor, "t c"]) -> Float[Tensor, "t c"]:
    """x with unit stride over tokens; copied if it has another."""
    return x if x.stride(0) == 1 or len(x) == 1 else x.t().contiguous().t()


def _empty(x: Tensor, columns: int) -> Tensor:
    return torch.empty(columns, len(x), dtype=x.dtype, device=x.device).t()


# --- Arguments --------------------------------------------------------------------------------------


def _check(x: Tensor, what: str, width: int, plan: PanelPlan, packed: Tensor | None = None) -> None:
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"expected {what} of {width} columns, got {tuple(x.shape)}")
    check_device(x, plan.source)
    check_dtype(x)
    if packed is None:
        return
    expected = (plan.vectors, plan.height)
    if packed.shape != expected or packed.dtype != x.dtype or packed.device != x.device:
        raise ValueError(
            f"expected packed {expected} of {x.dtype} on {x.device}, got {tuple(packed.shape)} of "
            f"{packed.dtype} on {packed.device}; use panel_pack(values, plan, {x.dtype})"
        )
