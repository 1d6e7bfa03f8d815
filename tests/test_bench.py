"""The benchmark's own correctness gate, and the one thing about a step that is not a time: its temporaries."""

import pytest
import torch

from bench.cases import StepBench, StepCase
from bench.measure import large_allocations, times
from sparsecore.kernels import gate_bank

CASE = StepCase("lenet-300-100", (1, 28, 28), 32, 3)


def test_the_counter_counts() -> None:
    x = torch.ones(10)
    assert large_allocations(lambda: (x + 1).mul_(2).view(5, 2).relu_(), 10) == 1
    assert large_allocations(lambda: x.exp() + x.log(), 10) == 3
    assert large_allocations(lambda: x.exp() + x.log(), 11) == 0


def test_a_search_step_allocates_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """z, its slope; dR/dw_eff; sigma(s) and its slope, twice: seven of the weight's size.

    On a GPU it is dR/dw_eff alone: the kernels keep the rest in registers.
    """
    # An operator hides what it does inside.
    monkeypatch.setattr(gate_bank, "_sample", gate_bank.sample_gates_ref_)
    monkeypatch.setattr(gate_bank, "_backward", gate_bank.gates_backward_ref_)
    monkeypatch.setattr(gate_bank, "_step", gate_bank.balanced_step_ref_)
    bench = StepBench(CASE, torch.device("cpu"))
    bench.check()
    assert large_allocations(bench.search_step, 784 * 300) == 7
    bench.prepare_plain()
    bench.plain_step()
    assert large_allocations(bench.plain_step, 784 * 300) > 14
    bench.close()


def test_the_gate_fails_when_the_step_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsecore.kernels import reference

    bench = StepBench(CASE, torch.device("cpu"))
    monkeypatch.setattr(reference, "concrete_slope_ref", lambda z: z * (1 - z) * 1.01)
    with pytest.raises(AssertionError):
        bench.check()
    bench.close()


def test_times_are_spreads() -> None:
    spread = times({"a": lambda: None}, rounds=5)["a"]
    assert 0 <= spread.q20 <= spread.median <= spread.q80
