"""Products of activations with the packed blocks of a plan, and the kept weights they are made of.

Plain functions without autograd but for `pack`, each one launch (the gradient of values has a second one
where it is split).  x and dy: [T, c], or images [B, c, H, W], best channels last: others are copied.  axes
are the stride, padding and dilation of a convolution, two each; [] for a matrix.  Sums are in float32.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..device import on_its_device
from ..formats import check_device, check_dtype
from ..moves import pack_values
from ..units import Unit
from .gemm import launch_dx, launch_fwd
from .layout import check_reach, empty, gradient_rows, output_shape, readable, rows
from .plan import BlockPlan
from .problem import Problem, problem_of
from .values import launch_dvalues


def pack(values: Float[Tensor, "nnz"], plan: BlockPlan, dtype: torch.dtype) -> Tensor:
    """Kept weights, in row-major order of the mask, as packed [blocks, h, w]; 0 where there is none."""
    return pack_values(values, plan.source, plan.slot, (plan.blocks, *plan.block), dtype)


def unpack(packed: Float[Tensor, "blocks h w"], plan: BlockPlan) -> Tensor:
    """The whole weight, 0 where nothing is stored; in plain PyTorch."""
    (h, w), (n, k, *filters) = plan.block, plan.shape
    nb, kb = -(-n // h), -(-k // w)
    tiles = packed.new_zeros(nb * kb * plan.taps, h, w).index_copy(0, plan.units, packed)
    dense = tiles.view(nb, kb, plan.taps, h, w).permute(0, 3, 1, 4, 2)
    return dense.reshape(nb * h, kb * w, plan.taps)[:n, :k].reshape(n, k, *filters)


def stored_blocks(weight: Tensor, plan: BlockPlan) -> Tensor:
    """The plan's blocks of a whole weight, 0 past its edges, as packed [blocks, h, w]; in plain PyTorch."""
    (h, w), (n, k, *_) = plan.block, plan.shape
    pad = [0, 0, 0, -k % w, 0, -n % h]
    padded = torch.nn.functional.pad(weight.reshape(n, k, plan.taps), pad)
    tiles = padded.view(-(-n // h), h, -(-k // w), w, plan.taps).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, h, w)[plan.units]


@on_its_device
def block_forward(
    x: Tensor, packed: Tensor, bias: Tensor | None, plan: BlockPlan, axes: Sequence[int]
) -> Tensor:
    """x @ W.T + bias or conv2d(x, W, bias) in x's dtype: [T, n], or [B, n, OH, OW] channels last."""
    problem = _problem(x, plan, axes)
    check_packed(x, plan, packed)
    if bias is not None and (bias.shape != plan.shape[:1] or bias.device != x.device):
        raise ValueError(
            f"expected bias ({plan.shape[0]},) on {x.device}, got {tuple(bias.shape)} on {bias.device}"
        )
    y = empty(x, output_shape(x, problem), last=True)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        at = readable(x, problem)
        launch_fwd(rows(y), at, packed.contiguous(), bias, None, plan.rows, problem)
    return y


@on_its_device
def block_grad_input(
    dy: Tensor, packed: Tensor, plan: BlockPlan, image: Sequence[int], axes: Sequence[int]
) -> Tensor:
    """The gradient in x: dy @ W, or the transposed convolution, whose x had H and W of `image`; [] for a matrix."""
    inputs = plan.shape[1] * plan.groups
    if len(image) != len(plan.shape) - 2:
        raise ValueError(f"expected the height and width of x's images, got {list(image)}")
    dx = empty(dy, (dy.shape[0], inputs, *image), last=True)
    problem = _problem(dx, plan, axes)
    check_packed(dx, plan, packed)
    _check_gradient(dy, dx, problem)
    if dy.numel() == 0:
        return dx.zero_()
    if dx.numel():
        check_reach(problem, 0, 0)  # the offsets in dx itself are int64
        launch_dx(rows(dx), gradient_rows(dy), packed.contiguous(), None, plan.columns, problem)
    return dx


@on_its_device
def block_grad_values(
    dy: Tensor, x: Tensor, plan: BlockPlan, axes: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, "nnz"]:
    """The gradient of the kept weights, in row-major order of the mask.  Only stored blocks are computed."""
    problem = _problem(x, plan, axes)
    check_packed(x, plan)
    _check_gradient(dy, x, problem)
    return _gradient(dy, x, plan, problem, torch.empty(plan.nnz, dtype=dtype, device=x.device))


@on_its_device
def block_grad_packed(
    dy: Tensor, x: Tensor, plan: BlockPlan, axes: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, "blocks h w"]:
    """The gradient of whole stored blocks, 0 past the matrix's edges."""
    problem = _problem(x, plan, axes)
    check_packed(x, plan)
    _check_gradient(dy, x, problem)
    out = torch.empty(plan.blocks, *plan.block, dtype=dtype, device=x.device)
    return _gradient(dy, x, plan, problem, out)


def _gradient(dy: Tensor, x: Tensor, plan: BlockPlan, problem: Problem, out: Tensor) -> Tensor:
    if dy.numel() == 0:
        return out.zero_()
    if out.numel():
        launch_dvalues(out, readable(x, problem), gradient_rows(dy), plan, problem)
    return out


# --- Arguments --------------------------------------------------------------------------------------


def _problem(x: Tensor, plan: BlockPlan, axes: Sequence[int]) -> Problem:
    check_dtype(x)
    if x.ndim != len(plan.shape) or x.shape[1] != plan.shape[1] * plan.groups:
        inputs = "[T, k]" if len(plan.shape) == 2 else "[B, k, H, W]"
        raise ValueError(
            f"expected x {inputs} with k = {plan.shape[1] * plan.groups}, got {tuple(x.shape)}"
        )
    if len(axes) != (6 if x.ndim == 4 else 0):
        raise ValueError(
            "expected axes [stride h, w, padding h, w, dilation h, w] of a convolution and [] of a "
            f"matrix, got {list(axes)} for {plan.shape}"
        )
    problem = problem_of(
        x.shape, plan.shape, Unit(*plan.block), axes, plan.groups, packed=True, tile=plan.tile
    )
    if min(problem.out[1:]) < 1 and x.ndim == 4:
        raise ValueError(
            f"expected a filter within the padded image, got outputs of {problem.out[1:]}"
        )
    return problem


def check_packed(x: Tensor, plan: BlockPlan, packed: Tensor | None = None) -> None:
    """Errors: ValueError unless x, the plan and packed, if any, fit together."""
    check_device(x, plan.source)
    if packed is None:
        return
    expected = (plan.blocks, *plan.block)
    if packed.shape != expected or packed.dtype != x.dtype or packed.device != x.device:
        raise ValueError(
            f"expected packed {expected} of {x.dtype} on {x.device}, got {tuple(packed.shape)} of "
            f"{packed.dtype} on {packed.device}; use pack(values, plan, {x.dtype})"
        )


def _check_gradient(dy: Tensor, x: Tensor, problem: Problem) -> None:
    expected = output_shape(x, problem)
    if dy.shape != expected:
        raise ValueError(f"expected dy {expected} for x {tuple(x.shape)}, got {tuple(dy.shape)}")
    if dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"expected dy and x of one dtype and device, got {dy.dtype} on {dy.device} and {x.dtype} "
            f"on {x.device}"
        )
