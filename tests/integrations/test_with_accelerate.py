"""accelerate: its loop, its states."""

from pathlib import Path

import pytest
import torch
from helpers import convolutional, mlp, randn
from integration import check_dense, check_zeros, moved, package, snapshot, ticketed
from torch import nn
from torch.nn import functional as F

import sparsecore as sc

accelerate = package("accelerate")
state = package("accelerate.state")

X, Y = randn(32, 12), torch.arange(32) % 4


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), 8)


def steps(model: nn.Module, precision: str = "no", gather: int = 1) -> tuple:
    """Two epochs in its own loop; returns the accelerator and what it prepared."""
    state.AcceleratorState._reset_state(
        reset_partial_state=True
    )  # one precision a process otherwise
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=gather
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for _ in range(2):
        for x, y in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(F.cross_entropy(prepared(x), y))
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator, prepared


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("search", ["magnitude", "snip", "joint"])
@pytest.mark.parametrize("make", [mlp, convolutional])
def test_its_loop_keeps_pruned_weights_zero(make, search: str, precision: str) -> None:
    model = make()
    masks = ticketed(model, loader(), search)
    before = snapshot(model)
    accelerator, prepared = steps(model, precision)
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    moved(before, plain)
    check_zeros(plain, masks)
    check_dense(plain, lambda model: model(X))


def test_its_states_come_back(tmp_path: Path) -> None:
    model = mlp()
    masks = ticketed(model, loader())
    accelerator, prepared = steps(model, gather=2)
    accelerator.save_state(str(tmp_path / "state"))
    expected = snapshot(accelerator.unwrap_model(prepared))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(3)
    accelerator.load_state(str(tmp_path / "state"))
    for key, value in accelerator.unwrap_model(prepared).state_dict().items():
        torch.testing.assert_close(value, expected[key])
    check_zeros(model, masks)


def test_its_model_files_load_anywhere(tmp_path: Path) -> None:
    model = mlp()
    masks = ticketed(model, loader())
    accelerator, prepared = steps(model)
    accelerator.save_model(prepared, str(tmp_path))  # safetensors
    again = sc.sparsify_(mlp(seed=1))
    accelerate.load_checkpoint_in_model(again, str(tmp_path))
    torch.testing.assert_close(again(X), model(X))
    check_zeros(again, masks)
