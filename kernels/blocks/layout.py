"""Activations as the block kernels read and write them: rows of unit stride, images channels last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launching import remembered
from .problem import ROW_TILE, Problem


def empty(x: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    """Unset, of x's dtype and device; images channels last if asked."""
    if not last or len(shape) != 4:
        return x.new_empty(shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def output_shape(x: Sequence[int], problem: Problem) -> tuple[int, ...]:
    """Of x's."""
    b, oh, ow = problem.out
    return (problem.tokens, problem.n) if len(x) == 2 else (b, problem.n, oh, ow)


def rows(x: Tensor) -> Tensor:
    """x [T, c] or channels-last [B, c, H, W] as [T, c], without a copy."""
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).flatten(0, 2)


def readable(x: Tensor, problem: Problem) -> Tensor:
    """x as the kernels read it: unit channel stride, [T, k] where output pixels are input pixels."""
    if x.ndim == 2:
        return x if x.stride(1) == 1 else x.contiguous()
    if problem.geometry.pointwise:
        return rows(x.contiguous(memory_format=torch.channels_last))
    x = x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
    check_reach(problem, x.stride(2), x.stride(3))
    return x


@remembered
def check_reach(problem: Problem, row: int, column: int) -> None:
    """Errors: ValueError unless int32 holds the kernels' offsets in an image, whose rows and columns
    stand this far apart.  A part for the pixel and one for the tap each leave the image by its padding.
    """
    if problem.geometry.pointwise:
        return
    taps, _, padding, dilation = problem.geometry
    (_, *image), (_, oh, ow) = problem.image, problem.out
    h, w = (
        size + 2 * pad + far * (count - 1)
        for size, pad, far, count in zip(image, padding, dilation, taps, strict=True)
    )
    read = h * row + w * column + problem.k + ROW_TILE
    written = max(oh * ow, h * ow + w) * (problem.n + ROW_TILE)
    if max(read, written) >= 2**31:
        raise ValueError(
            f"expected images, padding included, below 2**31 elements, got {problem.image} of strides "
            f"{(row, column)} -> {problem.out} of {problem.n} channels"
        )


def contiguous(dy: Tensor) -> Tensor:
    """dy of an output as contiguous rows: [T, n], or images channels last."""
    return dy.contiguous() if dy.ndim == 2 else dy.contiguous(memory_format=torch.channels_last)


def gradient_rows(dy: Tensor) -> Tensor:
    """dy of an output as contiguous [T, n]."""
    return rows(contiguous(dy))
