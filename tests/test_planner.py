"""The planner: what it weighs, how it decides, and that a remembered choice stays."""

import json
from pathlib import Path

import pytest
import torch
from helpers import ChannelsLast, mlp, rand, randn
from torch import Tensor

import sparsecore as sc
from sparsecore import costs, planner, products
from sparsecore.convert import sparse_layers
from sparsecore.costs import Facts, Machine, Times, predicted, stored
from sparsecore.kernels import Layer
from sparsecore.patterns import Masked, Planned
from sparsecore.planner import Choice, _decided, cache_of, candidates, choose
from sparsecore.writing import FileError

MACHINE = Machine(flops=1e11, bandwidth=1e10, updates=1e9)
UPDATE = {"dense": 2.0, "kept": 0.2}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "plans.json"


def test_every_product_takes_its_own_fastest_format() -> None:
    measured = {
        "state": Times(3, 3, 3), "csr": Times(1, 4, 2), "dense": Times(3, 3, 3), "mask": Times(4, 3, 4),
    }  # fmt: skip
    formats, reason = _decided(measured, UPDATE, ["state", "csr"])
    assert formats == ("csr", "state", "csr")
    assert "6.2 ms" in reason and "dense*mask 13" in reason and "dense 11" in reason


def test_formats_are_mixed_only_for_a_clear_gain() -> None:
    measured = {
        "state": Times(2.8, 4, 4), "csr": Times(3, 1, 2), "dense": Times(3, 3, 3), "mask": Times(4, 3, 4),
    }  # fmt: skip
    assert _decided(measured, UPDATE, ["state", "csr"])[0] == ("csr",) * 3


def test_a_format_must_win_by_more_than_noise() -> None:
    measured = {"state": Times(3, 3, 3), "csr": Times(2.9, 2.9, 2.9), "dense": Times(3, 3, 3)}
    measured["mask"] = Times(4, 3, 4)
    assert _decided(measured, UPDATE, ["state", "csr"])[0] == ("state",) * 3


def test_never_slower_than_the_mask_it_replaces() -> None:
    measured = {"state": Times(3, 3, 3), "dense": Times(1, 1, 1), "mask": Times(1, 1, 1)}
    formats, reason = _decided(measured, {"dense": 0.1, "kept": 0.1}, ["state"])
    assert formats is None and "no format is faster" in reason
    choice = Choice(formats, reason, measured, {}, {"dense": 0.1, "kept": 0.1})
    assert choice.chosen == choice.time("mask") == pytest.approx(3.1)


def test_a_product_that_nobody_wants_follows_forward() -> None:
    measured = {"state": Times(3, 0, 3), "csr": Times(1, 0, 1), "dense": Times(3, 0, 3)}
    measured["mask"] = Times(4, 0, 4)
    assert _decided(measured, UPDATE, ["state", "csr"])[0] == ("csr",) * 3


def test_a_model_that_measures_slow_stays_a_mask(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(products, device, grad, captured):
        return {name: Times(1, 1, 1) if name == "mask" else Times(2, 2, 2) for name in products}

    monkeypatch.setattr(planner, "_measured", slow)
    model, x = sc.sparsify_(mlp()), randn(8, 12)
    for layer in sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.3)
    expected = model(x)
    sc.plan_(model, "auto", x, cache=cache)
    assert all(isinstance(layer.pattern, Masked) for layer in sparse_layers(model).values())
    assert all(
        row.choice.formats is None and "no format" in row.choice.reason for row in sc.report(model)
    )
    assert torch.equal(model(x), expected)


def test_a_fixed_cache_gives_the_same_plan_without_measuring(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan() -> list:
        model = sc.sparsify_(mlp())
        for layer in sparse_layers(model).values():
            layer.set_mask_(rand(*layer.weight_shape) < 0.1)
        return sc.report(sc.plan_(model, "auto", randn(8, 12), cache=cache))

    first = plan()
    assert all(row.choice.measured and row.choice.predicted for row in first)
    assert all({"dense", "mask", "state"} <= set(row.choice.measured) for row in first)
    planner._cache_at.cache_clear()  # as a new process would find it
    monkeypatch.setattr(planner, "_measured", lambda *_: pytest.fail("measured again"))
    assert plan() == first


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_cache_is_made_again(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    mask = rand(20, 30) < 0.1
    found = choose(mask, Layer((20, 30)), randn(8, 30), cache=cache_of(cache))
    assert found.measured and len(json.loads(cache.read_text())) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = cache_of(tmp_path / "file" / "plans.json")
    assert choose(rand(20, 30) < 0.1, Layer((20, 30)), randn(8, 30), cache=found).measured


def test_what_a_full_disk_refused_is_written_at_the_next_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise FileError("No space left on device")

    found = cache_of(tmp_path / "plans.json")
    with monkeypatch.context() as patch:
        patch.setattr(planner, "put", full)
        assert found.get("key", lambda: [1], list) == [1]
    assert not found.path.exists()
    assert found.get("key", lambda: [2], list) == [1]
    assert json.loads(found.path.read_text()) == {"key": [1]}


def test_lazy_layers_choose_at_their_first_use(cache: Path) -> None:
    model = sc.sparsify_(mlp())
    for i, layer in enumerate(sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight_shape) < (0.1, 0.9)[i])
    sc.plan_(model, cache=cache)
    first, last = sc.report(model)
    assert first.choice.formats is None and "first use" in first.choice.reason
    assert isinstance(model[2].pattern, Masked) and "is kept" in last.choice.reason
    model(randn(8, 12))
    chosen = sc.report(model)[0].choice
    assert chosen.formats is not None and chosen.measured
    formats = model[0].pattern.formats
    model(randn(99, 12))
    assert isinstance(model[0].pattern, Planned) and model[0].pattern.formats == formats  # once


def test_a_lazy_layer_cannot_go_back_to_a_mask(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Choice(None, "slow")
    monkeypatch.setattr("sparsecore.plans.choose", lambda *_, **__: slow)
    model = sc.sparsify_(mlp())
    model[0].set_mask_(rand(24, 12) < 0.1)
    sc.plan_(model, cache=cache)(randn(8, 12))
    (row,) = sc.report(model)
    assert row.choice.formats == ("state",) * 3 and "an example" in row.choice.reason


def test_planning_leaves_the_model_as_it_was(cache: Path) -> None:
    model = torch.nn.Sequential(mlp(), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)).eval()
    sc.sparsify_(model)
    for layer in sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sc.plan_(model, "auto", randn(8, 12), cache=cache)
    assert not any(module.training for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def brute_stored(mask: Tensor, h: int, w: int) -> int:
    n, k = mask.shape[:2]
    plane = mask.reshape(n, k, -1)
    blocks = [
        plane[i : i + h, j : j + w, t].any()
        for i in range(0, n, h) for j in range(0, k, w) for t in range(plane.shape[2])
    ]  # fmt: skip
    return int(sum(blocks)) * h * w


@pytest.mark.parametrize("shape", [(7, 9), (16, 16), (5, 6, 3, 3)])
@pytest.mark.parametrize("sides", [(2, 3), (4, 4), (16, 1)])
def test_what_blocks_store(shape: tuple[int, ...], sides: tuple[int, int]) -> None:
    mask = rand(*shape) < 0.2
    assert stored(mask, *sides) == brute_stored(mask, *sides)


def test_the_cost_model_counts_operations_and_bytes() -> None:
    layer, mask = Layer((1000, 2000)), torch.ones(1000, 2000, dtype=torch.bool)
    facts = Facts.of(mask)
    assert facts == Facts(2_000_000, 1000, 2000)

    def guess(name: str, tokens: int) -> Times:
        return predicted(name, mask, facts, layer, tokens, 4, MACHINE)

    work = 1e3 * 2 * 500 * 2e6 / MACHINE.flops
    assert guess("dense", 500).forward == pytest.approx(work)
    masks = 1e3 * 9 * 2e6 / MACHINE.bandwidth
    assert guess("mask", 500).forward == pytest.approx(work + masks)
    assert guess("mask", 500).dx == pytest.approx(work)
    assert guess("csr", 500).total > guess("dense", 500).total  # nothing is pruned
    half = mask.clone()
    half[500:], half[:, 1000:] = False, False
    small = predicted("compact", half, Facts.of(half), layer, 500, 4, MACHINE)
    assert small.forward < 0.3 * work + 1


def test_candidates_leave_out_what_cannot_be() -> None:
    layer = Layer((64, 64))
    assert candidates(rand(64, 64) < 0.5, layer, torch.float32) == ["state", "csr"]
    dead = rand(64, 64) < 0.5
    dead[:32] = False
    assert candidates(dead, layer, torch.float32) == ["state", "csr", "compact"]
    grouped = Layer((64, 32, 1, 1), (1, 1, 0, 0, 1, 1), 2)
    assert "compact" not in candidates(dead[:, :32, None, None], grouped, torch.float32)


def test_a_mask_is_measured_as_a_masked_layer_computes() -> None:
    """The rival of every format must not be slowed down: it runs the pattern itself."""
    mask, weight, x = rand(30, 20) < 0.3, randn(30, 20), randn(7, 20)
    layer = torch.nn.Parameter(weight.clone())
    y = x @ Masked(mask)(layer).T
    y.backward(torch.ones_like(y))
    with torch.no_grad():
        forward, _, dw = products.dense_products("mask", mask, Layer((30, 20)), weight, x)
        assert torch.equal(forward(), y) and torch.equal(dw(), layer.grad)


def test_an_empty_layer_needs_no_measurement(cache: Path) -> None:
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    found = choose(nothing, Layer((4, 5)), randn(3, 5), cache=cache_of(cache))
    assert found.formats == ("state",) * 3 and not found.measured and not cache.exists()


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"as measured": 1.0, "row-major": 1.5, "mask": 1.2}, "csr"),
        ({"as measured": 1.0, "row-major": 1.0, "mask": 1.0}, "csr"),  # level: less memory wins
        ({"as measured": 1.01, "row-major": 1.0, "mask": 1.0}, "state"),
        ({"as measured": 1.2, "row-major": 1.0, "mask": 1.1}, "state"),
        ({"as measured": 1.2, "row-major": 1.1, "mask": 1.0}, None),
    ],
)
def test_the_whole_step_has_the_last_word(
    cache: Path, monkeypatch: pytest.MonkeyPatch, times: dict[str, float], expected: str | None
) -> None:
    fast = {name: Times(1, 1, 1) for name in ("csr", "state", "mask", "dense")}
    choice = Choice(("csr",) * 3, "alone", fast, {}, UPDATE)
    monkeypatch.setattr("sparsecore.plans.choose", lambda *_, **__: choice)
    monkeypatch.setattr(
        "sparsecore.plans._step_time",
        lambda model, example, layers, choices, captured: times[way_of(choices)],
    )

    def way_of(choices: dict[str, Choice]) -> str:
        formats = choices["0"].formats
        return (
            "mask" if formats is None else {"csr": "as measured", "state": "row-major"}[formats[0]]
        )

    model, x = sc.sparsify_(mlp()), randn(8, 12)
    for layer in sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.3)
    y = model(x)
    sc.plan_(model, "auto", x, cache=cache)
    for row in sc.report(model):
        assert row.choice.formats == (None if expected is None else (expected,) * 3)
        assert ("as a whole step" in row.choice.reason) == (expected != "csr")
    torch.testing.assert_close(model(x), y)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["state", "compact", "mask", "dense"])
def test_convolutions_are_measured_in_the_memory_format_of_x(name: str) -> None:
    layer = Layer((6, 5, 3, 3), (1, 1, 1, 1, 1, 1))
    mask, weight = rand(*layer.shape) < 0.4, randn(*layer.shape)
    x = randn(2, 5, 9, 8).contiguous(memory_format=torch.channels_last)
    make = products.dense_products if name in ("mask", "dense") else products.products_of
    for step in make(name, mask, layer, weight, x):
        with ChannelsLast(x.shape):
            step()


def test_a_step_is_timed_with_every_choice_in_place(cache: Path) -> None:
    model, x = sc.sparsify_(mlp(hidden=64)), randn(8, 12)
    for layer in sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.05)
    sc.plan_(model, "auto", x, cache=cache)
    steps = [
        entry for key, entry in json.loads(cache.read_text()).items() if key.startswith("step")
    ]
    (step,) = steps
    assert {"as measured", "mask"} <= set(step) and all(time > 0 for time in step.values())


def test_what_other_programs_add_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, left = [0.0], [0.001, *[0.02] * 4, 0.01, *[0.03] * 20]

    def step() -> None:
        now[0] += left.pop(0)

    monkeypatch.setattr(costs, "perf_counter", lambda: now[0])
    assert costs.seconds(step, torch.device("cpu"), budget=0.1) == pytest.approx(0.01)
    assert len(left) == 19  # the first run is not timed, and the budget ends the others

    assert [step() for _ in costs.rounds(0.05)] == [None] * 2  # two rounds at least
    left[:] = [0.001] * 9
    assert [step() for _ in costs.rounds(9.0)] == [None] * 8
