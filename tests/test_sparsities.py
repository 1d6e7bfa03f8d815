"""Exact counts and exact masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecore.granularity import Block
from sparsecore.sparsities import kept_count, masks_from_scores, top_k


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [(10, 0.9, 1), (10, 0.0, 10), (291_376, 0.99262, 2150), (1000, 0.999, 1), (3, 0.9, 0)],
)
def test_counts_survive_binary_rounding(total: int, sparsity: float, kept: int) -> None:
    assert kept_count(total, sparsity) == kept


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), data=st.data())
def test_top_k_is_exact_and_ties_go_to_the_lower_index(values: list[int], data) -> None:
    k = data.draw(st.integers(0, len(values)))
    mask = top_k(torch.tensor(values, dtype=torch.float32), k)
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert mask.nonzero().flatten().tolist() == sorted(best)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    sparsity=st.floats(0, 0.99),
)
def test_global_masks_keep_exactly_k(shapes: list[tuple[int, int]], sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {str(i): torch.rand(s, generator=generator) for i, s in enumerate(shapes)}
    masks = masks_from_scores(scores, {n: s.shape for n, s in scores.items()}, sparsity)
    total = sum(s.numel() for s in scores.values())
    assert sum(int(m.sum()) for m in masks.values()) == kept_count(total, sparsity)


def test_blocks_never_exceed_k() -> None:
    granularity, shape = Block(2, 2), torch.Size((5, 5))
    scores = {"w": torch.rand(3, 3, generator=torch.Generator().manual_seed(1))}
    for sparsity in (0.0, 0.3, 0.6, 0.9):
        mask = masks_from_scores(scores, {"w": shape}, sparsity, granularity)["w"]
        assert kept_count(25, sparsity) - 4 < int(mask.sum()) <= kept_count(25, sparsity)


def test_errors() -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        top_k(torch.ones(2), 3)
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\)"):
        masks_from_scores({"w": torch.ones(4)}, {"w": torch.Size((2, 2))}, 0.5)
