"""One layer in blocks on one batch as the kernels see it, and the tiles they take."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..conv_tiles import output_size
from ..device import PROGRAMS, SHARED
from ..dsl import triton
from ..units import Unit


class Geometry(NamedTuple):
    """Filter and axes of a convolution, (rows, columns) each; a linear layer has the defaults."""

    taps: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def pointwise(self) -> bool:
        """Whether output pixels are input pixels."""
        return self == Geometry(dilation=self.dilation)

    def constants(self) -> dict[str, Any]:
        (_, taps_w), stride, pad, dilation = self
        return {
            "CONV": not self.pointwise,
            "TAPS": self.taps[0] * taps_w,
            "TAPS_W": taps_w,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": pad[0],
            "PAD_W": pad[1],
            "DIL_H": dilation[0],
            "DIL_W": dilation[1],
        }


class Problem(NamedTuple):
    """One layer on one batch as the kernels see it.  `image` and `out` are (B, H, W), of a linear layer (1, 1, T).

    packed: the weight is stored by blocks and the lists are those of a plan; `k` is then of one group.
    tile: which of the tiles that `config_of` knows.
    """

    n: int
    k: int
    unit: Unit
    geometry: Geometry
    image: tuple[int, int, int]
    out: tuple[int, int, int]
    groups: int = 1
    packed: bool = False
    tile: int = 0

    @property
    def tokens(self) -> int:
        return self.out[0] * self.out[1] * self.out[2]

    @property
    def pixels(self) -> int:
        return self.image[0] * self.image[1] * self.image[2]

    @property
    def rows(self) -> bool:
        return self.unit.w == 0


def problem_of(
    x: Sequence[int], weight: Sequence[int], unit: Unit, axes: Sequence[int], groups: int = 1,
    packed: bool = False, tile: int = 0,
) -> Problem:  # fmt: skip
    """Of the shapes of x and weight.  axes: stride, padding and dilation, two each; none for a linear layer."""
    n, k, *taps = weight
    if not taps:
        pixels = (1, 1, x[0])
        return Problem(n, k, unit, Geometry(), pixels, pixels, groups, packed, tile)
    geometry = Geometry(
        (taps[0], taps[1]), (axes[0], axes[1]), (axes[2], axes[3]), (axes[4], axes[5])
    )
    b, _, h, w = x
    oh, ow = (
        output_size(size, *of) for size, of in zip((h, w), zip(*geometry, strict=True), strict=True)
    )
    return Problem(n, k, unit, geometry, (b, h, w), (b, oh, ow), groups, packed, tile)


class Config(NamedTuple):
    """Tile sizes over tokens, outputs and inputs; whether the weight is the left operand; warps; stages;
    tiles of tokens that a program walks over.
    """

    t: int
    n: int
    k: int
    swap: bool
    warps: int
    stages: int
    walk: int = 1

    def onto(self, constants: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """(constants with the tile's sides, compiler options)."""
        sides = {"BLOCK_T": self.t, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return {**constants, **sides}, {"num_warps": self.warps, "num_stages": self.stages}


ROW_TILE = 128  # rows of the list of open channels that a tile takes
TILES = 3  # that `config_of` knows
_WIDE, _WALKING = 1, 2
_WALK = 4


def config_of(
    product: str,
    unit: Unit,
    size: int,
    tokens: int,
    tiles: int,
    tile: int = 0,
    shared: int = SHARED,
) -> Config:
    """The tiles of a product ("fwd", "dx" or "dgate") with elements of `size` bytes, without a search.

    A planner may try others of "fwd" and "dx": tile 1 has twice the tokens, so that weights and lists are read
    half as often, in `shared` bytes; in tile 2 a program walks over several tiles of tokens and loads the next
    while it stores one, for rows of few blocks.  Of a packed gradient they split the tokens further.

    `tiles` is the number of tiles across outputs (fwd) or inputs (dx).  Blocks of 64 become the left
    operand, since tensor cores take 64 rows on the left and up to 256 columns on the right; narrower
    ones would leave rows empty, and tiles of 128 are as good either way.
    """
    deep = 64 if size == 2 else 32  # a 128-byte line of shared memory
    if product == "dgate":
        n, k = (unit.h, max(unit.w, 64)) if unit.w else (ROW_TILE, 64)
        t = deep
        warps = 8 if n * k >= 128 * 128 or unit.w == 0 else 4  # an epilogue over rows holds more
        step = t * (n + k) * size
        return Config(t, n, k, True, warps, max(2, min(4, SHARED // step)))
    side = (unit.h if product == "fwd" else unit.w) if unit.w else ROW_TILE
    t = 128 if size == 2 else 64
    # Fewer tokens a tile where the tiles would not fill two waves of a large GPU.
    while tile == 0 and t > 64 and triton.cdiv(tokens, t) * tiles < PROGRAMS:
        t //= 2
    warps = 8 if side == 128 else 4
    most = 3 if side == 64 else 4  # with three, three programs find room on an H100
    if tile == _WIDE:
        t, most, warps = 2 * t, 3, 8 if side >= 64 else 4
    elif tile == _WALKING:
        most = 3
    step = deep * (t + side) * size
    stages = max(2, min(most, (shared if tile == _WIDE else SHARED) // step))
    swap = side == 64
    sides = (side, deep) if product == "fwd" else (deep, side)
    return Config(t, *sides, swap, warps, stages, _WALK if tile == _WALKING else 1)


def shape_constants(problem: Problem, k: int) -> dict[str, Any]:
    """What every product is told about units; `k` is the inputs of a tile, which stand for a unit of rows."""
    rows = problem.rows
    return {
        "ROWS": rows,
        "UNIT_N": problem.unit.h,
        "UNIT_K": k if rows else problem.unit.w,
        **problem.geometry.constants(),
    }


def whole(size: int, unit: int, step: int) -> bool:
    """Whether a step of a list never crosses the edge of the matrix nor the end of the list."""
    return size % max(unit, step) == 0 and unit >= step


def entries_per_row(problem: Problem, k: int) -> int:
    """Entries in a row of the lists, with k inputs each."""
    return triton.cdiv(problem.k, k) * problem.geometry.constants()["TAPS"]


def image_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, row and column of x [T, K] or [B, K, H, W], whose channels have stride 1."""
    return (0, 0, x.stride(0)) if x.ndim == 2 else (x.stride(0), x.stride(2), x.stride(3))


def weight_strides(problem: Problem, weight: Tensor) -> tuple[int, int, int]:
    """Strides of outputs, inputs and taps of a contiguous or channels-last weight."""
    taps = problem.geometry.constants()["TAPS"]
    # A dimension of size 1 may have any stride, so they are not read from the tensor.
    return (taps * problem.k, *((taps, 1) if weight.is_contiguous() else (1, problem.k)))
