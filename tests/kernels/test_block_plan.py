"""Plans of masks in blocks: the laws they keep, against lists made one by one."""

import pytest
import torch
from helpers import DEVICE, rand
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels.blocks.plan import SIDES, TILE, BlockPlan, Walk
from sparsecore.kernels.blocks.products import pack, stored_blocks, unpack

few = settings(max_examples=25, deadline=None, derandomize=True)
sides = st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES))
densities = st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0])


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    taps = draw(st.sampled_from([(), (1, 1), (3, 2)]))
    shape = (draw(st.integers(1, 150)), draw(st.integers(1, 150)), *taps)
    return rand(*shape, seed=draw(st.integers(0, 99))) < draw(densities)


def blocks_of(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Which blocks have a kept weight: [rows of blocks, columns, taps]."""
    h, w = block
    lanes = mask.flatten(2) if mask.ndim == 4 else mask[..., None]
    n, k, taps = lanes.shape
    lanes = F.pad(lanes, (0, 0, 0, -k % w, 0, -n % h))
    return lanes.view(-(-n // h), h, -(-k // w), w, taps).any(3).any(1)


def check_walk(walk: Walk, rows: Tensor) -> None:
    """rows: for each row of the walk, which of its entries are stored."""
    counts = rows.sum(1)
    assert torch.equal(walk.start.diff(), counts.int())
    for row, first, last in zip(rows, walk.start, walk.start[1:], strict=False):
        assert torch.equal(walk.order[first:last].long(), row.nonzero().flatten())
    assert torch.equal(counts[walk.rank.long()], counts.sort(descending=True).values)
    assert torch.equal(walk.rank.sort().values, torch.arange(len(rows), dtype=torch.int32))
    assert torch.equal(walk.slot.sort().values, torch.arange(len(walk.order), dtype=torch.int32))


@few
@given(masks(), sides)
def test_a_mask_comes_back(mask: Tensor, block: tuple[int, int]) -> None:
    plan = BlockPlan.from_mask(mask, block)
    assert torch.equal(plan.to_mask(), mask)
    assert torch.equal(plan.positions(), mask.flatten().nonzero().flatten())
    again = BlockPlan.unflatten(*plan.flatten())
    assert again.same(plan) and torch.equal(again.to_mask(), mask)
    assert all(t.dtype == torch.int32 for t in plan.flatten()[0])


@few
@given(masks(), sides)
def test_lists_hold_the_stored_blocks_both_ways(mask: Tensor, block: tuple[int, int]) -> None:
    plan, stored = BlockPlan.from_mask(mask, block), blocks_of(mask, block)
    check_walk(plan.rows, stored.flatten(1))
    check_walk(plan.columns, stored.transpose(0, 1).flatten(1))
    assert torch.equal(plan.units, stored.flatten().nonzero().flatten())
    assert torch.equal(plan.rows.slot, torch.arange(plan.blocks, dtype=torch.int32))
    # The transposed walk finds each block where it is stored.
    unit = plan.units[plan.columns.slot.long()]
    nb, kb, tap = torch.unravel_index(unit, stored.shape)
    assert torch.equal(plan.columns.order.long(), nb * plan.taps + tap)
    column = torch.arange(len(plan.columns.rank)).repeat_interleave(plan.columns.start.diff())
    assert torch.equal(kb, column)
    # Tiles of the gradient cover every block once, and none crosses a row.
    parts, covered = max(1, TILE // block[1]), []
    for row, first in plan.tiles.tolist():
        assert plan.rows.start[row] <= first < plan.rows.start[row + 1]
        covered += range(first, min(first + parts, int(plan.rows.start[row + 1])))
    assert covered == list(range(plan.blocks))


@few
@given(masks(), sides)
def test_values_go_into_blocks_and_come_back(mask: Tensor, block: tuple[int, int]) -> None:
    plan = BlockPlan.from_mask(mask, block)
    values = torch.arange(1.0, plan.nnz + 1)
    weight = torch.zeros(mask.shape).masked_scatter(mask, values)
    packed = pack(values, plan, torch.float32)
    assert packed.shape == (plan.blocks, *block)
    assert torch.equal(unpack(packed, plan), weight)
    assert torch.equal(stored_blocks(weight, plan), packed)
    assert torch.equal(packed.flatten()[plan.slot], values)
    assert torch.equal(plan.source[plan.slot], torch.arange(plan.nnz, dtype=torch.int32))
    assert (plan.source >= 0).sum() == plan.nnz == mask.sum()


@few
@given(masks().filter(lambda mask: mask.ndim == 2), sides)
def test_transposing_commutes_with_planning(mask: Tensor, block: tuple[int, int]) -> None:
    plan = BlockPlan.from_mask(mask, block)
    assert plan.T.same(BlockPlan.from_mask(mask.T, block[::-1]))
    assert plan.T.T.same(plan)
    assert torch.equal(plan.T.to_mask(), mask.T)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 60), densities, st.integers(0, 99))
def test_groups_have_columns_of_their_own(
    groups: int, rows: int, k: int, density: float, seed: int
) -> None:
    mask = rand(groups * rows * 16, k, 2, 1, seed=seed) < density
    plan = BlockPlan.from_mask(mask, (16, 16), groups)
    assert torch.equal(plan.to_mask(), mask)
    stored = blocks_of(mask, (16, 16))
    apart = torch.zeros(groups, *stored.shape, dtype=torch.bool)
    for group, part in enumerate(apart):
        part[group * rows : (group + 1) * rows] = stored[group * rows : (group + 1) * rows]
    check_walk(plan.columns, apart.transpose(1, 2).flatten(2).flatten(0, 1))


def test_fill() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, (16, 16))
    assert (plan.blocks, plan.nnz, plan.fill) == (0, 0, 1.0)
    mask[0, :32] = True
    plan = BlockPlan.from_mask(mask, (16, 16))
    assert (plan.blocks, plan.fill) == (2, 1 / 16)
    plan = BlockPlan.from_mask(~mask[:20, :20], (16, 16))  # edge blocks are stored whole
    assert (plan.blocks, plan.fill) == (4, 380 / 1024)


@pytest.mark.gpu
def test_a_plan_is_made_where_the_mask_is() -> None:
    mask = rand(70, 50, seed=1) < 0.02
    plan = BlockPlan.from_mask(mask.to(DEVICE), (16, 32))
    assert plan.source.device.type == DEVICE
    assert plan.to("cpu").same(BlockPlan.from_mask(mask, (16, 32)))


@pytest.mark.parametrize(
    ("mask", "block", "groups", "message"),
    [
        (torch.zeros(4, 4), (16, 16), 1, "expected a boolean mask"),
        (torch.zeros(4, 4, 3, dtype=torch.bool), (16, 16), 1, "expected a boolean mask"),
        (torch.zeros(0, 4, dtype=torch.bool), (16, 16), 1, "of some weights"),
        (torch.zeros(4, 4, dtype=torch.bool), (8, 16), 1, "sides among"),
        (torch.zeros(4, 4, dtype=torch.bool), (16,), 1, "sides among"),
        (torch.zeros(48, 4, 1, 1, dtype=torch.bool), (32, 16), 2, "whole rows of blocks"),
        (torch.zeros(48, 4, 1, 1, dtype=torch.bool), (16, 16), 5, "whole rows of blocks"),
        (torch.zeros(48, 4, dtype=torch.bool), (16, 16), 3, "expected one group"),
    ],
)
def test_bad_masks(mask: Tensor, block: tuple[int, int], groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockPlan.from_mask(mask, block, groups)


def test_only_matrices_transpose() -> None:
    plan = BlockPlan.from_mask(torch.ones(16, 16, 1, 1, dtype=torch.bool), (16, 16))
    with pytest.raises(ValueError, match="plan of a matrix"):
        _ = plan.T
