"""What `fused` moves: every weight-sized operand once forward and once backward, counted access by access."""

from collections import Counter

import pytest
import torch
import triton
from fused_cases import DTYPES, Case, Problem, problem
from helpers import DEVICE
from torch import Tensor

from sparsecore.kernels.gated.fused import backward_by_kernel, forward_by_kernel
from sparsecore.kernels.gated.fused_launch import TOKENS, _config

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts in Triton's interpreter")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Bytes that kernels have read and written, by address."""
    from triton.runtime.interpreter import InterpreterBuilder

    count: Counter[int] = Counter()

    def note(pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for address in pointers.data[mask.data].tolist():
            count[address] += size

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted_load(self, pointers, mask, *rest):
        note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    return count


def taken(moved: Counter[int], tensor: Tensor) -> int:
    """Bytes moved of a tensor, which are then no longer counted."""
    first = tensor.data_ptr()
    inside = [at for at in moved if first <= at < first + tensor.nbytes]
    return sum(moved.pop(at) for at in inside)


def arguments(p: Problem) -> tuple:
    g = p.g
    return g.weight, g.logits, g.seed, g.step, g.layer, tuple(g.gate)


@pytest.mark.parametrize("t", [1, 16, TOKENS])
@pytest.mark.parametrize(
    ("dtype", "weights", "forward", "backward"),
    [
        (torch.float32, torch.float32, 8, 12),
        (torch.float16, torch.float32, 8, 12),
        (torch.float16, torch.float16, 6, 10),
    ],
    ids=["fp32", "fp32 weights", "16-bit weights"],
)
def test_twenty_bytes_a_weight_or_sixteen(
    dtype: torch.dtype,
    weights: torch.dtype,
    forward: int,
    backward: int,
    t: int,
    moved: Counter[int],
) -> None:
    n, k = 288, 160
    p = problem(Case((t, k), (n, k)), dtype, weight_dtype=weights)
    weight, logits, *rest = arguments(p)

    y = forward_by_kernel(p.x, weight, logits, None, None, *rest)
    assert taken(moved, weight) + taken(moved, logits) == forward * n * k
    tiles = _config("fwd", t, n, k, dtype)
    # Beside it x, once for each block of outputs, from the cache, and y, or its parts in float32.
    assert taken(moved, p.x) == p.x.nbytes * triton.cdiv(n, tiles.n)
    parts = moved.total() - taken(moved, p.g.seed) - taken(moved, p.g.step)
    written = taken(moved, y)
    assert parts == (y.nbytes if tiles.split == 1 else 4 * tiles.split * t * n)
    assert (written == 0) == (tiles.split > 1)
    moved.clear()

    dx, ds, _, _ = backward_by_kernel(
        p.dy, p.x, weight, logits, None, *rest, [True, True, False, False]
    )
    sizes = taken(moved, weight) + taken(moved, logits) + taken(moved, ds)
    assert sizes == backward * n * k
    # Beside it x once a part, dy once for each block of inputs, and dx, or its parts in float32.
    tiles = _config("bwd", t, n, k, dtype)
    assert taken(moved, p.x) == p.x.nbytes * tiles.split
    assert taken(moved, p.dy) == p.dy.nbytes * triton.cdiv(k, tiles.k)
    parts = moved.total() - taken(moved, p.g.seed) - taken(moved, p.g.step)
    assert parts == (dx.nbytes if tiles.split == 1 else 4 * tiles.split * t * k)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_weights_that_train_cost_their_gradient_alone(
    dtype: torch.dtype, moved: Counter[int]
) -> None:
    n, k = 96, 64
    p = problem(Case((16, k), (n, k)), dtype)
    weight, logits, *rest = arguments(p)
    _, ds, dw, _ = backward_by_kernel(p.dy, p.x, weight, logits, p.g.gain, *rest, [True] * 4)
    assert sum(taken(moved, tensor) for tensor in (weight, logits, ds, dw)) == 16 * n * k


@pytest.mark.parametrize("t", [16, 64, TOKENS])
@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_parts_of_sums_are_few_bytes_beside_the_weights(kind: str, t: int) -> None:
    """Written and read once: a sixteenth of the 12 bytes a weight at 4096 x 4096 and 64 tokens, half at most."""
    split = _config(kind, t, 4096, 4096, torch.bfloat16).split
    assert 64 * split <= 264 < 64 * (split + 1)  # programs: 64 blocks and so many parts of each
    assert 8 * split * t * 4096 <= t / 128 * 4096**2
