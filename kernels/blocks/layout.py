"""Activations as the block kernels read and write them: rows of unit stride, images channels last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import ROW_TILE, Problem


def empty(x: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    """Unset, of x's dtype and device; images channels last if asked."""
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def output_shape(x: Tensor, problem: Problem) -> tuple[int, ...]:
    b, oh, ow = problem.out
    return (problem.tokens, problem.n) if x.ndim == 2 else (b, problem.n, oh, ow)


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
    (_, h, w), (_, oh, ow) = problem.image, problem.out
    reach = h * abs(x.stride(2)) + w * abs(x.stride(3)) + x.shape[1]
    if max(reach, oh * ow * (problem.n + ROW_TILE), h * w * x.shape[1]) >= 2**31:
        raise ValueError(
            f"expected images below 2**31 elements, got {tuple(x.shape)} -> {problem.out}"
        )
    return x


def gradient_rows(dy: Tensor) -> Tensor:
    """dy of an output as contiguous [T, n]."""
    if dy.ndim == 4:
        return rows(dy.contiguous(memory_format=torch.channels_last))
    return dy.contiguous()
