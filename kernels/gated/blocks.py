"""Linear and convolution with one gate per block or channel, whose closed gates cost nothing.

y = x @ (gain * W * z).T + bias, z sampled per unit from (seed, step, layer); backward draws it again, so
no mask or noise is stored.  On a GPU a unit whose z is exactly 0 is skipped forward and backward: its
weights are not even read, so what they hold (NaN too) cannot reach y or dx.  The exception is the
Bernoulli gate's backward: its straight-through gradient is not 0 at z = 0, so it reads every block.
On the CPU closed weights are multiplied by 0.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ..blocks.gemm import launch_dx, launch_fwd
from ..blocks.layout import empty, gradient_rows, output_shape, readable, rows
from ..blocks.lists import check_unit, draw, logit_gradients, transposed
from ..blocks.problem import problem_of
from ..blocks.weights import launch_dgate, open_columns, scale
from ..device import PLAIN, gpu_kernel, on_its_device
from ..philox import uniform_
from ..reference import BERNOULLI, GateSpec, sample_ref, slope_ref
from ..units import Unit, apply_ref, gather_ref, unit_shape

# --- Shapes and layouts -----------------------------------------------------------------------------


def _last(x: Tensor) -> bool:
    """Whether results are channels last: always on a GPU, on the CPU as x is."""
    return x.is_cuda or not x.is_contiguous()


def _dense(weight: Tensor) -> Tensor:
    """weight, contiguous or channels last."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def _sum_type(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


# --- Launchers --------------------------------------------------------------------------------------


@on_its_device
def launch_forward(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: list[float], unit: list[int], axes: list[int],
) -> Tensor:  # fmt: skip
    problem, spec = problem_of(x.shape, weight.shape, Unit(*unit), axes), GateSpec.of(gate)
    y = empty(x, output_shape(x.shape, problem), last=True)
    if y.numel() == 0:
        return y
    lists = draw(logits, seed, step, layer, spec, problem.unit, problem.n)
    scaled = scale(_dense(weight), lists, problem, x.dtype)
    bias = None if bias is None else bias.contiguous()
    launch_fwd(rows(y), readable(x, problem), scaled, bias, gain, lists, problem)
    return y


@on_its_device
def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: list[float], unit: list[int], axes: list[int],
    want_x: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx or nothing, dweight or nothing, dlogits, dgain)."""
    problem, spec = problem_of(x.shape, weight.shape, Unit(*unit), axes), GateSpec.of(gate)
    dense = _dense(weight)
    dx = empty(x, x.shape if want_x else (0,), last=True)
    dw = torch.zeros_like(dense) if want_weight else weight.new_empty(0)
    if dy.numel() == 0:
        return (
            dx.zero_(),
            dw,
            torch.zeros_like(logits),
            torch.zeros((), dtype=_sum_type(logits), device=x.device),
        )
    dy = gradient_rows(dy)
    lists = draw(logits, seed, step, layer, spec, problem.unit, problem.n)
    skip = spec.kind != BERNOULLI
    if problem.rows:
        dy = open_columns(dy, lists, skip)
    if want_x and dx.numel():
        across = lists if problem.rows else transposed(lists)
        scaled = scale(dense, lists, problem, x.dtype)
        launch_dx(rows(dx), dy, scaled, gain, across, problem)
    partial = launch_dgate(
        dw if want_weight else None, readable(x, problem), dy, dense, gain, lists, problem, skip
    )
    dlogits, dz = logit_gradients(
        partial, lists.z, logits, gain, spec, problem.unit.h if problem.rows else 1, skip
    )
    return dx, dw, dlogits, (lists.z * dz).sum().to(_sum_type(logits))


# --- Operations -------------------------------------------------------------------------------------


def _sampled(logits: Tensor, seed: Tensor, step: Tensor, layer: int, gate: list[float]) -> Tensor:
    noise = uniform_(logits.new_empty(logits.shape, dtype=torch.float32), seed, step, layer)
    return sample_ref(GateSpec.of(gate), logits, noise.to(logits.dtype))


@torch.library.custom_op("sparsecore::block_gated_conv", mutates_args=(), device_types=PLAIN)
def _block_gated(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: list[float], unit: list[int], axes: list[int],
) -> Tensor:  # fmt: skip
    problem = problem_of(x.shape, weight.shape, Unit(*unit), axes)
    z = _sampled(logits, seed, step, layer, gate)
    product = apply_ref(weight, z, problem.unit)
    product = (product if gain is None else product * gain).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = empty(x, output_shape(x.shape, problem), _last(x))
    if x.ndim == 2:
        return y.copy_(F.linear(x, product, bias))
    return y.copy_(F.conv2d(x, product, bias, *problem.geometry[1:]))


gpu_kernel(_block_gated)(launch_forward)


@_block_gated.register_fake
def _(x, weight, logits, bias, gain, seed, step, layer, gate, unit, axes):
    return empty(
        x, output_shape(x.shape, problem_of(x.shape, weight.shape, Unit(*unit), axes)), _last(x)
    )


@torch.library.custom_op("sparsecore::block_gated_backward", mutates_args=(), device_types=PLAIN)
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, logits: Tensor, gain: Tensor | None,
    seed: Tensor, step: Tensor, layer: int, gate: list[float], unit: list[int], axes: list[int],
    want_x: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = problem_of(x.shape, weight.shape, Unit(*unit), axes)
    z = _sampled(logits, seed, step, layer, gate)
    product = apply_ref(weight, z, problem.unit)
    product = (product if gain is None else product * gain).to(x.dtype)
    dx = empty(x, x.shape if want_x else (0,), _last(x))
    if x.ndim == 2:
        if want_x:
            dx.copy_(dy @ product)
        through = dy.T @ x
    else:
        at = problem.geometry
        back, through, _ = torch.ops.aten.convolution_backward(
            dy, x, product, None, at.stride, at.padding, at.dilation, False, [0, 0], 1,
            [want_x, True, False],
        )  # fmt: skip
        if want_x:
            dx.copy_(back)
    through = through.to(weight.dtype)
    dz = gather_ref(through * weight, problem.unit).to(z.dtype)
    scale = 1.0 if gain is None else gain
    dlogits = dz * scale * slope_ref(GateSpec.of(gate), z, logits)
    dw = weight.new_empty(0)
    if want_weight:
        dw = torch.empty_like(_dense(weight)).copy_(apply_ref(through, z, problem.unit) * scale)
    return dx, dw, torch.empty_like(logits).copy_(dlogits), (z * dz).sum().to(_sum_type(logits))


gpu_kernel(_backward)(launch_backward)


@_backward.register_fake
def _(dy, x, weight, logits, gain, seed, step, layer, gate, unit, axes, want_x, want_weight):
    dw = torch.empty_like(_dense(weight)) if want_weight else weight.new_empty(0)
    dx = empty(x, x.shape if want_x else (0,), _last(x))
    dgain = torch.empty((), dtype=_sum_type(logits), device=x.device)
    return dx, dw, torch.empty_like(logits), dgain


def _keep(ctx, inputs, output) -> None:
    x, weight, logits, bias, gain, seed, step, *ctx.rest = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, logits, gain, seed, step)


def _autograd(ctx, dy: Tensor):
    x, weight, logits, gain, seed, step = ctx.saved_tensors
    want_x, want_weight, want_logits, want_bias, want_gain = ctx.needs_input_grad[:5]
    dx = dweight = dlogits = dbias = dgain = None
    if want_x or want_weight or want_logits or want_gain:
        dx, dweight, dlogits, dgain = _backward(
            dy, x, weight, logits, gain, seed, step, *ctx.rest, want_x, want_weight
        )
    if want_bias:
        # float32 sums, whatever dy is
        over = [d for d in range(dy.ndim) if d != 1]
        wide = torch.promote_types(dy.dtype, torch.float32)
        dbias = dy.sum(over, dtype=wide).to(ctx.bias_dtype)
    return (
        dx if want_x else None,
        dweight if want_weight else None,
        dlogits if want_logits else None,
        dbias,
        dgain.to(gain.dtype) if want_gain else None,
        *[None] * 6,
    )


_block_gated.register_autograd(_autograd, setup_context=_keep)


# --- Public functions -------------------------------------------------------------------------------


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _pair(value: int | Sequence[int], name: str, least: int) -> list[int]:
    pair = [value] * 2 if isinstance(value, int) else list(value)
    if len(pair) != 2 or not all(isinstance(part, int) and part >= least for part in pair):
        raise ValueError(f"expected {name} as one or two integers >= {least}, got {value!r}")
    return pair


def _check(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, unit: Unit,
    seed: Tensor, step: Tensor, gain: Tensor | None,
) -> None:  # fmt: skip
    check_unit(unit)
    expected = unit_shape(weight.shape, unit)
    if logits.shape != expected:
        raise ValueError(
            f"expected logits {tuple(expected)} for a weight {tuple(weight.shape)} and {unit}, "
            f"got {tuple(logits.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if gain is not None and gain.ndim:
        raise ValueError(f"expected gain of no dimensions, got {tuple(gain.shape)}")
    for name, value in (("seed", seed), ("step", step)):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise ValueError(
                f"expected {name} as one int64, got {value.dtype} {tuple(value.shape)}; "
                f"use torch.tensor([{name}], device=x.device)"
            )
    for name, value in (
        ("weight", weight), ("logits", logits), ("bias", bias), ("gain", gain), ("seed", seed), ("step", step)
    ):  # fmt: skip
        if value is not None and value.device != x.device:
            raise ValueError(f"expected {name} on {x.device} as x is, got {value.device}")


def block_gated_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "n k"],
    logits: Float[Tensor, "*units"],
    bias: Float[Tensor, "n"] | None = None,
    *,
    gate: GateSpec,
    unit: Unit,
    seed: Int64[Tensor, "1"],
    step: Int64[Tensor, "1"],
    layer: int,
    gain: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "*batch n"]:
    """x @ (gain * weight * z).T + bias in x's dtype (autocast's under autocast), sums in float32.

    Args:
        weight: any float dtype; scaled weights are rounded to x's.
        logits: of `unit_shape(weight.shape, unit)`; z takes its noise by their row-major index.
        unit: blocks with sides 16, 32, 64 or 128, or whole rows `Unit(h, 0)`.
        seed, step: one int64 each, on x's device; never synchronised, not to change before backward.

    Weights, logits, bias and gain are differentiable.  Errors: ValueError for other shapes or units.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected x (*batch, k) and weight (n, k), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    _check(x, weight, logits, bias, unit, seed, step, gain)
    flat = _autocast(x).reshape(-1, x.shape[-1])
    y = _block_gated(
        flat, weight, logits, bias, gain, seed, step, layer, list(gate), list(unit), []
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def block_gated_conv2d(
    x: Float[Tensor, "b k h w"],
    weight: Float[Tensor, "n k r s"],
    logits: Float[Tensor, "*units"],
    bias: Float[Tensor, "n"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    gate: GateSpec,
    unit: Unit,
    seed: Int64[Tensor, "1"],
    step: Int64[Tensor, "1"],
    layer: int,
    gain: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "b n oh ow"]:
    """conv2d(x, gain * weight * z, bias), as `block_gated_linear`; blocks tile the [n, k] plane of each tap.

    Activations are best channels last: others are copied, and on a GPU y is channels last.
    Errors: ValueError for other shapes, units or groups.
    """
    if groups != 1:
        raise ValueError(
            f"expected groups = 1, got {groups}; gate the weight and use conv2d instead"
        )
    if weight.ndim != 4 or x.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected x (b, k, h, w) and weight (n, k, r, s), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    _check(x, weight, logits, bias, unit, seed, step, gain)
    axes = [*_pair(stride, "stride", 1), *_pair(padding, "padding", 0)]
    axes += _pair(dilation, "dilation", 1)
    out = problem_of(x.shape, weight.shape, unit, axes).out
    if min(out[1:]) < 1:
        raise ValueError(f"expected a filter within the padded image, got outputs of {out[1:]}")
    return _block_gated(
        _autocast(x), weight, logits, bias, gain, seed, step, layer, list(gate), list(unit), axes
    )
