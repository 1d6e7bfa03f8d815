"""sparse_linear and sparse_conv2d: products with the kept weights of a decided mask, in any format.

One operator carries all formats.  Its parameter is the vector of kept values (`formats`), and forward, dX
and dW may each have a format of their own; what a format keeps of a mask is prepared once (`plan`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..device import on_gpu
from ..formats import Format, bias_gradient
from .plan import Plan

# --- Products ---------------------------------------------------------------------------------------


def _like(x: Tensor, shape: Sequence[int], format: Format) -> Tensor:
    """An unset result of x's dtype and device, strided as every implementation leaves it."""
    if len(shape) == 2 and format.feature_major:
        return x.new_empty(shape[1], shape[0]).T
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x, shape))


def _layout(x: Tensor, shape: Sequence[int]) -> torch.memory_format:
    """Images are channels last on a GPU, and where x is."""
    last = len(shape) == 4 and (on_gpu(x) or not x.is_contiguous())
    return torch.channels_last if last else torch.contiguous_format


def _strided(result: Tensor, x: Tensor, format: Format) -> Tensor:
    """The result, strided as `_like` says."""
    if result.ndim == 4:
        return result.contiguous(memory_format=_layout(x, result.shape))
    if format.feature_major:
        # No view, since autograd lets nothing write in place to a view that a function made.
        return result.new_empty(0).set_(result.T.contiguous().T)  # pyright: ignore[reportArgumentType]
    return result.contiguous()


def _run_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, Any]:
    """(y, the weight that made it, its filling)."""
    format, storage = plan.forward
    if x.numel() and plan.nnz:
        weight, fill = format.weight(values, plan.layer, storage, x.dtype, None)
        y = format.forward(x, weight, bias, plan.layer, storage)
        return _strided(y, x, format), weight, fill
    y = _like(x, plan.layer.output(x.shape), format).zero_()
    y = y if bias is None else y.add_(bias.view(-1, *[1] * (y.ndim - 2)))
    return _strided(y, x, format), None, None


def _weight_again(
    values: Tensor, dtype: torch.dtype, plan: Plan, weight: Tensor | None, fill: Any
) -> Tensor:
    """The weight of forward, if it is still there."""
    if weight is not None and weight.dtype == dtype:
        return weight
    format, storage = plan.dx
    return format.weight(values, plan.layer, storage, dtype, fill)[0]


def _run_dx(
    dy: Tensor, values: Tensor, shape: Sequence[int], plan: Plan,
    weight: Tensor | None = None, fill: Any = None,
) -> Tensor:  # fmt: skip
    format, storage = plan.dx
    if dy.numel() and plan.nnz:
        weight = _weight_again(values, dy.dtype, plan, weight, fill)
        return _strided(format.grad_input(dy, weight, plan.layer, storage, shape), dy, format)
    return _strided(_like(dy, shape, format).zero_(), dy, format)


def _run_dw(dy: Tensor, x: Tensor, values: Tensor, plan: Plan) -> Tensor:
    format, storage = plan.dw
    if dy.numel() and plan.nnz:
        return format.grad_values(dy, x, values, plan.layer, storage)
    return torch.zeros_like(values)


def _run_both(
    dy: Tensor, x: Tensor, values: Tensor, plan: Plan, weight: Tensor | None, fill: Any
) -> tuple[Tensor, Tensor]:
    """dX and dW, by one call where their format has one."""
    format, storage = plan.dx
    one = plan.layer.conv and format is plan.dw[0] and dy.numel() and plan.nnz
    if not one or format.grad_both is None:
        return _run_dx(dy, values, x.shape, plan, weight, fill), _run_dw(dy, x, values, plan)
    weight = _weight_again(values, dy.dtype, plan, weight, fill)
    dx, dw = format.grad_both(dy, x, values, weight, plan.layer, storage)
    return _strided(dx, dy, format), dw


# --- Their gradients --------------------------------------------------------------------------------
#
# <dy, x W(v)^T> is linear in each of x, dy and v; the three products are its gradients, so that each is
# differentiated by the other two, to any order.  In a graph they are operators; outside of one they are
# plain functions of autograd, whose overhead is a tenth of an operator's.


def _prepared(x: Tensor, wanted: bool) -> Tensor:
    """x [T, k], feature-major if all products of it want it so: copied once, not in each of them."""
    if not wanted or x.T.is_contiguous():
        return x
    return x.T.contiguous().T


def _in_graph(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter)


def _forward_of(x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    if torch.jit.is_tracing():
        if plan.traced is None or not plan.nnz:
            raise ValueError(
                f"torch.jit.trace: expected plain layers, a mask, state or compact, got {plan.formats}; trace "
                "sparsecore.densify_(copy.deepcopy(model))"
            )
        return plan.traced(x, values, bias, plan.layer, plan.storages)
    if _in_graph(x):
        if plan.traced is None or not plan.nnz:
            return _forward(x, values, bias, *plan.flat())
        y = plan.traced(x, values, bias, plan.layer, plan.storages)
        return _strided(y, x, plan.forward[0])
    if torch.is_grad_enabled():
        return _Forward.apply(x, values, bias, plan)
    return _run_forward(x, values, bias, plan)[0]


def _dx_of(dy: Tensor, values: Tensor, shape: Sequence[int], plan: Plan) -> Tensor:
    if _in_graph(dy):
        return _dx(dy, values, list(shape), *plan.flat())
    product = _Dx.apply if torch.is_grad_enabled() else _run_dx
    return product(dy, values, shape, plan)


def _dw_of(dy: Tensor, x: Tensor, values: Tensor, plan: Plan) -> Tensor:
    if _in_graph(dy):
        return _dw(dy, x, values, *plan.flat())
    product = _Dw.apply if torch.is_grad_enabled() else _run_dw
    return product(dy, x, values, plan)


class _Forward(torch.autograd.Function):
    # The older form, without `setup_context`, which would look at signatures at each call.
    @staticmethod
    def forward(ctx, *inputs):
        y, weight, fill = _run_forward(*inputs)
        _Forward.keep(ctx, inputs, weight, fill)
        return y

    @staticmethod
    def keep(ctx, inputs, weight: Tensor | None = None, fill: Any = None) -> None:
        x, values, bias, ctx.plan = inputs
        if not ctx.needs_input_grad[0] or not ctx.plan.once:
            weight = fill = None
        # A filled weight is the plan's and may be filled again.  Values are kept beside one that was made of
        # them, since dW needs their size, and so that autograd sees whether they have changed.
        ctx.save_for_backward(x, values, weight if fill is None else None)
        ctx.fill = fill
        ctx.bias = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, values, weight = ctx.saved_tensors
        plan, fill = ctx.plan, ctx.fill
        want_x, want_values, want_bias = ctx.needs_input_grad[:3]
        _, major_x, major_values = plan.major
        if want_x or want_values:
            dy = _prepared(dy, (major_x or not want_x) and (major_values or not want_values))
        dx = dw = dbias = None
        if torch.is_grad_enabled() or _in_graph(dy):
            dx = _dx_of(dy, values, x.shape, plan) if want_x else None
            dw = _dw_of(dy, x, values, plan) if want_values else None
        elif want_x and want_values:
            dx, dw = _run_both(dy, x, values, plan, weight, fill)
        elif want_x:
            dx = _run_dx(dy, values, x.shape, plan, weight, fill)
        elif want_values:
            dw = _run_dw(dy, x, values, plan)
        if want_bias:
            dbias = bias_gradient(dy, ctx.bias)
        return dx, dw, dbias, None


class _Dx(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _Dx.keep(ctx, inputs)
        return _run_dx(*inputs)

    @staticmethod
    def keep(ctx, inputs) -> None:
        dy, values, _, ctx.plan = inputs
        ctx.save_for_backward(dy, values)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, values = ctx.saved_tensors
        want_dy, want_values = ctx.needs_input_grad[:2]
        return (
            _forward_of(grad, values, None, ctx.plan) if want_dy else None,
            _dw_of(dy, grad, values, ctx.plan) if want_values else None,
            None,
            None,
        )


class _Dw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _Dw.keep(ctx, inputs)
        return _run_dw(*inputs)

    @staticmethod
    def keep(ctx, inputs) -> None:
        dy, x, _, ctx.plan = inputs
        ctx.save_for_backward(dy, x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, x = ctx.saved_tensors
        want_dy, want_x = ctx.needs_input_grad[:2]
        return (
            _forward_of(x, grad, None, ctx.plan) if want_dy else None,
            _dx_of(dy, grad, x.shape, ctx.plan) if want_x else None,
            None,
            None,
        )


# --- Operators --------------------------------------------------------------------------------------


@torch.library.custom_op("sparsecore::sparse_forward", mutates_args=())
def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None,
    formats: str, tensors: list[Tensor], numbers: list[int],
) -> Tensor:  # fmt: skip
    return _run_forward(x, values, bias, Plan.alive(formats, tensors, numbers))[0]


@_forward.register_fake
def _(x, values, bias, formats, tensors, numbers):
    plan = Plan.of(formats, tensors, numbers)
    return _like(x, plan.layer.output(x.shape), plan.forward[0])


@torch.library.custom_op("sparsecore::sparse_dx", mutates_args=())
def _dx(
    dy: Tensor, values: Tensor, shape: list[int],
    formats: str, tensors: list[Tensor], numbers: list[int],
) -> Tensor:  # fmt: skip
    return _run_dx(dy, values, shape, Plan.alive(formats, tensors, numbers))


@_dx.register_fake
def _(dy, values, shape, formats, tensors, numbers):
    return _like(dy, shape, Plan.of(formats, tensors, numbers).dx[0])


@torch.library.custom_op("sparsecore::sparse_dw", mutates_args=())
def _dw(
    dy: Tensor, x: Tensor, values: Tensor, formats: str, tensors: list[Tensor], numbers: list[int]
) -> Tensor:
    return _run_dw(dy, x, values, Plan.alive(formats, tensors, numbers))


@_dw.register_fake
def _(dy, x, values, formats, tensors, numbers):
    return torch.empty_like(values)


def _differentiate(operator: Any, function: Any) -> None:
    """Gives an operator the gradient of a function, whose last argument is the plan."""

    def setup_context(ctx, inputs, output) -> None:
        *rest, formats, tensors, numbers = inputs
        function.keep(ctx, (*rest, Plan.of(formats, tensors, numbers)))
        ctx.tensors = len(tensors)

    def backward(ctx, grad: Tensor):
        *gradients, _ = function.backward(ctx, grad)
        return *gradients, None, [None] * ctx.tensors, None

    operator.register_autograd(backward, setup_context=setup_context)


_differentiate(_forward, _Forward)
_differentiate(_dx, _Dx)
_differentiate(_dw, _Dw)


# --- Public functions -------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product of x is computed in; autocast leaves float64 alone, as everywhere in torch."""
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind := x.device.type):
        return torch.get_autocast_dtype(kind)
    return dtype


def sparse_layer(
    x: Float[Tensor, "*batch k"] | Float[Tensor, "b k h w"],
    values: Float[Tensor, " nnz"],
    bias: Float[Tensor, " n"] | None,
    plan: Plan,
) -> Tensor:
    """x @ W.T + bias or conv2d(x, W, bias), W holding `values` in row-major order of the plan's mask.

    Computes in x's dtype, under autocast in autocast's, with float32 sums; differentiable to any order
    in x, values and bias.  A linear layer's result may be strided (1, T) ("csr").

    Errors: ValueError for shapes or devices that are not the plan's.
    """
    layer, device, dtype = plan.layer, plan.device, compute_dtype(x)
    if values.shape != (plan.nnz,):
        raise ValueError(
            f"values: expected ({plan.nnz},) for the plan's mask, got {tuple(values.shape)}; "
            "a plan belongs to one mask"
        )
    channel = 1 if layer.conv else -1
    if (layer.conv and x.ndim != 4) or x.ndim < 1 or x.shape[channel] != layer.inputs:
        wanted = "(b, k, h, w)" if layer.conv else "(*batch, k)"
        raise ValueError(f"x: expected {wanted} with k = {layer.inputs}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(
            f"x: expected a floating dtype, as weights are rounded to it, got {x.dtype}"
        )
    if bias is not None and bias.shape != layer.shape[:1]:
        raise ValueError(f"bias: expected ({layer.shape[0]},), got {tuple(bias.shape)}")
    if x.device != device or values.device != device or not (bias is None or bias.device == device):
        raise ValueError(
            f"expected x, values and bias on {device} as the plan is, got {x.device}, {values.device} and "
            f"{None if bias is None else bias.device}"
        )
    x = x if x.dtype == dtype else x.to(dtype)
    if layer.conv:
        if x.shape[2] < plan.least[0] or x.shape[3] < plan.least[1]:
            raise ValueError(f"x: expected images that the filter fits, got {tuple(x.shape)}")
        return _forward_of(x, values, bias, plan)
    flat = x if x.ndim == 2 else x.flatten(0, -2) if x.ndim > 1 else x[None]
    y = _forward_of(_prepared(flat, plan.major[0] and plan.major[2]), values, bias, plan)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], layer.shape[0])
