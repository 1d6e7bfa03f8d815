"""Products of activations with the packed blocks of a plan, and the kept weights they are made of.

Plain functions without autograd but for `pack`, each one launch (the gradient of values has a second one
where it is split).  x and dy: [T, c], or images [B, c, H, W], best channels last: others are copied.  axes
are the stride, padding and dilation of a convolution, two each; [] for a matrix.  Sums are in float32.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..formats import check_device, check_dtype
from ..launching import remembered
from ..moves import pack_values
from ..units import Unit
from .gemm import launch_dx, launch_fwd
from .layout import check_reach, contiguous, empty, output_shape, readable
from .plan import BlockPlan
from .problem import Problem, problem_of
from .values import launch_dvalues


def pack(values: Float[Tensor, "nnz"], plan: BlockPlan, dtype: torch.dtype) -> Tensor:
    """Kept weights, in row-major order of the mask, as packed [blocks, h, w]; 0 where there is none."""
    return pack_values(values, plan.source, plan.slot, plan.packed, dtype)


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


def block_forward(
    x: Tensor, packed: Tensor, bias: Tensor | None, plan: BlockPlan, axes: Sequence[int]
) -> Tensor:
    """x @ W.T + bias or conv2d(x, W, bias) in x's dtype: [T, n], or [B, n, OH, OW] channels last."""
    problem = fitting(x, x.shape, plan, axes)
    check_packed(x, plan, packed)
    if bias is not None and (bias.shape != plan.shape[:1] or bias.device != x.device):
        raise ValueError(
            f"expected bias ({plan.shape[0]},) on {x.device}, got {tuple(bias.shape)} on {bias.device}"
        )
    return forward(x, packed, bias, plan, problem)


def forward(
    x: Tensor, packed: Tensor, bias: Tensor | None, plan: BlockPlan, problem: Problem
) -> Tensor:
    """`block_forward` of what is known to fit."""
    y = empty(x, output_shape(x.shape, problem), last=True)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        at = readable(x, problem)
        launch_fwd(y, at, packed.contiguous(), bias, None, plan.rows, problem)
    return y


def block_grad_input(
    dy: Tensor, packed: Tensor, plan: BlockPlan, image: Sequence[int], axes: Sequence[int]
) -> Tensor:
    """The gradient in x: dy @ W, or the transposed convolution, whose x had H and W of `image`; [] for a matrix."""
    if len(image) != len(plan.shape) - 2:
        raise ValueError(f"expected the height and width of x's images, got {list(image)}")
    shape = (dy.shape[0], plan.shape[1] * plan.groups, *image)
    problem = fitting(dy, shape, plan, axes)
    check_packed(dy, plan, packed)
    _check_gradient(dy, dy, shape, problem)
    return grad_input(dy, packed, plan, shape, problem)


def grad_input(
    dy: Tensor, packed: Tensor, plan: BlockPlan, shape: Sequence[int], problem: Problem
) -> Tensor:
    """`block_grad_input` of what is known to fit, for x of this shape."""
    dx = empty(dy, shape, last=True)
    if dy.numel() == 0:
        return dx.zero_()
    if dx.numel():
        check_reach(problem, 0, 0)  # the offsets in dx itself are int64
        launch_dx(dx, contiguous(dy), packed.contiguous(), None, plan.columns, problem)
    return dx


def block_grad_values(
    dy: Tensor, x: Tensor, plan: BlockPlan, axes: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, "nnz"]:
    """The gradient of the kept weights, in row-major order of the mask.  Only stored blocks are computed."""
    problem = fitting(x, x.shape, plan, axes)
    check_packed(x, plan)
    _check_gradient(dy, x, x.shape, problem)
    return gradient(dy, x, plan, problem, x.new_empty(plan.nnz, dtype=dtype))


def block_grad_packed(
    dy: Tensor, x: Tensor, plan: BlockPlan, axes: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, "blocks h w"]:
    """The gradient of whole stored blocks, 0 past the matrix's edges."""
    problem = fitting(x, x.shape, plan, axes)
    check_packed(x, plan)
    _check_gradient(dy, x, x.shape, problem)
    return gradient(dy, x, plan, problem, x.new_empty(plan.packed, dtype=dtype))


def gradient(dy: Tensor, x: Tensor, plan: BlockPlan, problem: Problem, out: Tensor) -> Tensor:
    """Fills out, of kept weights or of packed blocks; of what is known to fit."""
    if dy.numel() == 0:
        return out.zero_()
    if out.numel():
        launch_dvalues(out, readable(x, problem), contiguous(dy), plan, problem)
    return out


# --- Arguments --------------------------------------------------------------------------------------


def fitting(x: Tensor, shape: Sequence[int], plan: BlockPlan, axes: Sequence[int]) -> Problem:
    """A product with x of this shape and x's dtype.  Errors: ValueError for one that the plan has not."""
    check_dtype(x)
    return _fitting(tuple(shape), plan.shape, plan.block, tuple(axes), plan.groups, plan.tile)


@remembered
def _fitting(
    x: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int], axes: tuple[int, ...],
    groups: int, tile: int,
) -> Problem:  # fmt: skip
    if len(x) != len(weight) or x[1] != weight[1] * groups:
        inputs = "[T, k]" if len(weight) == 2 else "[B, k, H, W]"
        raise ValueError(f"expected x {inputs} with k = {weight[1] * groups}, got {x}")
    if len(axes) != (6 if len(x) == 4 else 0):
        raise ValueError(
            "expected axes [stride h, w, padding h, w, dilation h, w] of a convolution and [] of a "
            f"matrix, got {list(axes)} for {weight}"
        )
    problem = problem_of(x, weight, Unit(*block), axes, groups, packed=True, tile=tile)
    if min(problem.out[1:]) < 1 and len(x) == 4:
        raise ValueError(
            f"expected a filter within the padded image, got outputs of {problem.out[1:]}"
        )
    return problem


def check_packed(x: Tensor, plan: BlockPlan, packed: Tensor | None = None) -> None:
    """Errors: ValueError unless x, the plan and packed, if any, fit together."""
    check_device(x, plan.source)
    if packed is None:
        return
    expected = plan.packed
    if packed.shape != expected or packed.dtype != x.dtype or packed.device != x.device:
        raise ValueError(
            f"expected packed {expected} of {x.dtype} on {x.device}, got {tuple(packed.shape)} of "
            f"{packed.dtype} on {packed.device}; use pack(values, plan, {x.dtype})"
        )


def _check_gradient(dy: Tensor, x: Tensor, shape: Sequence[int], problem: Problem) -> None:
    expected = output_shape(shape, problem)
    if dy.shape != expected:
        raise ValueError(f"expected dy {expected} for x {tuple(shape)}, got {tuple(dy.shape)}")
    if dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"expected dy and x of one dtype and device, got {dy.dtype} on {dy.device} and {x.dtype} "
            f"on {x.device}"
        )
