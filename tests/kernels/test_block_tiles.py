"""The tiles that a planner may try: the same products as by those that suit most, against float64."""

from dataclasses import replace

import pytest
import torch
from bounds import require
from helpers import DEVICE, rand
from test_block_products import CONV, DTYPES, LINEAR, NAMES, Case, expected, inputs, launched

from sparsecore import kernels
from sparsecore.kernels.blocks import values as block_values
from sparsecore.kernels.blocks.plan import BlockPlan
from sparsecore.kernels.blocks.problem import TILES, config_of
from sparsecore.kernels.device import SHARED, shared_memory, token_splits
from sparsecore.kernels.units import Unit

LONGER = [  # what several programs walk over, the last one less far
    Case((600, 48), (80, 48), (16, 16)),
    Case((333, 75), (50, 75), (16, 32), blocks=0.2),  # rows without blocks, and edge blocks
    Case((577, 130), (63, 130), (64, 128)),
    Case((300, 140), (150, 140), (128, 64), blocks=0.6),
    Case((513, 64), (64, 64), (32, 32), blocks=0),
    Case((5, 40, 9, 8), (20, 40, 3, 3), (16, 16), (1, 1, 1, 1, 1, 1)),
    Case((6, 70, 7, 9), (64, 35, 3, 2), (32, 16), (1, 2, 1, 1, 1, 1), groups=2),
    Case((40, 72, 3, 4), (96, 24, 1, 1), (32, 64), (1, 1, 0, 0, 1, 1), groups=3, blocks=0.8),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", range(1, TILES))
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, DTYPES[i % len(DTYPES)]) for i, case in enumerate(LONGER)]
    + ([(case, DTYPES[-1]) for case in LINEAR + CONV] if DEVICE == "cuda" else []),
    ids=str,
)
def test_every_tile_computes_the_same(case: Case, dtype: torch.dtype, tile: int) -> None:
    given = inputs(case, dtype)
    given = given._replace(plan=replace(given.plan, tile=tile))
    for name, value, right in zip(NAMES, launched(case, given), expected(case, given), strict=True):
        require(name, value, right)


def test_tiles_differ_and_fit() -> None:
    for side in (16, 32, 64, 128):
        for product in ("fwd", "dx"):
            found = [
                config_of(product, Unit(side, side), 2, 8192, 32, tile) for tile in range(TILES)
            ]
            assert len(set(found)) == TILES
            assert all(c.stages * 64 * (c.t + side) * 2 <= SHARED for c in found)
            wide = config_of(product, Unit(side, side), 2, 8192, 32, 1, shared=227 * 1024)
            assert (wide.t, wide.stages) == (256, 3)
    assert shared_memory(torch.device("cpu")) == SHARED


def test_tiles_travel_with_a_plan_and_share_its_tensors() -> None:
    names = ("block:16x32/2", "block:16x32", "block:16x32/1")
    plan = kernels.plan_of((rand(40, 50) < 0.1).to(DEVICE), names, dtype=torch.float16)
    again = kernels.Plan.of(*plan.flat())
    assert again.formats == names
    assert [BlockPlan.unflatten(s.tensors, s.numbers).tile for s in again.storages] == [2, 0, 1]
    for other in plan.storages[1:]:
        assert all(a is b for a, b in zip(plan.storages[0].tensors, other.tensors, strict=True))


def test_a_tile_of_the_gradient_is_a_finer_split(monkeypatch: pytest.MonkeyPatch) -> None:
    given, seen = inputs(LINEAR[0], torch.float32), []

    def splits(*of: object, finer: int) -> tuple[int, int]:
        seen.append(finer)
        return token_splits(*of, finer=finer)

    monkeypatch.setattr(block_values, "token_splits", splits)
    block_values._dvalues.cache_clear()
    for tile in range(TILES):
        launched(LINEAR[0], given._replace(plan=replace(given.plan, tile=tile)))
    assert seen == [0, 0, 1, 1, 2, 2]  # of the kept weights and of packed blocks


def test_a_finer_split_has_more_programs_on_as_many_tokens() -> None:
    for finer in range(TILES):
        splits, span = token_splits(8192, 102, 64, finer=finer)
        assert splits == 2 << finer and splits * span == 8192
    assert token_splits(100, 1, 64, finer=2) == (2, 64)
