"""What users do to planned models that nobody planned for."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import Blobs, mlp, rand, randn, seeded
from torch import nn

import sparsecore as sc
from sparsecore import planner
from sparsecore.convert import sparse_layers
from sparsecore.nn import SparseConv2d, SparseLinear
from sparsecore.patterns import Dense, Masked, Planned
from sparsecore.planner import Choice
from sparsecore.training import Recipe, train

PLANS = ["state", "csr", "compact", "auto"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))


def masked(model: nn.Module | None = None, density: float = 0.3) -> nn.Module:
    model = sc.sparsify_(model or mlp())
    for i, layer in enumerate(sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight_shape, seed=i) < density)
    return model


@pytest.mark.parametrize("plan", PLANS)
def test_an_evaluation_first_does_not_stop_training(plan: str) -> None:
    model = sc.plan_(masked(), plan)
    sc.evaluate(model, Blobs())
    train(model, Blobs(), Blobs(), Recipe(lr=0.01, epochs=1))
    double = model.double()
    with torch.inference_mode():
        double(randn(3, 12).double())
    double(randn(3, 12).double()).sum().backward()


def test_an_evaluation_measures_dx_too() -> None:
    model = sc.plan_(masked())
    with torch.inference_mode():
        model(randn(8, 12))
    assert all(row.choice.measured["state"].dx > 0 for row in sc.report(model))


@pytest.mark.parametrize("plan", PLANS)
def test_writing_in_place_to_an_output(plan: str) -> None:
    model = mlp()
    model[1] = nn.ReLU(inplace=True)
    model = masked(model)
    x = randn(8, 12)
    expected = model(x)
    expected.sum().backward()
    bias = model[0].bias.grad.clone()
    model.zero_grad()
    sc.plan_(model, plan)
    found = model(x)
    torch.testing.assert_close(found, expected)
    found += 1
    found.sum().backward()
    torch.testing.assert_close(model[0].bias.grad, bias)


@pytest.mark.parametrize("plan", PLANS)
def test_single_samples_and_what_is_no_number(plan: str) -> None:
    model, x = masked(), randn(12)
    expected = model(x)
    torch.testing.assert_close(sc.plan_(model, plan)(x), expected)
    conv = seeded(lambda: nn.Sequential(SparseConv2d(3, 4, 3)))
    masked(conv)
    image = randn(3, 8, 8)
    expected = conv(image)
    torch.testing.assert_close(sc.plan_(conv, plan)(image), expected)
    with pytest.raises(ValueError, match="floating dtype"):
        sc.plan_(model, "state")(torch.ones(2, 12, dtype=torch.long))


@pytest.mark.parametrize("plan", ["mask", "csr"])
def test_a_layer_in_two_places_stays_one_layer(plan: str) -> None:
    layer = seeded(lambda: nn.Linear(6, 6))
    model = masked(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2] and list(sparse_layers(model)) == ["0"]
    mask, x = model[0].pattern.mask.clone(), randn(5, 6)
    sc.plan_(model, plan)
    steps = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().sum().backward()
    steps.step()
    weight = model.state_dict()["0.weight"]
    assert bool((weight[~mask] == 0).all()) and torch.equal(model.state_dict()["2.weight"], weight)
    expected = model(x)
    sc.densify_(model)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("start", ["mask", "csr"])
def test_a_plan_that_fails_half_way_changes_nothing(start: str) -> None:
    model = sc.plan_(masked(), start)
    before, patterns = copy.deepcopy(model.state_dict()), [m.pattern for m in (model[0], model[2])]
    with pytest.raises(ValueError, match="shape"):
        sc.plan_(model, "auto", randn(3, 7))
    if start == "mask":
        with torch.no_grad():
            model[2].raw_weight[model[2].pattern.mask] = torch.nan
        for plan in ("state", "auto"):
            with pytest.raises(ValueError, match="finite"):
                sc.plan_(model, plan)
        model[2].raw_weight.data.copy_(before["2.weight"])
    assert [m.pattern for m in (model[0], model[2])] == patterns
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(randn(3, 12)).sum().backward()


def test_one_pruned_weight_of_many_stays_pruned() -> None:
    layer = seeded(lambda: SparseLinear(8192, 8192, bias=False))
    mask = torch.ones(8192, 8192, dtype=torch.bool)
    mask[0, 0] = False
    sc.plan_(nn.Sequential(layer.set_mask_(mask)))
    assert not isinstance(layer.pattern, Dense)


def test_masks_are_checked_before_any_is_taken() -> None:
    model = sc.plan_(masked(), "csr")
    before = model[0].pattern.mask
    for bad in (rand(4, 24), (rand(4, 24) < 0.3).numpy()):
        with pytest.raises(ValueError, match=r"bool tensor for 2|masks\['2'\]: expected Tensor"):
            sc.remask_(model, {"0": rand(24, 12) < 0.5, "2": bad})
    assert torch.equal(model[0].pattern.mask, before)


def test_a_frozen_model_plans() -> None:
    sc.plan_(masked().requires_grad_(False), "auto", randn(8, 12))


@pytest.mark.parametrize("bad", [None, [1], "x", {}, {"formats": ["zip"] * 3}, {"x": 1.0}])
def test_entries_of_another_version_are_made_again(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "plans.json"
    sc.plan_(masked(density=0.1), "auto", randn(8, 12), cache=path)
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), bad)))
    planner._cache_at.cache_clear()
    model = sc.plan_(masked(density=0.1), "auto", randn(8, 12), cache=path)
    assert all(row.choice.measured for row in sc.report(model))


def test_a_cache_in_a_folders_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    sc.plan_(masked(), "auto", randn(8, 12), cache=tmp_path / "d")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_layer_that_the_example_does_not_call_is_reported_as_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = masked(), randn(8, 12)
    both = nn.ModuleList([model, masked(mlp(seed=1))])
    both.forward = lambda x: both[0](x)
    sc.plan_(both, "auto", x)
    monkeypatch.setattr("sparsecore.plans.choose", lambda *_, **__: Choice(None, "slow"))
    both[1](x)
    rows = {row.name: row.choice for row in sc.report(both)}
    assert isinstance(both[1][0].pattern, Planned) and rows["1.0"].formats == ("state",) * 3


def test_autocast_leaves_float64_alone() -> None:
    model = sc.plan_(masked(), "state").double()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(randn(3, 12).double()).dtype == torch.float64


def test_a_planned_layer_refuses_what_a_masked_one_does() -> None:
    for model in (masked(), sc.plan_(masked(), "csr")):
        state = masked(density=0.2).state_dict()
        state["0.pattern.mask"] = torch.ones(3, 3, dtype=torch.bool)
        with pytest.raises(RuntimeError, match=r"0\.pattern\.mask.*\[24, 12\]"):
            model.load_state_dict(state)
        state = masked(density=0.2).state_dict()
        mask = state["0.pattern.mask"]
        state["0.pattern.mask"] = mask.byte()
        model.load_state_dict(state)
        assert torch.equal(model[0].pattern.mask, mask)
    assert isinstance(masked()[0].pattern, Masked)
