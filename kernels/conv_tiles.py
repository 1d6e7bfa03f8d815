"""Pixels and taps of a convolution in registers: which input pixel an output pixel reads, and back.

Pixels are flat indices t = (b * H + h) * W + w.  A tap is (r, s), rows and columns of the filter.
Output pixel (oh, ow) reads input pixel oh * STRIDE_H + r * DIL_H - PAD_H, and columns likewise.
Stride, padding and dilation are constants of a kernel, so that divisions by them are cheap.
"""

from .dsl import tl, triton


@triton.jit
def pixel_at(t, H, W):
    """Batch, row and column of the flat pixels t (of any integer type and shape, kept)."""
    row = t // W
    return row // H, row % H, t % W


@triton.jit
def input_pixel(
    oh,
    ow,
    r,
    s,
    H,
    W,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
):
    """Row and column (of an H x W input) that output pixels read at a tap, and whether they exist."""
    h = oh * STRIDE_H + (r * DIL_H - PAD_H)
    w = ow * STRIDE_W + (s * DIL_W - PAD_W)
    return h, w, (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def output_pixel(
    h,
    w,
    r,
    s,
    OH,
    OW,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
):
    """Row and column (of an OH x OW output) that read input pixels at a tap, and whether they exist."""
    up = h + (PAD_H - r * DIL_H)
    left = w + (PAD_W - s * DIL_W)
    # A negative numerator is outside whichever way its quotient rounds, so it is tested itself.
    oh = up // STRIDE_H
    ow = left // STRIDE_W
    inside = (up >= 0) & (oh < OH) & (left >= 0) & (ow < OW)
    if STRIDE_H > 1:
        inside &= up % STRIDE_H == 0
    if STRIDE_W > 1:
        inside &= left % STRIDE_W == 0
    return oh, ow, inside


def output_size(size: int, taps: int, stride: int, pad: int, dilation: int) -> int:
    """Output pixels along one axis."""
    return (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
