"""Exact counts and exact masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecore.granularity import NM, Block
from sparsecore.sparsities import (
    DISTRIBUTIONS,
    check_possible,
    erk_densities,
    kept_count,
    layer_counts,
    masks_from_scores,
    top_k,
    uniform_densities,
)


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


def shapes_of(*shapes: tuple[int, ...]) -> dict[str, torch.Size]:
    return {str(i): torch.Size(shape) for i, shape in enumerate(shapes)}


def test_erk_by_hand() -> None:
    # 100 * 10 and 20 * 100 weights, 100 + 10 and 20 + 100: a tenth of 3000 as 110 to 120.
    found = erk_densities(shapes_of((100, 10), (20, 100)), 0.1)
    assert found == pytest.approx({"0": 300 * 110 / 230 / 1000, "1": 300 * 120 / 230 / 2000})
    # Kernels count: 64 * 32 * 3 * 3 = 18432 weights by 64 + 32 + 3 + 3 = 102, 640 by 74.
    found = erk_densities(shapes_of((64, 32, 3, 3), (10, 64)), 0.02)
    kept = 0.02 * (18432 + 640)
    assert found == pytest.approx({"0": kept * 102 / 176 / 18432, "1": kept * 74 / 176 / 640})


def test_erk_caps_layer_after_layer_by_hand() -> None:
    # Half of 10 + 100 + 10000 weights by 7, 20, 200: 5055 / 227 * 7 is more than the 10 there are, so
    # the first is dense; (5055 - 10) / 220 * 20 is more than 100, so the second is; 4945 are left.
    found = erk_densities(shapes_of((2, 5), (10, 10), (100, 100)), 0.5)
    assert found == pytest.approx({"0": 1.0, "1": 1.0, "2": 0.4945})
    # The second only exceeds 1 once the first is dense: 340 of 400 + 20 by 40 + 9, then by 9 alone.
    shapes = shapes_of((4, 5), (20, 20))
    scale = 0.1 * 420 / 49
    assert scale * 9 < 20  # nothing is capped yet
    assert erk_densities(shapes, 0.1)["0"] == pytest.approx(scale * 9 / 20)
    assert erk_densities(shapes, 0.3) == pytest.approx({"0": 1.0, "1": (0.3 * 420 - 20) / 400})


@pytest.mark.parametrize("distribution", [uniform_densities, erk_densities])
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
    ),
    sparsity=st.floats(0, 0.999),
)
def test_densities_add_up_and_counts_are_exact(distribution, shapes, sparsity: float) -> None:
    sizes = shapes_of(*shapes)
    total = sum(shape.numel() for shape in sizes.values())
    densities = distribution(sizes, 1 - sparsity)
    assert all(0 < p <= 1 for p in densities.values())
    kept = sum(densities[n] * shape.numel() for n, shape in sizes.items())
    assert kept == pytest.approx((1 - sparsity) * total)
    counts = layer_counts(sizes, sparsity, densities)
    assert sum(counts.values()) == kept_count(total, sparsity)
    for name, shape in sizes.items():
        assert 0 <= counts[name] <= shape.numel()
        assert abs(counts[name] - densities[name] * shape.numel()) < 1 + 1e-6


@given(
    shapes=st.lists(
        st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
    ),
    density=st.floats(0.01, 1),
)
def test_uncapped_erk_layers_are_in_proportion(shapes, density: float) -> None:
    sizes = shapes_of(*shapes)
    found = erk_densities(sizes, density)
    ratio = {n: found[n] * shape.numel() / sum(shape) for n, shape in sizes.items()}
    free = [ratio[n] for n in sizes if found[n] < 1]
    assert free == pytest.approx(
        [max(ratio.values())] * len(free)
    )  # and capped ones would exceed 1


def test_largest_remainders_by_hand() -> None:
    shapes = shapes_of((1, 10), (1, 7), (1, 3))  # quotas 3, 2.1, 0.9: 6 kept
    assert layer_counts(shapes, 0.7, uniform_densities(shapes, 0.3)) == {"0": 3, "1": 2, "2": 1}
    shapes = shapes_of((1, 5), (1, 5), (1, 5), (1, 5))  # 2.5 each of 10: the earlier layers gain
    halves = dict.fromkeys(shapes, 0.5)
    assert layer_counts(shapes, 0.5, halves) == {"0": 3, "1": 3, "2": 2, "3": 2}
    shapes = shapes_of((1, 4), (1, 4))  # a full layer takes no more
    assert layer_counts(shapes, 3 / 8, {"0": 1.0, "1": 0.0}) == {"0": 4, "1": 1}


def test_layers_are_ranked_by_themselves() -> None:
    scores = {"0": torch.tensor([[1.0, 2, 3, 4]]), "1": torch.tensor([[50.0, 70, 60, 80]])}
    shapes = {n: s.shape for n, s in scores.items()}
    masks = masks_from_scores(scores, shapes, 0.5, densities={"0": 0.75, "1": 0.25})
    assert masks["0"].tolist() == [[False, True, True, True]]
    assert masks["1"].tolist() == [[False, False, False, True]]
    masks = masks_from_scores(scores, shapes, 0.5)
    assert [int(m.sum()) for m in masks.values()] == [0, 4]


def test_blocks_by_layer_never_exceed_their_share() -> None:
    shapes = shapes_of((5, 5), (6, 4), (1, 1))
    granularity = Block(2, 2)
    scores = {
        n: torch.rand(granularity.units(s), generator=torch.Generator().manual_seed(1))
        for n, s in shapes.items()
    }
    for sparsity in (0.0, 0.3, 0.6, 0.9):
        densities = uniform_densities(shapes, 1 - sparsity)
        counts = layer_counts(shapes, sparsity, densities)
        masks = masks_from_scores(scores, shapes, sparsity, granularity, densities)
        for name, mask in masks.items():
            assert max(counts[name] - 4, -1) < int(mask.sum()) <= counts[name]


def test_errors_of_densities() -> None:
    shapes = shapes_of((4, 4), (4, 8))
    for density in (0.0, 1.1, float("nan")):
        for distribution in (uniform_densities, erk_densities):
            with pytest.raises(ValueError, match="expected 0 < density <= 1"):
                distribution(shapes, density)
    for densities in ({"0": 0.5}, {"0": 0.5, "1": 0.5, "2": 0.5}, {"0": -0.5, "1": 1.0}):
        with pytest.raises(ValueError, match=r"expected one in \[0, 1\] for each of 0, 1"):
            layer_counts(shapes, 0.5, densities)
    for densities in ({"0": 0.5, "1": 0.6}, {"0": 0.3, "1": 0.5}):
        with pytest.raises(ValueError, match="expected 24 weights kept in all"):
            layer_counts(shapes, 0.5, densities)
    with pytest.raises(ValueError, match="2:4 allows at most 8 of 16 weights of 0"):
        check_possible(shapes, 0.5, NM(2, 4), {"0": 1.0, "1": 0.25})
    check_possible(shapes, 0.5, NM(2, 4))
    assert DISTRIBUTIONS["global"] is None


def test_errors() -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        top_k(torch.ones(2), 3)
    with pytest.raises(ValueError, match=r"expected shape \(2, 2\)"):
        masks_from_scores({"w": torch.ones(4)}, {"w": torch.Size((2, 2))}, 0.5)
