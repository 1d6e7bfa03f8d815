"""Counter-based noise: (seed, step, layer, index) -> u, the same bits in PyTorch and in Triton.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").  The key is the
64-bit seed; index i is word i % 4 of the counter (i // 4 low, i // 4 high, layer, step).  At step 0
and layer 0 the four words are `tl.randint4x(seed, i // 4)`, and word 0 as a float is `tl.rand`.
u lies in [0, 1): exactly 0 can occur, 1 cannot.
"""

import numpy as np
import torch
from torch import Tensor

from .device import by_kernel, on_its_device
from .dsl import tl, triton

_A, _B = 0xD2511F53, 0xCD9E8D57  # round multipliers
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_LOW = 0xFFFFFFFF
_TO_UNIT = (
    4.6566127342e-10  # just below 2**-31, as in Triton, so that the largest word stays below 1
)


def philox_ref(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of four counter and two key words: unsigned 32-bit values held in int64."""
    for _ in range(10):
        # int64 products wrap modulo 2**64; the masked shift recovers the unsigned high word.
        a, b = c0 * _A, c2 * _B
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0, c1, c2, c3


def random_bits_ref(n: int, seed: Tensor, step: Tensor, layer: int, *, offset: int = 0) -> Tensor:
    """int64 [n] holding the unsigned 32-bit words of indices offset ... offset + n - 1.

    Args: seed, step: int64 tensors of one element, on the device of the result; never synchronised.
    """
    index = torch.arange(offset, offset + n, dtype=torch.int64, device=seed.device)
    counter = index >> 2
    words = philox_ref(
        counter & _LOW,
        (counter >> 32) & _LOW,
        torch.full_like(counter, layer & _LOW),
        (step & _LOW).expand_as(counter),
        seed & _LOW,
        (seed >> 32) & _LOW,
    )
    return torch.stack(words).gather(0, (index & 3)[None])[0]


def uniform_ref(n: int, seed: Tensor, step: Tensor, layer: int, *, offset: int = 0) -> Tensor:
    """float32 [n] in [0, 1): `random_bits_ref` through Triton's `uint_to_uniform_float`, bit for bit."""
    bits = random_bits_ref(n, seed, step, layer, offset=offset)
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.to(torch.float32) * _TO_UNIT


@triton.jit
def uniform_words(counter, seed, step, layer):
    """The four u of each int64 counter (of any shape): indices 4 counter ... 4 counter + 3."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    layers = tl.full(counter.shape, layer, tl.uint32)
    steps = tl.full(counter.shape, step, tl.int64).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, layers, steps)
    return (
        tl.uint_to_uniform_float(a),
        tl.uint_to_uniform_float(b),
        tl.uint_to_uniform_float(c),
        tl.uint_to_uniform_float(d),
    )


@triton.jit
def interleave4(a, b, c, d):
    """[BLOCK] each -> [4 BLOCK]: a0 b0 c0 d0 a1 ..."""
    # join puts the new axis last: (a, c), (b, d) pairs flatten to a b c d
    pairs = tl.join(tl.join(a, b), tl.join(c, d))  # [BLOCK, 2, 2]
    return tl.reshape(tl.permute(pairs, (0, 2, 1)), [4 * a.shape[0]])


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, step_ptr, layer, n, BLOCK: tl.constexpr):
    seed = tl.load(seed_ptr)
    step = tl.load(step_ptr)
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    a, b, c, d = uniform_words(counter, seed, step, layer)
    u = interleave4(a, b, c, d)
    index = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + index, u, mask=index < n)


@on_its_device
def _launch_uniform(out: Tensor, seed: Tensor, step: Tensor, layer: int) -> Tensor:
    n, block = out.numel(), 256
    grid = (triton.cdiv(n, 4 * block),)
    _uniform_kernel[grid](out, seed, step, layer, n, BLOCK=block, num_warps=4)
    return out


def uniform_(out: Tensor, seed: Tensor, step: Tensor, layer: int, *, exact: bool = False) -> Tensor:
    """Fills `out` with u ~ U[0, 1) and returns it; no global generator is touched.

    On a GPU this is the Philox above (without Triton in PyTorch).  On the CPU it is NumPy's SFC64
    seeded from (seed, step, layer): as reproducible, with other bits, since bit-equality costs 19 times as much for the
    266,200 weights of LeNet-300-100 and 180 times for 5 million (torch.rand with a reseeded
    generator costs 1.5 times as much, NumPy's Philox 1.7; two cores, medians of one run).
    `exact=True` asks for the Philox bits there too.

    Args:
        out: float32, contiguous, any shape.
        seed, step: int64, one element, on out's device.

    Errors: ValueError for anything else.
    """
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"uniform_: expected a contiguous float32 tensor, got {out.dtype} with strides "
            f"{out.stride()}; fill a torch.empty(shape) and convert"
        )
    for name, value in (("seed", seed), ("step", step)):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device != out.device:
            raise ValueError(
                f"uniform_: expected {name} as one int64 on {out.device}, got {value.dtype} "
                f"{tuple(value.shape)} on {value.device}; use torch.tensor([{name}])"
            )
    if out.numel() == 0:
        return out
    if by_kernel(out):
        return _launch_uniform(out, seed, step, layer)
    if exact or out.device.type != "cpu":
        return out.copy_(uniform_ref(out.numel(), seed, step, layer).view_as(out))
    draw = _draw_in_graph if torch.compiler.is_compiling() else _draw
    draw(out, seed, step, layer)
    return out


def _draw(out: Tensor, seed: Tensor, step: Tensor, layer: int) -> None:
    """NumPy's."""
    entropy = [int(seed) & (2**64 - 1), int(step) & (2**64 - 1), layer]
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))
    generator.random(out=out.detach().numpy(), dtype=np.float32)


_draw_in_graph = torch.library.custom_op("sparsecore::uniform", _draw, mutates_args=("out",))


def storage_noise(
    logits: Tensor, seed: Tensor, step: Tensor, layer: int, *, exact: bool = False
) -> Tensor:
    """u of each gate, fp32, of the logits' shape; the noise's index counts places in memory."""
    noise = torch.empty_like(logits, dtype=torch.float32)
    flat = noise.as_strided((noise.numel(),), (1,))
    uniform_(flat, seed, step, layer, exact=exact)
    return noise
