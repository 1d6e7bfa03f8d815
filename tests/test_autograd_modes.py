"""Under no_grad and inference_mode: what is made, changed or found trains afterwards, or is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Blobs, equal, mlp, rand, randn, seeded
from test_api_misuse import batches, tensors_of, ticket
from test_threads import SEARCHES, dropping
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.gates import Concrete
from sparsecore.patterns import Gated, Masked
from sparsecore.training import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
BLOBS = Blobs(count=128)
X, Y = BLOBS.x, BLOBS.y


def assert_trains(model: nn.Module, x: Tensor | None = None) -> None:
    """Nothing of a model was made in inference mode, and it learns, copies and saves."""
    x = randn(8, 12) if x is None else x
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert not t.is_inference(), name
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    with torch.random.fork_rng(devices=[]):  # of dropout
        model(x).sum().backward()
        optimizer.step()
        other = copy.deepcopy(model)
        other.load_state_dict(model.state_dict())
        other(x).sum().backward()


modes = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])


@modes
@pytest.mark.parametrize("plan", ["mask", "state", "csr"])
def test_what_is_applied_and_planned_in_a_mode_trains(
    mode: Any, plan: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))
    found, model = ticket(), sc.sparsify_(mlp())
    others = {name: ~mask for name, mask in found.masks.items()}
    for change in (
        lambda: found.apply_(model, plan=plan),
        lambda: sc.remask_(model, others),
        lambda: sc.plan_(model, "mask"),
        lambda: sc.plan_(model, plan),
        lambda: sc.plan_(model, "mask"),
        lambda: sc.densify_(model),
        lambda: sc.sparsify_(model),
        lambda: found.shuffled(0).apply_(model),
    ):
        with mode():
            change()
        assert_trains(model)


@modes
def test_an_example_made_in_a_mode(
    mode: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))
    model, found = sc.sparsify_(mlp()), ticket()
    with mode():
        found.apply_(model, randn(8, 12), plan="auto")
    assert_trains(model)


@modes
def test_layers_made_and_changed_in_a_mode_train(mode: Any) -> None:
    model: Any = sc.sparsify_(mlp())
    masks = [rand(*layer.weight_shape) < 0.5 for layer in sc.sparse_layers(model).values()]
    for change in ("set_mask_", "plan_", "remask_", "unplan_"):
        with mode():
            for layer, mask in zip(sc.sparse_layers(model).values(), masks, strict=True):
                getattr(layer, change)(*([mask] if "mask_" in change else []))
        assert_trains(model)
    with mode():
        small = sc.compact(model, randn(2, 12))
        dense, model[0].pattern = model[0].to_dense(), Masked(masks[0].clone())
        model[2].pattern = Gated(model[2].weight_shape, Concrete(), density=0.5)  # pyright: ignore
    assert_trains(small.model)
    assert_trains(model)
    assert not dense.weight.is_inference()
    whole = seeded(lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)))
    with mode():
        sc.sparsify_(whole)
    assert not any(t.is_inference() for t in (*whole.parameters(), *whole.buffers()))


@modes
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_in_a_mode_finds_the_same_ticket(mode: Any, name: str) -> None:
    search, model = SEARCHES[name], dropping()
    with mode():
        made = [(x.clone(), y.clone()) for x, y in batches()]
        found = search(model, made, sparsity=0.5)
    assert found.hash == search(dropping(), batches(), sparsity=0.5).hash
    assert found.hash == search(dropping(), made, sparsity=0.5).hash
    assert_trains(model)
    assert_trains(found.apply_(dropping()))


@modes
def test_training_in_a_mode(mode: Any) -> None:
    model: Any = dropping()
    alone: Any = dropping()
    with mode():
        sc.train(model, Blobs(), Blobs(), Recipe(lr=0.05, epochs=1))
        sc.evaluate(model, Blobs())
        sc.recompute_statistics_(model, Blobs())
    sc.train(alone, Blobs(), Blobs(), Recipe(lr=0.05, epochs=1))
    assert torch.equal(model[0].weight, alone[0].weight)
    assert_trains(model)


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        dense, model = mlp(), mlp()
    for call in (
        lambda: sc.sparsify_(dense),
        lambda: sc.train(model, Blobs(), None, Recipe(epochs=1)),
    ):
        with pytest.raises(ValueError, match=r"made under torch\.inference_mode\(\)"):
            call()


@pytest.mark.parametrize("name", SEARCHES)
def test_models_without_values_or_with_complex_ones(name: str) -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        SEARCHES[name](sc.sparsify_(mlp().to("meta")), batches(), sparsity=0.5)

    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 8, dtype=torch.complex64), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.to(torch.complex64)).abs())

    model = sc.sparsify_(seeded(Waves))
    before = tensors_of(model)
    try:
        SEARCHES[name](model, batches(), sparsity=0.5)
    except ValueError as error:
        assert "complex" in str(error)
    assert equal(tensors_of(model), before)
