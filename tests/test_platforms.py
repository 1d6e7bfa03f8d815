"""The package where there is no Triton: macOS, Windows, other processors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsecore import engine, kernels
from sparsecore.compare import file_stem
from sparsecore.kernels import device, formats


def test_all_but_kernels_works_without_triton() -> None:
    script = Path(__file__).with_name("without_triton.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "riton" not in done.stderr  # nothing is told at every import


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_format_that_needs_it_says_so(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MISSING", "needs Triton")
    layer, where = kernels.Layer((32, 32)), torch.device(place)
    assert kernels.obstacle("block:16x16", where, layer, torch.float32) == "it needs Triton"
    assert kernels.obstacle("state", where, layer, torch.float32) is None


def test_graphs_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert engine.check_engine("graph", gpu) == "graph"
    monkeypatch.setattr(kernels, "MISSING", "needs Triton")
    with pytest.raises(engine.EngineError, match="needs Triton; use engine=auto"):
        engine.check_engine("graph", gpu)
    assert engine.check_engine("auto", gpu) == "auto"


def test_nothing_is_launched_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "GPU", "cpu")
    x = torch.empty(1)
    assert device.on_gpu(x) and device.by_kernel(x)
    monkeypatch.setattr(device, "MISSING", "needs Triton")
    assert device.on_gpu(x) and not device.by_kernel(x)


def test_methods_with_fields_have_files_on_windows() -> None:
    assert file_stem("joint:pace=8:ramp=0.5", windows=True) == "joint;pace=8;ramp=0.5"
    assert file_stem("joint:pace=8", windows=False) == "joint:pace=8"
