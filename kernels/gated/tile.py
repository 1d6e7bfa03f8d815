"""A gated weight and one tile of it in registers: what the kernels of `fused` and `epilogue` share.

Letters: T tokens or pixels, N outputs, K inputs.  A gate draws its noise from (seed, step, layer, its
place in the logits' memory), the same in every kernel.  Constants: GATE is a `GateSpec`; QUAD says that
four neighbours in k share a Philox counter; FAST takes the GPU's approximate functions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dsl import tl, triton
from ..gates.formulas import sample_gate, uniform_at
from ..philox import uniform_words
from ..reference import GateSpec
from ..static import StaticCase

# --- In a kernel ------------------------------------------------------------------------------------


@triton.jit
def tile_noise(row, k0, w_k, seed, step, layer, BLOCK_K: tl.constexpr, QUAD: tl.constexpr):
    """u of BLOCK_K columns from k0 of rows that begin at `row` (int64 [BLOCK_N]) in the logits' memory."""
    if QUAD:  # columns side by side, in fours
        counter = ((row + k0) >> 2)[:, None] + tl.arange(0, BLOCK_K // 4)[None, :]
        a, b, c, d = uniform_words(counter, seed, step, layer)  # [BLOCK_N, BLOCK_K / 4] each
        # join puts the new axis last, and (a, c), (b, d) pairs flatten to a b c d
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [row.shape[0], BLOCK_K])
    k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
    return uniform_at(row[:, None] + (k * w_k)[None, :], seed, step, layer)


@triton.jit
def gated_tile(
    w_ptr, s_ptr, row, real, k0, K, w_k, seed, step, layer,
    BLOCK_K: tl.constexpr, QUAD: tl.constexpr, GATE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(offsets, whether they exist, weights, logits, z), float32, of BLOCK_K columns from k0 of the `real` among the
    rows that begin at `row`."""
    k = k0 + tl.arange(0, BLOCK_K)
    at = row[:, None] + (k.to(tl.int64) * w_k)[None, :]  # [BLOCK_N, BLOCK_K]
    exists = real[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + at, mask=exists, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + at, mask=exists, other=0.0)
    u = tile_noise(row, k0, w_k, seed, step, layer, BLOCK_K, QUAD)
    return at, exists, w, s, sample_gate(u, s, GATE[0], GATE[1], GATE[2], GATE[3], FAST)


# --- Around a launch --------------------------------------------------------------------------------


class Gated(NamedTuple):
    """A gated weight: what W * z is drawn from."""

    weight: Tensor  # [n, k] or [n, k, r, s]
    logits: Tensor
    gain: Tensor | None
    seed: Tensor
    step: Tensor
    layer: int
    gate: GateSpec

    @property
    def normal(self) -> "Gated":
        """Weight and logits dense and strided alike; a copy only if they are not."""
        weight, logits = self.weight, self.logits
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        if not (weight.is_contiguous() or weight.is_contiguous(memory_format=layout)):
            weight = weight.contiguous()
        if strides(logits) != strides(weight):
            logits = torch.empty_like(weight, dtype=logits.dtype).copy_(logits)
        return self._replace(weight=weight, logits=logits)

    def args(self, dtype: torch.dtype) -> dict[str, Any]:
        """What all kernels take for it, computing in `dtype`."""
        n, k = self.weight.shape[:2]
        return {
            "w_ptr": self.weight, "s_ptr": self.logits, "gain_ptr": self.gain,
            "seed_ptr": self.seed, "step_ptr": self.step, "layer": self.layer,
            "N": n, "K": k, "GATE": tuple(self.gate),
            # About 2 ulp of float32 are far below a half's rounding.
            "FAST": dtype != torch.float32,
        }  # fmt: skip


class Tiles(NamedTuple):
    """How a launch is cut up; `split` parts of the summed dimension, none of which may be empty."""

    t: int
    n: int
    k: int
    split: int = 1
    warps: int = 4
    stages: int = 3
    slices: int = 2


class Call(NamedTuple):
    """A launch as a value, so that it can also be compiled where there is no device."""

    kernel: Any
    grid: tuple[int, int, int]
    args: dict[str, Any]
    tiles: Tiles

    def __call__(self) -> None:
        options = {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages}
        self.kernel[self.grid](**self.args, **options)


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, 0 for axes of one element, whose stride means nothing."""
    return tuple(0 if m == 1 else s for m, s in zip(tensor.shape, tensor.stride(), strict=True))


# --- Compiling without a device ---------------------------------------------------------------------

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def static_call(call: Call, family: str, config: str, **options: Any) -> StaticCase:
    """The launch as the compiler sees it on aligned tensors."""
    signature, constants, attributes = {}, {}, {}
    for position, param in enumerate(call.kernel.params):
        value = call.args[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = _TYPES[value.dtype]
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
        if param.name != "layer" and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    tiles = call.tiles
    options |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    name = f"{family}_" + call.kernel.__name__.strip("_").removesuffix("_kernel")
    gates = tiles.n * tiles.k // (32 * tiles.warps)
    return StaticCase(name, config, call.kernel, signature, constants, attributes, options, gates)
