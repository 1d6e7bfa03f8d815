"""Panel kernels at a real size, to be compiled and inspected without a GPU."""

from typing import Any

from ..static import StaticCase, product_case
from . import gemm
from .gemm import Shape


def _static_case(kernel: Any, what: str, options: tuple[dict, dict]) -> StaticCase:
    """bf16 activations and packed weights; float32 values, bias and sums."""
    single = ("bias", "values", "dvalues", "part")
    types = {f"{name}_ptr": "*fp32" for name in single}
    if kernel is gemm._outer_kernel:
        types["out_ptr"] = "*fp32"
    lists = ("column", "start", "rank", "order", "tile", "source")
    types |= {f"{name}_ptr": "*i32" for name in lists}
    even = {"T", "N", "XK", "DN", "DXK", "span", "split_stride", "size"}  # multiples of 16
    return product_case(kernel, "panel", what, options, types, even)


def static_cases() -> list[StaticCase]:
    """Forward, dX and the gradient of the kept weights at 8192 x 4096 x 4096."""
    cases = []
    for height in (16, 32, 64, 128):
        shape, what = Shape(8192, 4096, 4096, height, 2), f"linear panel {height}"
        for kernel, options in (
            (gemm._fwd_kernel, gemm.fwd_options),
            (gemm._outer_kernel, gemm.outer_options),
            (gemm._dvalues_kernel, gemm.dvalues_options),
        ):
            cases.append(_static_case(kernel, what, options(shape, "ieee")))
    gather = ({"BLOCK": gemm.GATHER_BLOCK}, {"num_warps": 4})
    return [*cases, _static_case(gemm._gather_kernel, "panel", gather)]
