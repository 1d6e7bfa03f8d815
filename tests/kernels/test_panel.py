"""Products with column vectors in panels: plans, and the kernels against float64."""

from typing import NamedTuple

import pytest
import torch
from helpers import DEVICE, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsecore.kernels.moves import launch_gather, packed_by_kernel
from sparsecore.kernels.panels import gemm as panel_gemm
from sparsecore.kernels.panels.plan import HEIGHTS, PanelPlan, tile_of
from sparsecore.kernels.panels.products import (
    feature_major,
    panel_forward,
    panel_grad_input,
    panel_grad_values,
    panel_pack,
)

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
NAMES = ("y", "dx", "dvalues")

# --- Plans ---------------------------------------------------------------------------------------------

few = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 150)), draw(st.integers(1, 150)))
    density = draw(st.sampled_from([0.0, 0.002, 0.05, 0.5, 1.0]))
    return rand(*shape, seed=draw(st.integers(0, 99))) < density


@few
@given(masks(), st.sampled_from(HEIGHTS))
def test_a_mask_comes_back(mask: Tensor, height: int) -> None:
    plan = PanelPlan.from_mask(mask, height)
    assert torch.equal(plan.to_mask(), mask)
    assert torch.equal(plan.positions(), mask.flatten().nonzero().flatten())
    again = PanelPlan.unflatten(*plan.flatten())
    assert again.same(plan) and torch.equal(again.to_mask(), mask)
    assert all(t.dtype == torch.int32 for t in plan.flatten()[0])


@few
@given(masks(), st.sampled_from(HEIGHTS))
def test_lists_hold_the_columns_of_panels(mask: Tensor, height: int) -> None:
    plan = PanelPlan.from_mask(mask, height)
    n, k = mask.shape
    stored = F.pad(mask, (0, 0, 0, -n % height)).view(-1, height, k).any(1)
    panel, column = stored.nonzero(as_tuple=True)
    assert torch.equal(plan.columns.long(), column)
    counts = stored.sum(1)
    assert torch.equal(plan.start.diff(), counts.int())
    assert torch.equal(counts[plan.rank.long()], counts.sort(descending=True).values)
    # By column, and in it by panel.
    across, panels = stored.T.nonzero(as_tuple=True)
    vectors = plan.transposed.long()
    assert torch.equal(column[vectors], across) and torch.equal(panel[vectors], panels)
    assert torch.equal(plan.column_start.diff(), stored.sum(0).int())
    # Tiles cover every vector once, and none crosses a panel.
    covered = []
    for row, first in plan.tiles.tolist():
        assert plan.start[row] <= first < plan.start[row + 1]
        covered += range(first, min(first + tile_of(height), int(plan.start[row + 1])))
    assert covered == list(range(plan.vectors))


@few
@given(masks(), st.sampled_from(HEIGHTS))
def test_values_go_into_panels_and_come_back(mask: Tensor, height: int) -> None:
    plan = PanelPlan.from_mask(mask, height)
    values = torch.arange(1.0, plan.nnz + 1)
    packed = panel_pack(values, plan, torch.float32)
    assert packed.shape == (plan.vectors, height)
    assert torch.equal(packed.flatten()[plan.slot], values)
    assert torch.equal(plan.source[plan.slot], torch.arange(plan.nnz, dtype=torch.int32))
    assert (packed != 0).sum() == (plan.source >= 0).sum() == plan.nnz == mask.sum()


def test_fill() -> None:
    mask = torch.zeros(64, 50, dtype=torch.bool)
    plan = PanelPlan.from_mask(mask, 16)
    assert (plan.vectors, plan.nnz, plan.fill) == (0, 0, 1.0)
    mask[0, :8] = True
    plan = PanelPlan.from_mask(mask, 16)
    assert (plan.vectors, plan.fill) == (8, 1 / 16)


@pytest.mark.gpu
def test_a_plan_is_made_where_the_mask_is() -> None:
    mask = rand(70, 50, seed=1) < 0.02
    plan = PanelPlan.from_mask(mask.to(DEVICE), 32)
    assert plan.source.device.type == DEVICE
    assert plan.to("cpu").same(PanelPlan.from_mask(mask, 32))


@pytest.mark.parametrize(
    ("mask", "height", "message"),
    [
        (torch.zeros(4, 4), 16, "expected a boolean mask"),
        (torch.zeros(4, 4, 1, 1, dtype=torch.bool), 16, "expected a boolean mask"),
        (torch.zeros(4, 0, dtype=torch.bool), 16, "expected a boolean mask"),
        (torch.zeros(4, 4, dtype=torch.bool), 8, "expected panels of"),
    ],
)
def test_bad_masks(mask: Tensor, height: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PanelPlan.from_mask(mask, height)


# --- Products ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    tokens: int
    n: int
    k: int
    height: int
    vectors: float = 0.3  # share of vectors with a kept weight
    kept: float = 0.8  # share of the weights in them


class Inputs(NamedTuple):
    plan: PanelPlan
    mask: Tensor
    x: Tensor
    values: Tensor
    bias: Tensor
    dy: Tensor


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    vectors = rand(-(-case.n // case.height), case.k, seed=2) < case.vectors
    whole = vectors.repeat_interleave(case.height, 0)[: case.n]
    mask = whole & (rand(case.n, case.k, seed=3) < case.kept)
    plan = PanelPlan.from_mask(mask, case.height)
    tensors = [randn(case.tokens, case.k, seed=1), randn(plan.nnz, seed=4) / 4]
    tensors += [randn(case.n, seed=5), randn(case.tokens, case.n, seed=6)]
    return Inputs(plan.to(DEVICE), mask.to(DEVICE), *(t.to(DEVICE, dtype) for t in tensors))


def composed(given: Inputs, dtype: torch.dtype) -> list[Tensor]:
    x, values, bias, dy = (t.to(dtype) for t in given[2:])
    weight = torch.zeros(given.mask.shape, dtype=dtype, device=DEVICE)
    weight.masked_scatter_(given.mask, values)
    return [F.linear(x, weight, bias), dy @ weight, (dy.T @ x)[given.mask]]


def launched(given: Inputs) -> list[Tensor]:
    plan, _, x, values, bias, dy = given
    packed = packed_by_kernel(values, plan.source, (plan.vectors, plan.height), x.dtype)
    return [
        panel_forward(x, packed, bias, plan),
        panel_grad_input(dy, packed, plan),
        panel_grad_values(dy, x, plan, x.dtype),
    ]


def check(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Each result's error against float64 is at most twice PyTorch's own in the same dtype."""
    given = inputs(case, dtype)
    exact, plain, ours = composed(given, torch.float64), composed(given, dtype), launched(given)
    for name, value, torchs, truth in zip(NAMES, ours, plain, exact, strict=True):
        assert value.shape == truth.shape and value.dtype == dtype, name
        assert torch.isfinite(value).all(), name
        if name != "dvalues":
            assert value.stride(0) == 1 and value.stride(1) == case.tokens, name
        if value.numel():
            error = (value.double() - truth).abs().max().item()
            torchs_error = (torchs.double() - truth).abs().max().item()
            limit = 2 * torchs_error + 1e-6 * truth.abs().max().item()
            assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"
    return ours


CASES = [
    Case(70, 48, 90, 16),
    Case(65, 70, 75, 32),
    Case(130, 70, 200, 64),
    Case(33, 130, 400, 128),
    Case(1, 63, 150, 16),
    Case(33, 63, 63, 32, vectors=1, kept=1),
    Case(5, 1, 1, 16, vectors=1, kept=1),
    Case(63, 128, 256, 64, kept=0.02),  # mostly padding
]
if DEVICE == "cuda":  # real sizes
    CASES += [
        Case(8192, 4096, 4096, 64, vectors=0.1, kept=1),
        Case(12608, 3072, 768, 32, vectors=0.1),
        Case(2048, 1000, 1024, 128, vectors=0.1),
    ]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_nothing_stored_and_everything(case: Case) -> None:
    given = inputs(case._replace(vectors=0), torch.float32)
    y, dx, dvalues = check(case._replace(vectors=0), torch.float32)
    assert torch.equal(y, given.bias.expand(y.shape))
    assert not dx.any() and not len(dvalues)
    check(case._replace(vectors=1, kept=1), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_empty_panels_and_columns_between_full_ones() -> None:
    case = Case(20, 96, 80, 16)
    mask = torch.ones(case.n, case.k, dtype=torch.bool, device=DEVICE)
    mask[16:48] = mask[80:] = False
    mask[:, 32:64] = False
    plan = PanelPlan.from_mask(mask, case.height)
    given = inputs(case, torch.float32)
    given = given._replace(plan=plan, mask=mask, values=randn(plan.nnz, seed=4).to(DEVICE))
    for value, truth in zip(launched(given), composed(given, torch.float64), strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-4)
    y, dx, _ = launched(given)
    assert torch.equal(y[:, 16:48], given.bias[16:48].expand(20, 32))
    assert not dx[:, 32:64].any()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("height", HEIGHTS)
def test_what_no_vector_reads_is_not_read(height: int) -> None:
    """NaN in an input without weights reaches neither y nor the other weights' gradients."""
    given = inputs(Case(33, 70, 90, height), torch.float32)
    dead = given.mask.clone()
    dead[:, :7] = dead[:, 80:] = False
    plan = PanelPlan.from_mask(dead, height)
    given = given._replace(plan=plan, mask=dead, values=randn(plan.nnz, seed=4).to(DEVICE))
    x = given.x.clone()
    x[:, :7] = x[:, 80:] = torch.nan
    for a, b in zip(launched(given._replace(x=x)), launched(given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_same_bits_every_time_and_in_any_layout(case: Case) -> None:
    """What stands around x and dy is NaN: whatever is read beyond their edges shows."""
    given = inputs(case, torch.float32)
    first = launched(given)
    x, dy = (F.pad(t.T, (16, 16, 3, 3), value=torch.nan) for t in (given.x, given.dy))
    layouts = [(feature_major(given.x), feature_major(given.dy)), (given.x, given.dy)]
    layouts.append((x[3:-3, 16:-16].T, dy[3:-3, 16:-16].T))
    layouts.append((F.pad(given.x, (1, 1), value=torch.nan)[:, 1:-1], given.dy))
    for x, dy in layouts:
        for a, b in zip(launched(given._replace(x=x, dy=dy)), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_turns_and_splits_over_tokens_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(Case(300, 70, 75, 32), torch.float32)
    plan, _, x, *_, dy = given
    _, dx, dvalues = launched(given)
    monkeypatch.setattr(panel_gemm, "_WORKSPACE", 64 * plan.vectors)  # 64 tokens a turn
    assert torch.equal(launched(given)[1], dx)
    for splits in (2, 3):
        out = torch.empty_like(dvalues)
        panel_gemm.launch_dvalues(out, feature_major(x), feature_major(dy), plan, splits=splits)
        torch.testing.assert_close(out, dvalues, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_nothing_beyond_the_results_is_written() -> None:
    case = CASES[1]
    plan, _, x, values, _, dy = inputs(case, torch.float32)
    x, dy = feature_major(x), feature_major(dy)
    packed = panel_pack(values, plan, torch.float32)

    def poison(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, device=DEVICE)

    y, dx = poison(case.n + 3, case.tokens), poison(case.k + 3, case.tokens)
    dvalues, again = poison(plan.nnz + 3), poison(plan.vectors + 3, case.height)
    panel_gemm.launch_fwd(y[: case.n].T, x, packed, None, plan)
    panel_gemm.launch_dx(dx[: case.k].T, dy, packed, plan)
    panel_gemm.launch_dvalues(dvalues[: plan.nnz], x, dy, plan)
    # Padding has no weight, not the one in front of the first.
    fenced = F.pad(values, (1, 1), value=torch.nan)[1:-1]
    launch_gather(fenced, plan.source, again[: plan.vectors])
    sizes = (case.n, case.k, plan.nnz, plan.vectors)
    for out, rows in zip((y, dx, dvalues, again), sizes, strict=True):
        assert torch.isfinite(out[:rows]).all()
        assert torch.isnan(out[rows:]).all()


@pytest.mark.gpu
def test_rows_far_apart() -> None:
    """Offsets pass 2**31; memory that is not touched is not taken."""
    given = inputs(Case(20, 48, 40, 16), torch.float16)
    space = torch.empty(48 * 2**26, dtype=torch.float16, device=DEVICE)
    far = {
        name: space.as_strided(t.shape, (1, 2**26)).copy_(t)
        for name, t in (("x", given.x), ("dy", given.dy))
    }
    want = launched(given)
    packed = panel_pack(given.values, given.plan, torch.float16)
    far["x"].copy_(given.x)
    assert torch.equal(panel_forward(far["x"], packed, given.bias, given.plan), want[0])
    assert torch.equal(panel_grad_values(given.dy, far["x"], given.plan, torch.float16), want[2])
    far["dy"].copy_(given.dy)
    assert torch.equal(panel_grad_input(far["dy"], packed, given.plan), want[1])
    assert torch.equal(panel_grad_values(far["dy"], given.x, given.plan, torch.float16), want[2])


@pytest.mark.gpu
def test_no_tokens_and_an_expanded_gradient() -> None:
    given = inputs(CASES[1], torch.float32)
    y, dx, dvalues = launched(given._replace(x=given.x[:0], dy=given.dy[:0]))
    assert y.shape == (0, 70) and dx.shape == (0, 75) and not dvalues.any()
    for ones in (torch.ones(1, 1), torch.ones(1, 70)):
        dy = ones.to(DEVICE).expand(given.dy.shape)
        for a, b in zip(
            launched(given._replace(dy=dy)),
            launched(given._replace(dy=dy.contiguous())),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5)}, "expected x"),
        ({"x": torch.zeros(4, 40, 1)}, "expected x"),
        ({"dy": torch.zeros(4, 5)}, "expected dy"),
        ({"dy": torch.zeros(3, 32)}, "as many tokens"),
        ({"dy": torch.zeros(4, 32).half()}, "one dtype"),
        ({"x": torch.zeros(4, 40).double()}, "expected activations in fp32"),
        ({"packed": torch.zeros(1, 16)}, "expected packed"),
        ({"packed": torch.zeros(80, 16).double()}, "expected packed"),
        ({"bias": torch.zeros(5)}, "expected bias"),
        ({"values": torch.zeros(5)}, "expected values"),
        ({"plan": "meta"}, "expected a plan on cpu"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    plan = PanelPlan.from_mask(torch.ones(32, 40, dtype=torch.bool), 16)
    good = {
        "x": torch.zeros(4, 40),
        "dy": torch.zeros(4, 32),
        "packed": torch.zeros(80, 16),
        "bias": torch.zeros(32),
        "values": torch.zeros(plan.nnz),
        "plan": plan,
    }
    bad = good | ({"plan": plan.to("meta")} if "plan" in change else change)
    with pytest.raises(ValueError, match=message):
        panel_pack(bad["values"], bad["plan"], torch.float32)
        panel_forward(bad["x"], bad["packed"], bad["bias"], bad["plan"])
        panel_grad_values(bad["dy"], bad["x"], bad["plan"], torch.float32)
        panel_grad_input(bad["dy"], bad["packed"], bad["plan"])
