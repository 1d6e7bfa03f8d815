"""Noise: the PyTorch reference, Triton's own generator and the kernel agree bit for bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecore.kernels import philox

CASES = [
    # seed, step, layer, n
    (0, 0, 0, 1),
    (1, 0, 0, 3),
    (12345, 7, 2, 63),
    (2**32 + 5, 2**31, 1, 1025),
    (2**63 - 1, 2**32 - 1, 300, 4096),
    (-1, 3, 0, 130),
]


def one(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


# Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox.philox_ref(*(torch.tensor([word]) for word in counter + key))
    assert [int(word) for word in words] == expected


def test_the_address_fills_counter_and_key() -> None:
    counter = [5, 9, 3, 7]
    index = 4 * (counter[1] << 32 | counter[0])
    key = [0xA4093822, 0x299F31D0]
    bits = philox.random_bits_ref(4, one(key[1] << 32 | key[0]), one(7), 3, offset=index)
    words = philox.philox_ref(*(torch.tensor([word]) for word in counter + key))
    assert bits.tolist() == [int(word) for word in words]


@given(seed=st.integers(-(2**63), 2**63 - 1), n=st.integers(1, 200), m=st.integers(0, 200))
def test_a_longer_draw_starts_with_the_shorter(seed: int, n: int, m: int) -> None:
    short = philox.uniform_ref(n, one(seed), one(1), 2)
    long = philox.uniform_ref(n + m, one(seed), one(1), 2)
    assert torch.equal(short, long[:n])
    assert torch.equal(long[n:], philox.uniform_ref(m, one(seed), one(1), 2, offset=n))


@pytest.mark.parametrize("exact", [False, True])
@given(address=st.tuples(st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 500)))
@settings(deadline=None, max_examples=30)
def test_every_part_of_the_address_matters(exact: bool, address: tuple[int, int, int]) -> None:
    def draw(seed: int, step: int, layer: int) -> Tensor:
        return philox.uniform_(torch.empty(16), one(seed), one(step), layer, exact=exact)

    seed, step, layer = address
    first = draw(*address)
    assert torch.equal(first, draw(*address))
    assert bool(((first >= 0) & (first < 1)).all())
    for other in ((seed + 1, step, layer), (seed, step + 1, layer), (seed, step, layer + 1)):
        assert not torch.equal(first, draw(*other))


@pytest.mark.parametrize("exact", [False, True])
def test_moments_and_independence_of_neighbours(exact: bool) -> None:
    n = 200_000
    u = philox.uniform_(torch.empty(n), one(5), one(0), 0, exact=exact).double()
    assert abs(u.mean().item() - 0.5) < 5 / (12 * n) ** 0.5
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)
    v = philox.uniform_(torch.empty(n), one(5), one(1), 0, exact=exact).double()
    for a, b in ((u[:-1], u[1:]), (u, v)):
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1].item()) < 5 / n**0.5


def test_global_generators_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    philox.uniform_(torch.empty(10), one(1), one(1), 1)
    assert (before == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    ("out", "seed", "message"),
    [
        (torch.empty(4, dtype=torch.float64), one(0), "contiguous float32"),
        (torch.empty(4, 4).T[1:], one(0), "contiguous float32"),
        (torch.empty(4), torch.tensor([0], dtype=torch.int32), "seed as one int64"),
        (torch.empty(4), torch.zeros(2, dtype=torch.int64), "seed as one int64"),
    ],
)
def test_bad_arguments(out: Tensor, seed: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        philox.uniform_(out, seed, one(0), 0)


def test_nothing_to_fill() -> None:
    assert philox.uniform_(torch.empty(0, 3), one(0), one(0), 0).shape == (0, 3)


# --- The kernel: interpreted where there is no GPU (see conftest) ----------------------------------


@triton.jit
def _triton_rand_kernel(rand_ptr, words_ptr, seed_ptr, BLOCK: tl.constexpr):
    counter = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    tl.store(rand_ptr + counter, tl.rand(seed, counter))
    a, b, c, d = tl.randint4x(seed, counter)
    tl.store(words_ptr + 4 * counter, a)
    tl.store(words_ptr + 4 * counter + 1, b)
    tl.store(words_ptr + 4 * counter + 2, c)
    tl.store(words_ptr + 4 * counter + 3, d)


def check_against_triton(seed: int, step: int, layer: int, n: int, device: str) -> None:
    key, time = one(seed).to(device), one(step).to(device)
    out = torch.full((n + 5,), float("nan"), device=device)  # poison: every element is written
    philox._launch_uniform(out[:n], key, time, layer)
    assert torch.equal(out[:n], philox.uniform_ref(n, key, time, layer))
    assert torch.isnan(out[n:]).all()  # and nothing beyond
    block = 64
    rand = torch.empty(block, device=device)
    words = torch.empty(4 * block, dtype=torch.int32, device=device)
    _triton_rand_kernel[(1,)](rand, words, key, BLOCK=block)
    zero = one(0).to(device)
    bits = philox.random_bits_ref(4 * block, key, zero, 0)
    assert torch.equal(words.long() & 0xFFFFFFFF, bits)
    assert torch.equal(rand, philox.uniform_ref(4 * block, key, zero, 0)[::4])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_bit_for_bit(case: tuple[int, int, int, int]) -> None:
    check_against_triton(*case, device=DEVICE)
