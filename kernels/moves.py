"""Values to places and back: what every format of kept weights does between the parameter and its products.

Both kernels move 16 bytes at a time over the index, which is read once; an end that is no multiple of 16
elements is left to the first program.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .device import by_kernel
from .dsl import tl, triton
from .formats import check_device
from .launching import Launch, remembered
from .static import StaticCase, static_case

_BLOCK = 1024

# --- Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _scatter_part(dense_ptr, values_ptr, index_ptr, at, mask):
    place = tl.load(index_ptr + at, mask=mask, other=0)
    value = tl.load(values_ptr + at, mask=mask, other=0.0)
    tl.store(dense_ptr + place, value.to(dense_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scatter_kernel(dense_ptr, values_ptr, index_ptr, EVEN, NNZ, BLOCK: tl.constexpr):
    """dense [index] = values, in dense's dtype.  EVEN: NNZ without what is over a multiple of 16."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    _scatter_part(dense_ptr, values_ptr, index_ptr, at, at < EVEN)
    if (tl.program_id(0) == 0) & (EVEN < NNZ):
        rest = EVEN + tl.arange(0, 16).to(tl.int64)
        _scatter_part(dense_ptr, values_ptr, index_ptr, rest, rest < NNZ)


@triton.jit
def _gather_part(out_ptr, dense_ptr, index_ptr, at, mask):
    place = tl.load(index_ptr + at, mask=mask, other=-1)
    value = tl.load(dense_ptr + place, mask=place >= 0, other=0.0)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_kernel(out_ptr, dense_ptr, index_ptr, EVEN, NNZ, BLOCK: tl.constexpr):
    """out = dense [index], in out's dtype; 0 where the index is negative."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    _gather_part(out_ptr, dense_ptr, index_ptr, at, at < EVEN)
    if (tl.program_id(0) == 0) & (EVEN < NNZ):
        rest = EVEN + tl.arange(0, 16).to(tl.int64)
        _gather_part(out_ptr, dense_ptr, index_ptr, rest, rest < NNZ)


# --- Launchers --------------------------------------------------------------------------------------


def _launch(kernel: Any, nnz: int) -> Launch:
    grid, numbers = (triton.cdiv(nnz, _BLOCK),), (nnz // 16 * 16, nnz)
    return Launch(kernel, grid, numbers, {"BLOCK": _BLOCK}, {"num_warps": 4})


@remembered
def _scatter(nnz: int) -> Launch:
    return _launch(_scatter_kernel, nnz)


@remembered
def _gather(nnz: int) -> Launch:
    return _launch(_gather_kernel, nnz)


def launch_scatter(dense: Tensor, values: Tensor, index: Tensor) -> None:
    """dense at each index = its value; dense is taken as flat, an index has each place once."""
    _scatter(index.numel())(dense, values, index)


def launch_gather(dense: Tensor, index: Tensor, out: Tensor) -> None:
    """out = dense at each index, 0 where that is negative, in out's dtype; all are taken as flat."""
    _gather(index.numel())(out, dense, index)


def pack_values(
    values: Tensor, source: Tensor, slot: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Values [nnz] in packed storage of this shape and dtype; 0 where there is none.

    source: for each packed element the index of its value, -1 where there is none.  slot: its inverse.

    Errors: ValueError for another number of values or another device.
    """
    if values.shape != slot.shape:
        raise ValueError(
            f"expected values [{len(slot)}] of the plan's kept weights, got {tuple(values.shape)}"
        )
    check_device(values, source)
    if by_kernel(values):
        if torch.is_grad_enabled():
            return Packed.apply(values, source, slot, shape, dtype)
        return packed_by_kernel(values, source, shape, dtype)
    out = values.new_zeros(len(source), dtype=dtype)
    out[slot] = values.to(dtype)
    return out.view(shape)


class Packed(torch.autograd.Function):
    """`packed_by_kernel`, differentiable as packing on the CPU is."""

    @staticmethod
    def forward(
        ctx, values: Tensor, source: Tensor, slot: Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        ctx.slot, ctx.dtype = slot, values.dtype
        return packed_by_kernel(values, source, shape, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.reshape(-1)[ctx.slot].to(ctx.dtype), None, None, None, None


def packed_by_kernel(
    values: Tensor, source: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`pack_values` without checks, by the kernel."""
    out = values.new_empty(shape, dtype=dtype)
    if out.numel():
        launch_gather(values.contiguous(), source, out)
    return out


def static_cases() -> list[StaticCase]:
    """Between a bf16 weight, dense or packed, and float32 values."""
    types = {"index_ptr": "*i32", "EVEN": "i32", "NNZ": "i32"}
    weight, values = {"dense_ptr": "*bf16"}, {"dense_ptr": "*fp32"}
    cases = [
        static_case(_scatter_kernel, "values to weight", types | weight | {"values_ptr": "*fp32"}, {"BLOCK": _BLOCK}),
        static_case(_gather_kernel, "weight to values", types | weight | {"out_ptr": "*fp32"}, {"BLOCK": _BLOCK}),
        static_case(_gather_kernel, "values to packed", types | values | {"out_ptr": "*bf16"}, {"BLOCK": _BLOCK}),
    ]  # fmt: skip
    even = {(3,): [["tt.divisibility", 16]]}
    return [case._replace(attributes=case.attributes | even) for case in cases]
