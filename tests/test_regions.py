"""Angles, paths between rounds and the repellent, against answers by hand."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import Blobs, mlp, rand, randn, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.connectivity import path_errors
from sparsecore.engine.evaluation import Evaluation
from sparsecore.regions import Repellent, angular_distances, round_paths
from sparsecore.tickets import dense_state
from sparsecore.training import Recipe, evaluate, train


@dataclass(frozen=True)
class Round:
    masks: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]


def rounds_of(*pairs: tuple[list[float], list[int]]) -> list[Round]:
    """Rounds of one layer `fc` with the given weights and masks."""
    return [
        Round({"fc": torch.tensor(mask).bool()}, {"fc.weight": torch.tensor(weight)})
        for weight, mask in pairs
    ]


def random_round(seed: int) -> Round:
    model = sc.sparsify_(mlp(seed=seed))
    masks = {
        name: rand(*layer.weight.shape, seed=10 * seed + i) > 0.4
        for i, (name, layer) in enumerate(sc.sparse_layers(model).items())
    }
    return Round(masks, dense_state(model))


# Angles


@pytest.mark.parametrize(
    ("other", "distance"),
    [
        ([1.0, 2.0], 0),
        ([0.5, 1.0], 0),  # the length does not matter
        ([-1.0, -2.0], 2),
        ([2.0, -1.0], 1),
        ([1 - 2 * math.sqrt(3), 2 + math.sqrt(3)], 2 / 3),  # turned by 60 degrees
    ],
)
def test_angles_with_known_answers(other: list[float], distance: float) -> None:
    found = angular_distances(rounds_of(([1.0, 2.0], [1, 1]), (other, [1, 1])))
    expected = torch.tensor([[0, distance], [distance, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.diagonal().count_nonzero() == 0


def test_only_weights_that_both_masks_keep_count() -> None:
    found = angular_distances(
        rounds_of(
            ([1.0, 1.0, 9.0, 0.0], [1, 1, 1, 0]),
            ([1.0, -1.0, 0.0, 9.0], [1, 1, 0, 1]),
            ([0.0, 0.0, 0.0, 5.0], [0, 0, 0, 1]),
        )
    )
    assert found[0, 1] == pytest.approx(1) and found[1, 2] == pytest.approx(0, abs=1e-6)
    assert found[0, 2].isnan() and found[2, 0].isnan()  # nothing in common
    # Weights under a mask do not matter, zero or not.
    dirty = rounds_of(([1.0, 1.0, 9.0, 7.0], [1, 1, 1, 0]), ([1.0, -1.0, 3.0, 9.0], [1, 1, 0, 1]))
    assert angular_distances(dirty)[0, 1] == pytest.approx(1)


def test_rounding_does_not_make_angles_of_parallel_weights_undefined() -> None:
    for seed in range(30):
        r = random_round(seed)
        longer = Round(r.masks, {k: 3.3 * v.double() for k, v in r.trained.items()})
        assert float(angular_distances([r, longer])[0, 1]) == pytest.approx(0, abs=1e-6)


def test_angles_over_all_layers_against_brute_force() -> None:
    rounds = [random_round(seed) for seed in range(4)]
    found = angular_distances(rounds)
    assert found.dtype == torch.float64 and torch.equal(found, found.T)
    for i, j in product(range(4), range(4)):
        a, b = [], []
        for name in rounds[i].masks:
            both = rounds[i].masks[name] & rounds[j].masks[name]
            a.append(rounds[i].trained[f"{name}.weight"][both].double())
            b.append(rounds[j].trained[f"{name}.weight"][both].double())
        cosine = torch.cosine_similarity(torch.cat(a), torch.cat(b), dim=0).clamp(-1, 1)
        assert found[i, j] == pytest.approx(float(cosine.acos()) * 2 / math.pi, abs=1e-6)


def test_rounds_of_different_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        angular_distances([])
    with pytest.raises(ValueError, match=r"other layers or shapes in number 1: fc instead of 0, 2"):
        angular_distances([random_round(0), *rounds_of(([1.0], [1]))])
    with pytest.raises(ValueError, match="rounds: expected at least 2, got 1"):
        round_paths(sc.sparsify_(mlp()), [random_round(0)], Blobs())


# Paths between rounds


def test_paths_between_rounds_are_under_their_own_masks() -> None:
    rounds = [random_round(seed) for seed in range(3)]
    model = sc.sparsify_(mlp(seed=9))
    sc.Ticket(rounds[2].masks, dense_state(model)).apply_(model)  # a mask that must not matter
    before = copy.deepcopy(model.state_dict())
    paths = round_paths(model, rounds, Blobs(), points=4)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in after)
    ends = []
    for r in rounds:
        masked = sc.Ticket(r.masks, r.trained).apply_(sc.sparsify_(mlp()))
        ends.append(dense_state(masked))
    assert [p.errors[0] for p in paths] == [
        100 - evaluate(sc.Ticket(r.masks, r.trained).apply_(sc.sparsify_(mlp())), Blobs())
        for r in rounds[:2]
    ]
    expected = [path_errors(mlp(), *ends[i : i + 2], Blobs(), points=4) for i in range(2)]
    assert paths == expected
    assert len(round_paths(model, rounds, Blobs())[0].alphas) == 20


def test_paths_between_rounds_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, model, folder = [random_round(s) for s in range(3)], sc.sparsify_(mlp()), tmp_path / "p"
    paths = round_paths(model, rounds, Blobs(), points=3, folder=folder)
    monkeypatch.setattr(Evaluation, "measure", lambda _: pytest.fail("measured again"))
    assert round_paths(model, rounds, Blobs(), points=3, folder=folder) == paths


def test_statistics_between_rounds() -> None:
    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))
    )
    masks = {
        n: torch.ones(layer.weight.shape).bool() for n, layer in sc.sparse_layers(model).items()
    }
    rounds = [Round(masks, dense_state(model))] * 2
    with pytest.raises(ValueError, match="train_batches"):
        round_paths(model, rounds, Blobs())
    one, all_of_them = (
        round_paths(model, rounds, Blobs(), points=2, train_batches=Blobs(), limit=n)[0]
        for n in (1, 4)
    )
    assert one.losses != all_of_them.losses


# The repellent


def linear(weight: list[float], dtype: torch.dtype = torch.float32) -> nn.Module:
    layer = seeded(lambda: nn.Linear(len(weight), 1, bias=False)).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
    return sc.sparsify_(nn.Sequential(layer))


def optimum(*weight: float) -> dict[str, Tensor]:
    return {"0.weight": torch.tensor([weight])}


def test_the_repellent_by_hand() -> None:
    model = linear([1.0, 0.0])
    # cos² to (1, 1) is 1/2, and turning towards it raises it: d cos²/dw = (0, 1).
    loss = Repellent([optimum(1, 1)], 3.0)(model)
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    torch.testing.assert_close(model[0].raw_weight.grad, torch.tensor([[0.0, 3.0]]))
    # The mean over optima; neither length nor sign matters.
    three = Repellent([optimum(5, 5), optimum(-7, 0), optimum(0, 1)], 2.0)
    assert three(model).item() == pytest.approx(2 * (0.5 + 1 + 0) / 3)
    assert Repellent([optimum(-7, 0)], -1.0)(model).item() == pytest.approx(-1)


def test_the_repellent_sees_what_the_mask_keeps() -> None:
    model, repellent = linear([1.0, 1.0, 0.0]), Repellent([optimum(3, 0, 4)], 1.0)
    assert repellent(model).item() == pytest.approx((3 / 5) ** 2 / 2)
    model[0].set_mask_(torch.tensor([[True, True, False]]))
    assert repellent(model).item() == pytest.approx(1 / 2)  # another mask is noticed
    model[0].remask_(torch.tensor([[True, False, False]]))
    assert repellent(model).item() == pytest.approx(1)
    assert repellent(sc.plan_(model, "csr")).item() == pytest.approx(1)
    model = linear([0.0, 1.0, 0.0])
    model[0].set_mask_(torch.tensor([[False, True, False]]))
    loss = repellent(model)  # nothing of the optimum is left: no direction, no force
    loss.backward()
    assert loss.item() == 0 and not model[0].raw_weight.grad.any()
    dead = linear([0.0, 0.0, 0.0])
    loss = repellent(dead)
    loss.backward()
    assert loss.item() == 0 and not dead[0].raw_weight.grad.any()


@pytest.mark.parametrize("form", ["dense", "masked", "planned"])
def test_the_repellents_gradient_against_finite_differences(form: str) -> None:
    model = sc.sparsify_(mlp(5, 4, 3)).double()
    optima = [{k: v.float() for k, v in mlp(5, 4, 3, seed=s).state_dict().items()} for s in (1, 2)]
    if form != "dense":
        for i, layer in enumerate(sc.sparse_layers(model).values()):
            layer.set_mask_(rand(*layer.weight.shape, seed=i) > 0.4)
    if form == "planned":
        sc.plan_(model, "csr")
    repellent = Repellent(optima, 2.0)
    repellent(model).backward()
    for layer in sc.sparse_layers(model).values():
        raw, step = layer.raw_weight, 1e-5
        seen = (
            layer.pattern.mask.reshape(-1) if form == "masked" else torch.ones(raw.numel()).bool()
        )
        for i in range(raw.numel()):
            flat = raw.detach().view(-1)
            if not seen[i]:  # what is removed stays so
                assert raw.grad.view(-1)[i] == 0
                continue
            kept, ends = float(flat[i]), []
            for offset in (step, -step):
                flat[i] = kept + offset
                ends.append(repellent(model).item())
            flat[i] = kept
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(raw.grad.view(-1)[i]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_a_masked_and_a_planned_model_are_repelled_alike() -> None:
    masked = sc.sparsify_(mlp())
    for i, layer in enumerate(sc.sparse_layers(masked).values()):
        layer.set_mask_(rand(*layer.weight.shape, seed=i) > 0.4)
    planned = sc.plan_(copy.deepcopy(masked), "csr")
    optima = [mlp(seed=s).state_dict() for s in (1, 2, 3)]
    assert Repellent(optima)(masked).item() == pytest.approx(Repellent(optima)(planned).item())


def test_training_is_driven_off_or_drawn_in() -> None:
    recipe = Recipe(lr=0.05, batch=64, epochs=4)
    earlier = mlp()
    train(earlier, Blobs(), None, recipe)

    def closeness(strength: float | None) -> float:
        model = sc.sparsify_(mlp())
        for i, layer in enumerate(sc.sparse_layers(model).values()):
            layer.set_mask_(rand(*layer.weight.shape, seed=i) > 0.3)
        penalty = None if strength is None else Repellent([earlier.state_dict()], strength)
        train(model, Blobs(), None, recipe, penalty=penalty)
        for layer in sc.sparse_layers(model).values():
            pruned = layer.raw_weight.detach()[~layer.pattern.mask]
            assert torch.equal(pruned.view(torch.int32), torch.zeros_like(pruned).int())
        return Repellent([earlier.state_dict()], 1.0)(model).item()

    assert closeness(2.0) < closeness(None) - 0.1
    assert closeness(-1.0) > closeness(None) + 0.01


def test_bad_repellents_are_refused() -> None:
    with pytest.raises(ValueError, match="expected earlier optima, got none"):
        Repellent([], 1.0)
    with pytest.raises(ValueError, match="strength: expected a finite number, got nan"):
        Repellent([optimum(1, 1)], math.nan)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) in optimum 1, got \(1, 2\)"):
        Repellent([optimum(1, 1, 1), optimum(1, 1)])(linear([1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="in optimum 0, got none"):
        Repellent([{"fc.weight": randn(1, 2)}])(linear([1.0, 0.0]))
