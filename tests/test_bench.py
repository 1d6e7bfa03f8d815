"""The benchmark's own correctness gate, and the one thing about a step that is not a time: its temporaries."""

import pytest
import torch

from bench.cases import StepBench, StepCase
from bench.measure import large_allocations, times

CASE = StepCase("lenet-300-100", (1, 28, 28), 32, 3)


def test_the_counter_counts() -> None:
    x = torch.ones(10)
    assert large_allocations(lambda: (x + 1).mul_(2).view(5, 2).relu_(), 10) == 1
    assert large_allocations(lambda: x.exp() + x.log(), 10) == 3
    assert large_allocations(lambda: x.exp() + x.log(), 11) == 0


def test_a_search_step_allocates_one_tensor_per_quantity_of_the_formula() -> None:
    """u, z, w * z, dR/d(w * z), g_R, sigma(s), g_S: seven of the weight's size, as the README says."""
    bench = StepBench(CASE, torch.device("cpu"))
    bench.check()
    bench.search_step()  # Adam's moments are allocated once
    assert large_allocations(bench.search_step, 784 * 300) == 7
    bench.prepare_plain()
    bench.plain_step()
    assert large_allocations(bench.plain_step, 784 * 300) > 14
    bench.close()


def test_the_gate_fails_when_the_step_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecore import kernels

    bench = StepBench(CASE, torch.device("cpu"))
    monkeypatch.setattr(kernels, "concrete_slope_ref", lambda z: z * (1 - z) * 1.01)
    with pytest.raises(AssertionError):
        bench.check()
    bench.close()


def test_times_are_spreads() -> None:
    spread = times({"a": lambda: None}, rounds=5)["a"]
    assert 0 <= spread.q20 <= spread.median <= spread.q80
