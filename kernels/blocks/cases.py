"""Block kernels at real sizes, to be compiled and inspected without a GPU."""

from typing import Any

from ..static import StaticCase, product_case
from ..units import Unit
from . import gemm, values, weights
from .problem import TILES, Geometry, Problem


def _static_case(kernel: Any, what: str, options: tuple[dict, dict]) -> StaticCase:
    """bf16 activations and scaled or packed weights; float32 weights (channels last), values, bias and sums."""
    constants, compiler = options
    if not constants.get("PACKED", True):  # these come with a plan
        absent = {"rank_ptr", "slot_ptr"} & set(kernel.arg_names)
        constants = constants | dict.fromkeys(absent)
    if "WK" in kernel.arg_names:
        constants = constants | {"WK": 1}  # as a launch specialises a stride of 1
    single = ["bias_ptr", "gain_ptr", "z_ptr", "partial_ptr", "dw_ptr", "values_ptr", "dvalues_ptr"]
    single += ["w_ptr"] if kernel.__module__ == weights.__name__ else []
    lists = ("order", "count", "start", "rank", "slot", "source", "tile")
    types = {**{f"{name}_ptr": "*i32" for name in lists}, **dict.fromkeys(single, "*fp32")}
    # A launch sees that these are multiples of 16; sides of images and lengths of lists need not be.
    even = {"T", "P", "N", "K", "DN", "XB", "XH", "XW"}
    even |= {"WN", "WTAP", "width", "split_stride", "size"}
    return product_case(kernel, "block", what, (constants, compiler), types, even)


def static_cases() -> list[StaticCase]:
    """Gated and decided, 8192 x 4096 x 4096 and 3x3 of 256 channels at 32 x 28 x 28, in all blocks."""
    cases = []
    pixels = (32, 28, 28)
    for side in (16, 32, 64, 128, 0):
        unit = Unit(side, side) if side else Unit(1, 0)
        linear = Problem(4096, 4096, unit, Geometry(), (1, 1, 8192), (1, 1, 8192))
        conv = Problem(256, 256, unit, Geometry((3, 3), padding=(1, 1)), pixels, pixels)
        for layer, problem in (("linear", linear), ("conv 3x3", conv)):
            what = f"{layer} {f'block {side}' if side else 'channel'}"
            cases += _gated_cases(what, problem)
            if side:
                packed = problem._replace(packed=True)
                cases += _packed_cases(f"{what} packed", packed)
                for tile in range(1, TILES) if layer == "linear" or side == 64 else ():
                    cases += _tile_cases(f"{what} packed, tile {tile}", packed._replace(tile=tile))
    return cases


def _gated_cases(what: str, problem: Problem) -> list[StaticCase]:
    """Forward, dX, the gates' gradient and the scaling."""
    fwd = gemm.fwd_options(problem, 2, "ieee")
    dx = gemm.dx_options(problem, 2, "ieee")
    dgate = weights.dgate_options(problem, 2, "ieee", True)
    return [
        _static_case(gemm._fwd_kernel, what, fwd),
        _static_case(gemm._dx_kernel, what, dx),
        _static_case(weights._dgate_kernel, what, dgate),
        _static_case(weights._scale_kernel, what, weights.scale_options(problem)),
    ]


def _tile_cases(what: str, problem: Problem) -> list[StaticCase]:
    """What a planner may try, with the shared memory that compute capability 8.0 has."""
    fwd = gemm.fwd_options(problem, 2, "ieee", 163 * 1024)
    dx = gemm.dx_options(problem, 2, "ieee", 163 * 1024)
    return [
        _static_case(gemm._fwd_kernel, what, (fwd[0] | {"gain_ptr": None}, fwd[1])),
        _static_case(gemm._dx_kernel, what, (dx[0] | {"gain_ptr": None}, dx[1])),
    ]


def _packed_cases(what: str, problem: Problem) -> list[StaticCase]:
    """Forward, dX and the gradient of the kept weights."""
    fwd = gemm.fwd_options(problem, 2, "ieee")
    fwd[0]["gain_ptr"] = None
    dx = gemm.dx_options(problem, 2, "ieee")
    dx[0]["gain_ptr"] = None
    dvalues = values.dvalues_options(problem, 2, "ieee")
    return [
        _static_case(gemm._fwd_kernel, what, fwd),
        _static_case(gemm._dx_kernel, what, dx),
        _static_case(values._dvalues_kernel, what, dvalues),
    ]
