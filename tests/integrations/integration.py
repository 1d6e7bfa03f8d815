"""What the tests with other packages share: where they run, tickets by three searches, and what a ticket owes."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.scores import magnitude, snip

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_DISABLED="true")


def package(name: str) -> ModuleType:
    """The package, in `make test-integrations`; elsewhere the file is skipped and nothing is imported."""
    if "SPARSECORE_INTEGRATIONS" not in os.environ:
        pytest.skip("make test-integrations runs these", allow_module_level=True)
    pytest.importorskip(name)
    return importlib.import_module(name)


SEARCHES: dict[str, Any] = {
    "magnitude": sc.OneShot(magnitude),
    "snip": sc.OneShot(snip),
    "joint": sc.JointSearch(epochs=2),
}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.pattern.mask.clone() for name, layer in sc.sparse_layers(model).items()}


def ticketed(
    model: nn.Module,
    batches: Any,
    search: str = "magnitude",
    *,
    filter_fn: Any = sc.is_prunable,
    **loss: Any,
) -> dict[str, Tensor]:
    """Makes the model sparse, finds a ticket of half its weights and applies it; returns the masks."""
    sc.sparsify_(model, filter_fn)
    ticket = SEARCHES[search](model, batches, sparsity=0.5, **loss)
    assert abs(ticket.sparsity - 0.5) < 0.02
    ticket.apply_(model)
    masks = masks_of(model)
    check_zeros(model, masks)
    return masks


def check_zeros(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Pruned weights are exactly zero, what is kept is not, and the parameter itself says so."""
    kept = 0
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.detach()
        assert torch.all(weight[~mask] == 0), name
        kept += int(weight[mask].count_nonzero())
    assert kept


def moved(before: dict[str, Tensor], model: nn.Module) -> None:
    """Training has changed the weights."""
    now = model.state_dict()
    assert any(not torch.equal(now[key], value) for key, value in before.items())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def check_dense(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> nn.Module:
    """`densify_` gives a model of no sparse layers that computes the same; returns it."""
    model.eval()
    before = run(model)
    dense = sc.densify_(model)
    assert not sc.sparse_layers(dense)
    torch.testing.assert_close(run(dense), before)
    return dense


@torch.no_grad()
def check_state(
    model: nn.Module, make: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor], file: Path
) -> None:
    """A state_dict goes through torch.save into a sparse and, where strict=False, into a dense model."""
    model.eval()
    expected = run(model)
    torch.save(model.state_dict(), file)
    state = torch.load(file, weights_only=True)
    again = sc.sparsify_(make()).eval()
    again.load_state_dict(state)
    torch.testing.assert_close(run(again), expected)
    dense = make().eval()
    left = dense.load_state_dict(state, strict=False)
    assert not left.missing_keys
    assert all(key.endswith("pattern.mask") for key in left.unexpected_keys), left
    torch.testing.assert_close(run(dense), expected)
