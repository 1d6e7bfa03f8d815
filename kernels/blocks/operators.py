"""A layer in blocks as operators that torch.compile sees through, down to the launches of its kernels.

They launch what the layer launches outside of a graph, and values are packed once a step there too.  A plan comes
flat: its tensors, and numbers for each of forward, dX and dW, whose tiles differ.
"""

import torch
from torch import Tensor

from ..dsl import MISSING
from ..formats import bias_gradient
from ..moves import packed_by_kernel
from .plan import BlockPlan
from .products import fitting, forward, grad_input, gradient

# Without Triton nothing launches, and PyTorch would say so at every import.
_operator = torch.library.triton_op if MISSING is None else torch.library.custom_op


@_operator("sparsecore::block_layer", mutates_args=())
def block_layer(
    x: Tensor, values: Tensor, bias: Tensor | None,
    tensors: list[Tensor], numbers: list[int], dx_numbers: list[int], dw_numbers: list[int],
    slide: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, packed values); differentiable once, in x, values and bias."""
    plan = BlockPlan.unflatten(tensors, numbers)
    packed = packed_by_kernel(values, plan.source, plan.packed, x.dtype)
    return forward(x, packed, bias, plan, fitting(x, x.shape, plan, slide)), packed


@_operator("sparsecore::block_layer_dx", mutates_args=())
def _dx(
    dy: Tensor, packed: Tensor, shape: list[int],
    tensors: list[Tensor], numbers: list[int], slide: list[int],
) -> Tensor:  # fmt: skip
    plan = BlockPlan.unflatten(tensors, numbers)
    return grad_input(dy, packed, plan, shape, fitting(dy, shape, plan, slide))


@_operator("sparsecore::block_layer_dw", mutates_args=())
def _dw(
    dy: Tensor, x: Tensor, dtype: torch.dtype,
    tensors: list[Tensor], numbers: list[int], slide: list[int],
) -> Tensor:  # fmt: skip
    """Of the values, in their dtype."""
    plan = BlockPlan.unflatten(tensors, numbers)
    out = x.new_empty(plan.nnz, dtype=dtype)
    return gradient(dy, x, plan, fitting(x, x.shape, plan, slide), out)


def _keep(ctx, inputs, output) -> None:
    x, values, bias, ctx.tensors, _, *ctx.numbers, ctx.slide = inputs
    ctx.set_materialize_grads(False)
    ctx.values, ctx.bias = values.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x, output[1])


def _gradients(ctx, dy: Tensor, dpacked: None):
    x, packed = ctx.saved_tensors
    want_x, want_values, want_bias = ctx.needs_input_grad[:3]
    dx_numbers, dw_numbers = ctx.numbers
    dx = dw = dbias = None
    if want_x:
        dx = _dx(dy, packed, list(x.shape), ctx.tensors, dx_numbers, ctx.slide)
    if want_values:
        dw = _dw(dy, x, ctx.values, ctx.tensors, dw_numbers, ctx.slide)
    if want_bias:
        dbias = bias_gradient(dy, ctx.bias)
    # PyTorch takes an empty list for one of tensors.
    slide = None if ctx.slide else []
    return dx, dw, dbias, [None] * len(ctx.tensors), None, None, None, slide


block_layer.register_autograd(_gradients, setup_context=_keep)
