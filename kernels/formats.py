"""What every format of a sparse weight is made of: the layer it belongs to and its three products.

A format stores the kept weights of a decided mask in its own way and multiplies by them.  To all of them
the parameter is the same vector: the kept weights in row-major order of the mask, values [nnz].  So an
optimiser holds nothing else, pruned weights cannot come back, and a layer may change its format, or have
another one for each of forward, dX and dW, without its parameter noticing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dsl import MISSING, knobs


class Layer(NamedTuple):
    """A linear layer's weight [n, k], or a convolution's [n, k / groups, r, s] with its slide.

    slide: stride, padding and dilation, two integers each; empty for a linear layer.
    """

    shape: tuple[int, ...]
    slide: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Layer":
        """From what `numbers` gave."""
        groups, *rest = numbers
        ndim = 4 if len(rest) > 2 else 2
        return cls(tuple(rest[:ndim]), tuple(rest[ndim:]), groups)

    @property
    def numbers(self) -> list[int]:
        """All of it as integers, for an operator's schema."""
        return [self.groups, *self.shape, *self.slide]

    @property
    def conv(self) -> bool:
        return len(self.shape) == 4

    @property
    def pairs(self) -> list[list[int]]:
        """Stride, padding and dilation of a convolution."""
        return [list(self.slide[i : i + 2]) for i in (0, 2, 4)]

    @property
    def inputs(self) -> int:
        """Features or channels of x."""
        return self.shape[1] * self.groups

    def output(self, x: Sequence[int | torch.SymInt]) -> list:
        """Shape of y for x [T, k] or [B, k, H, W]."""
        if not self.conv:
            return [x[0], self.shape[0]]
        (stride, pad, dilation), taps = self.pairs, self.shape[2:]
        size = [
            (x[2 + i] + 2 * pad[i] - dilation[i] * (taps[i] - 1) - 1) // stride[i] + 1
            for i in (0, 1)
        ]
        return [x[0], self.shape[0], *size]


class Storage:
    """What a format keeps beside the values: index tensors or workspaces, and numbers.

    made: what the format has made of both, once.  fill: stands for what a weight of its own holds now; every
    filling has another one.  replayed: graphs fill that weight, and no `fill` tells of their replays.
    """

    __slots__ = ("fill", "made", "numbers", "replayed", "tensors")

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        self.tensors, self.numbers = list(tensors), list(numbers)
        self.made: Any = None
        self.fill: Any = None
        self.replayed = False


class Format(NamedTuple):
    """One way to multiply by a sparse weight.

    prepare(mask, layer, dtype, **options) -> Storage: once for a mask; may synchronise.
    weight(values, layer, storage, dtype, fill) -> (values as the products take them, None): made once a step,
        and dX finds it again.  Where it lies in the storage, (it, `storage.fill`): who comes back with that as
        `fill` finds it as it was, or has it filled again.
    forward(x, weight, bias, layer, storage) -> y; x [T, k] or [B, k, H, W], bias [n] or None.
    grad_input(dy, weight, layer, storage, shape of x) -> dx.
    grad_values(dy, x, values, layer, storage) -> gradient of values, of their shape and dtype.
    grad_both(dy, x, values, weight, layer, storage) -> both gradients of a convolution, where that saves work.
    traced(x, values, bias, layer, storages of the three products) -> y by operations that a compiler sees through
        and autograd differentiates.
    obstacle(device, layer, dtype, **options) -> why it cannot do this at all, or None.
    tiled(storage, tile) -> the same storage for other tiles of its kernels, where they have several.
    """

    prepare: Callable[..., Storage]
    weight: Callable[[Tensor, Layer, Storage, torch.dtype, Any], tuple[Tensor, Any]]
    forward: Callable[[Tensor, Tensor, Tensor | None, Layer, Storage], Tensor]
    grad_input: Callable[[Tensor, Tensor, Layer, Storage, Sequence[int]], Tensor]
    grad_values: Callable[[Tensor, Tensor, Tensor, Layer, Storage], Tensor]
    obstacle: Callable[..., str | None]
    feature_major: bool = False  # y and dX of a linear layer have strides (1, T)
    grad_both: Callable[..., tuple[Tensor, Tensor]] | None = None
    traced: Callable[..., Tensor] | None = None
    tiled: Callable[[Storage, int], Storage] | None = None


def check_mask(mask: Tensor) -> Tensor:
    """The mask, if it is one.  Errors: TypeError for another dtype, ValueError for another rank."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}; use `scores > 0`")
    if mask.ndim not in (2, 4):
        raise ValueError(f"mask: expected (n, k) or (n, k, r, s), got {tuple(mask.shape)}")
    return mask


def kept_index(mask: Tensor) -> Tensor:
    """Where the kept weights stand in the flattened mask, ascending: int32 if that is wide enough."""
    index = check_mask(mask).flatten().nonzero().squeeze(1)
    return index.int() if mask.numel() < 2**31 else index


def check_device(x: Tensor, index: Tensor) -> None:
    """Errors: ValueError unless a tensor lies where a plan's indices do."""
    if index.device != x.device:
        raise ValueError(
            f"expected a plan on {x.device} as the tensors are, got one on {index.device}; "
            "use plan.to(device)"
        )


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what Triton's products take


def kernel_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's products cannot run there in that dtype, or None."""
    if MISSING is not None:
        return f"it {MISSING}"
    if device.type != "cuda" and not knobs.runtime.interpret:
        return f"its kernels need a GPU, got {device}"
    if dtype not in KERNEL_DTYPES:
        return f"it computes in fp32, fp16 or bf16, got {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need compute capability 8.0 or more, got {torch.cuda.get_device_name(device)}"
    if device.type != "cuda" and dtype == torch.bfloat16:  # it multiplies their bits as integers
        return "Triton's interpreter knows no bf16"
    return None


def check_dtype(x: Tensor) -> None:
    """Errors: ValueError for activations that the kernels cannot multiply; sums are in float32."""
    if x.dtype not in KERNEL_DTYPES or (x.dtype == torch.bfloat16 and not x.is_cuda):
        raise ValueError(f"expected activations in fp32, fp16 or (on a GPU) bf16, got {x.dtype}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.promote_types(dtype, torch.float32)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a bias of this dtype, for dy [T, n] or [B, n, H, W]."""
    sums = dy.sum((0,) if dy.ndim == 2 else (0, 2, 3), dtype=wide(dy.dtype))
    return sums if sums.dtype == dtype else sums.to(dtype)


def conv_grad_input(dy: Tensor, weight: Tensor, layer: Layer, shape: Sequence[int]) -> Tensor:
    """dX of a dense convolution, for an x of this shape: a convolution transposed.

    The library's gradient decides by x whether it computes channels last.  A stand-in for x that takes no
    memory has no format, so that it would turn dy around, and back again; transposed, dy itself decides.
    """
    stride, padding, dilation = layer.pairs
    over = [
        (shape[i + 2] + 2 * padding[i] - dilation[i] * (layer.shape[i + 2] - 1) - 1) % stride[i]
        for i in (0, 1)
    ]
    with torch.autocast(
        dy.device.type, enabled=False
    ):  # which leaves the library's gradient alone too
        return F.conv_transpose2d(dy, weight, None, stride, padding, over, layer.groups, dilation)


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, layer: Layer, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's gradients of a dense convolution in x, weight and bias, where wanted.

    x says whether it computes channels last.  Of a weight that only gives its shape, a view of one element
    will do.
    """
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, *layer.pairs, False, [0, 0], layer.groups, wanted
    )
