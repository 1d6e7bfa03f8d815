"""Kernels are launched again as they were, and only as often as a step needs."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEVICE, rand, randn
from test_static import compiling
from torch import Tensor

from sparsecore import kernels
from sparsecore.kernels.sparse import layers as sparse_layers
from sparsecore.kernels.sparse import state


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    result = compiling(str(Path(__file__).with_name("launches.py")))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_launch_is_tritons_of_the_same_arguments(compiled: dict[str, Any]) -> None:
    kinds = compiled["kinds"]
    assert all(same for same, _ in kinds.values())
    assert {name for name, (_, around) in kinds.items() if not around} == {"hooked"}


def test_values_are_packed_once_a_step(compiled: dict[str, Any]) -> None:
    products = ["_dvalues_kernel", "_dx_kernel", "_fwd_kernel"]
    assert compiled["plans"]["block:64x64"] == [*products, "_gather_kernel"]
    assert compiled["plans"]["state"] == ["_gather_kernel", "_scatter_kernel"]


def test_a_compiler_sees_the_kernels_and_no_operator(compiled: dict[str, Any]) -> None:
    """Hence there is no Python for a layer when a compiled step runs; one graph serves open batch sizes."""
    for name, graphs in compiled["graphs"].items():
        assert [sorted(graph) for graph in graphs] == [
            ["_fwd_kernel", "_gather_kernel"],
            ["_dvalues_kernel", "_dx_kernel"],
        ], name


def test_a_compiler_knows_which_kernels_an_operator_has(compiled: dict[str, Any]) -> None:
    """By them PyTorch's cache of compiled graphs tells whether what it holds is still right."""
    assert compiled["known"] == ["_dvalues_kernel", "_dx_kernel", "_fwd_kernel", "_gather_kernel"]


# --- What is packed once is never stale -------------------------------------------------------------

FORMATS = ["state", "csr", "compact", "block:16x16"]


@pytest.mark.parametrize("format", FORMATS)
def test_values_that_change_before_the_backward_are_refused(format: str) -> None:
    device = DEVICE if ":" in format else "cpu"
    mask = (rand(30, 40) < 0.3).to(device)
    plan = kernels.plan_of(mask, format)
    values, x = (t.to(device).requires_grad_() for t in (randn(plan.nnz), randn(3, 40)))
    y = kernels.sparse_layer(x, values, None, plan)
    with torch.no_grad():
        values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("between", ["a forward", "an operator", "a backward"])
@pytest.mark.parametrize("format", FORMATS)
def test_dx_has_the_values_of_its_own_forward(format: str, between: str) -> None:
    device = DEVICE if ":" in format else "cpu"
    mask = (rand(30, 40) < 0.3).to(device)
    plan = kernels.plan_of(mask, format)
    values, others = (randn(plan.nnz, seed=s).to(device).requires_grad_() for s in (1, 2))
    x = randn(3, 40).to(device).requires_grad_()
    y = kernels.sparse_layer(x, values, None, plan)
    if between == "an operator":  # as a compiled model has it
        sparse_layers._forward(x.detach(), others.detach(), None, *plan.flat())
    else:
        other = kernels.sparse_layer(x, others, None, plan)
        if between == "a backward":
            other.sum().backward()
            x.grad = None
    y.sum().backward()
    weight = torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, values.detach())
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ weight)


def fills_of_a_step(
    monkeypatch: pytest.MonkeyPatch, plan: kernels.Plan, between: Callable[[Tensor], Any] = id
) -> int:
    """How often forward and backward write the dense weight of `state`, whose gradient must be right."""
    filled, scatter = [], state._scatter_
    monkeypatch.setattr(state, "_scatter_", lambda *args: (filled.append(1), scatter(*args)))
    values, x = (t.to(DEVICE).requires_grad_() for t in (randn(plan.nnz), randn(3, 40)))
    y = kernels.sparse_layer(x, values, None, plan)
    between(values.detach())
    y.sum().backward()
    monkeypatch.setattr(state, "_scatter_", scatter)
    weight = torch.zeros(30, 40, device=DEVICE).masked_scatter(half(), values.detach())
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ weight)
    return len(filled)


def half() -> Tensor:
    return (rand(30, 40) < 0.5).to(DEVICE)


def test_a_dense_weight_is_filled_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x = kernels.plan_of(half(), "state"), randn(3, 40).to(DEVICE)
    assert fills_of_a_step(monkeypatch, plan) == 1

    def other(values: Tensor) -> None:
        kernels.sparse_layer(x, 3 * values, None, plan)

    assert fills_of_a_step(monkeypatch, plan, other) == 3
    assert fills_of_a_step(monkeypatch, plan) == 1


def test_parts_of_steps_in_graphs_fill_it_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays write the weight, and no counter of the host's sees them."""
    monkeypatch.setattr(state, "on_gpu", lambda tensor: True)
    capturing = partial(monkeypatch.setattr, torch.cuda, "is_current_stream_capturing")
    plan = kernels.plan_of(half(), "state")
    capturing(lambda: False)
    assert fills_of_a_step(monkeypatch, plan) == 1
    capturing(lambda: True)
    with kernels.one_graph():
        assert fills_of_a_step(monkeypatch, plan) == 1
    assert fills_of_a_step(monkeypatch, plan) == 2
    capturing(lambda: False)
    assert fills_of_a_step(monkeypatch, plan) == 2  # replays may come in between
    fresh = kernels.plan_of(half(), "state")
    with kernels.one_graph():
        assert fills_of_a_step(monkeypatch, fresh, lambda _: capturing(lambda: True)) == 2


def test_two_graphs_do_not_share_what_one_of_them_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan, graphs = kernels.plan_of(half(), "state"), ExitStack()
    with graphs:
        graphs.enter_context(kernels.one_graph())
        following = partial(graphs.enter_context, kernels.one_graph())
        assert fills_of_a_step(monkeypatch, plan, lambda _: following()) == 2
