"""Paths between optima with answers by hand, and instability that is killed and goes on."""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import Blobs, Fixed, equal, generator, mlp, normed, rand, randn
from torch import Tensor, nn

import sparsecore as sc
from sparsecore import checkpoints
from sparsecore.batches import Batch
from sparsecore.batchnorm import recompute_statistics_
from sparsecore.connectivity import (
    Instability,
    LinearPath,
    RewindScan,
    barrier,
    instability,
    is_stable,
    path_errors,
    rewind_by_instability,
)
from sparsecore.engine.evaluation import Evaluation
from sparsecore.tickets import dense_state
from sparsecore.training import Recipe, evaluate, train

RECIPE = Recipe(lr=0.3, momentum=0.9, batch=64, epochs=2, schedule="constant")


class Noisy(Blobs):
    """Classes that overlap, in an order by seed; `tick` is called at every batch."""

    def __init__(self, seed: int = 0, tick: Callable[[], None] = lambda: None):
        super().__init__()
        self.x = self.x + 3 * randn(*self.x.shape, seed=3)
        self.seed, self.tick = seed, tick

    def order(self, index: int) -> Tensor:
        return torch.randperm(len(self.y), generator=generator(1000 * self.seed + index))

    def epoch(self, index: int) -> Iterator[Batch]:
        for batch in super().epoch(index):
            self.tick()
            yield batch


class Square(nn.Module):
    """Class 0 scores w² x - 1/4, class 1 nothing: right for both signs of w, wrong between them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        score = self.w.square() * x - 0.25
        return torch.stack([score, torch.zeros_like(score)], 1)


def masked(seed: int = 0) -> nn.Module:
    model = sc.sparsify_(mlp(seed=seed))
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight.shape, seed=i) > 0.5)
    return model


# Paths


def test_a_path_known_by_hand() -> None:
    a, b = {"w": torch.tensor([1.0])}, {"w": torch.tensor([-1.0])}
    data = Fixed(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))
    path = path_errors(Square(), a, b, data, points=11)
    assert path.alphas == tuple(i / 10 for i in range(11))
    w = [1 - 2 * alpha for alpha in path.alphas]
    # Wrong where w² x < 1/4: below 1/2 for x = 1, below 0.354 for x = 2.
    assert path.errors == (0, 0, 0, 50, 100, 100, 100, 50, 0, 0, 0)
    losses = [sum(math.log1p(math.exp(0.25 - v * v * x)) for x in (1, 2)) / 2 for v in w]
    assert path.losses == pytest.approx(losses, rel=1e-5)
    assert barrier(path) == 100 and not is_stable(path)
    assert path.rows[3] == {"alpha": 0.3, "error": 50, "loss": path.losses[3]}


def test_a_barrier_is_above_the_mean_of_the_ends() -> None:
    path = LinearPath((0.0, 0.5, 1.0), (4.0, 9.0, 6.0), (0.0, 0.0, 0.0))
    assert barrier(path) == 4.0
    assert not is_stable(path, 4.0) and is_stable(path, 4.1)
    # A straight slope has half its height, as the highest point may be an end.
    assert barrier(LinearPath((0.0, 0.5, 1.0), (1.0, 2.0, 3.0), (0.0, 0.0, 0.0))) == 1.0
    assert is_stable(LinearPath((0.0, 1.0), (0.0, 3.9), (0.0, 0.0)))
    assert not is_stable(LinearPath((0.0, 1.0), (0.0, 4.0), (0.0, 0.0)))


class Counted(nn.Module):
    """Sees the class that a counter says."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(self.count, 2).float().expand(len(x), 2)


def test_counters_are_those_of_the_nearer_end() -> None:
    a, b = ({"w": torch.ones(1), "count": torch.tensor(n)} for n in (0, 1))
    path = path_errors(Counted(), a, b, Fixed(torch.ones(2), torch.tensor([0, 0])), points=4)
    assert path.errors == (0, 0, 100, 100)


@pytest.mark.parametrize("points", [2, 3, 30])
def test_ends_are_plain_evaluations_and_swapping_mirrors_the_path(points: int) -> None:
    a, b = mlp(seed=1), mlp(seed=2)
    path = path_errors(mlp(), a.state_dict(), b.state_dict(), Noisy(), points=points)
    back = path_errors(mlp(), b.state_dict(), a.state_dict(), Noisy(), points=points)
    assert path.errors[0] == 100 - evaluate(a, Noisy())
    assert path.errors[-1] == 100 - evaluate(b, Noisy())
    assert len(path.alphas) == points and path.alphas[0] == 0 and path.alphas[-1] == 1
    steps = [v - u for u, v in pairwise(path.alphas)]
    assert steps == pytest.approx([1 / (points - 1)] * (points - 1))
    assert path.errors == pytest.approx(back.errors[::-1], abs=0.5)  # at most one sample of 256
    assert path.losses == pytest.approx(back.losses[::-1], rel=1e-5)
    assert barrier(path) == pytest.approx(barrier(back), abs=0.5)


def test_a_path_of_a_state_to_itself_is_flat() -> None:
    state = mlp(seed=1).state_dict()
    path = path_errors(mlp(), state, state, Noisy())
    assert len(set(path.errors)) == len(set(path.losses)) == 1 and barrier(path) == 0


@pytest.mark.parametrize("build", [mlp, masked, normed])
def test_the_model_is_left_as_it_is(build: Callable[[], nn.Module]) -> None:
    model = build().train()
    next(model.children()).eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    children = list(model.modules())
    states = [dense_state(build()), {k: 2 * v for k, v in dense_state(build()).items()}]
    path_errors(model, *states, Noisy(), points=3, train_batches=Noisy(1))
    assert equal(before, model.state_dict()) and list(model.modules()) == children
    assert [m.training for m in model.modules()] == modes


def test_masks_hold_on_the_whole_path() -> None:
    a, b, model = masked(1), masked(2), masked()
    path = path_errors(model, dense_state(a), dense_state(b), Noisy(), points=3)
    double = {k: v.double() for k, v in dense_state(b).items()}
    assert path == path_errors(model, dense_state(a), double, Noisy(), points=3)
    middle = masked()
    with torch.no_grad():
        for p, q, r in zip(middle.parameters(), a.parameters(), b.parameters(), strict=True):
            p.copy_((q + r) / 2)
    assert path.errors[1] == 100 - evaluate(middle, Noisy())
    # A model's mask holds for states that have none.
    dense = [{k: v + (v == 0) for k, v in dense_state(m).items()} for m in (a, b)]
    assert path_errors(model, *dense, Noisy(), points=3).errors[0] == path.errors[0]
    # A planned model computes the same.
    planned = sc.plan_(masked(), "csr")
    of_planned = path_errors(planned, dense_state(a), dense_state(b), Noisy(), points=3)
    assert of_planned.losses == pytest.approx(path.losses, rel=1e-5)


def test_statistics_are_measured_anew_at_every_point() -> None:
    a = normed()
    train(a, Noisy(1), None, RECIPE)
    # Running statistics of the states are rubbish, and do not matter.
    rubbish = {k: 100 * v if "running" in k else v for k, v in dense_state(a).items()}
    flipped = {k: -v if k.startswith("7") else v for k, v in rubbish.items()}
    path = path_errors(normed(), rubbish, flipped, Noisy(), points=3, train_batches=Noisy(1))
    assert path.errors[0] == 100 - evaluate(recompute_statistics_(a, Noisy(1)), Noisy())
    assert path.losses[1] == pytest.approx(math.log(4), rel=1e-5)  # the last layer vanishes
    few = path_errors(
        normed(), rubbish, flipped, Noisy(), points=3, train_batches=Noisy(1), limit=1
    )
    assert few.losses[0] != path.losses[0]


def test_a_path_that_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, file = mlp(seed=1).state_dict(), mlp(seed=2).state_dict(), tmp_path / "p"
    whole = path_errors(mlp(), a, b, Noisy(), points=5)
    measure, count = Evaluation.measure, 0

    def counted(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(Evaluation, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        path_errors(mlp(), a, b, Noisy(), points=5, checkpoint=file)
    assert path_errors(mlp(), a, b, Noisy(), points=5, checkpoint=file) == whole
    assert count == 3 + 3  # the two points from before were not measured again
    assert path_errors(mlp(), a, b, Noisy(), points=5, checkpoint=file) == whole and count == 6
    for other in (
        lambda: path_errors(mlp(), b, a, Noisy(), points=5, checkpoint=file),
        lambda: path_errors(mlp(), a, b, Noisy(), points=6, checkpoint=file),
        lambda: path_errors(mlp(), a, b, Noisy(1), points=5, checkpoint=file),
    ):
        with pytest.raises(ValueError, match="belongs to another path"):
            other()


def test_a_path_depends_on_what_its_statistics_are_measured_on(tmp_path: Path) -> None:
    a, b = dense_state(normed()), {k: -v for k, v in dense_state(normed()).items()}

    def path(test: int, training: int) -> LinearPath:
        return path_errors(
            normed(), a, b, Noisy(test), points=3, train_batches=Noisy(training), limit=2,
            checkpoint=tmp_path / "p",
        )  # fmt: skip

    assert path(0, 1) == path(0, 1)
    for other in ((0, 2), (2, 1)):
        with pytest.raises(ValueError, match="belongs to another path"):
            path(*other)


def test_bad_paths_are_refused() -> None:
    state = mlp().state_dict()
    with pytest.raises(ValueError, match="points: expected at least 2"):
        path_errors(mlp(), state, state, Noisy(), points=1)
    with pytest.raises(ValueError, match=r"state b: expected the keys.*got others at 0.weight"):
        path_errors(mlp(), state, {**state, "0.weight": torch.zeros(2)}, Noisy())
    with pytest.raises(ValueError, match=r"state a: .*got others at 2.bias"):
        path_errors(mlp(), {k: v for k, v in state.items() if k != "2.bias"}, state, Noisy())
    with pytest.raises(ValueError, match="train_batches"):
        path_errors(normed(), normed().state_dict(), normed().state_dict(), Noisy())


# Instability


def same(a: Instability, b: Instability) -> bool:
    return a.path == b.path and equal(a.first, b.first) and equal(a.second, b.second)


@pytest.mark.parametrize("build", [mlp, masked, normed])
def test_instability_is_zero_for_equal_runs_and_not_for_others(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    zero = instability(model, RECIPE, Noisy, Noisy(), seeds=(1, 1), points=4)
    assert barrier(zero.path) == 0 and equal(zero.first, zero.second)
    found = instability(model, RECIPE, Noisy, Noisy(), points=4)
    assert barrier(found.path) > 0 and not equal(found.first, found.second)
    assert equal(zero.first, found.first)  # seed 1 both times
    assert equal(before, model.state_dict())
    for name, layer in sc.sparse_layers(model).items():  # masks of the start hold in both
        for state in (found.first, found.second):
            assert not state[f"{name}.weight"][~layer.pattern.mask].any()


def test_an_instability_is_two_trainings_and_a_path() -> None:
    ends = []
    for seed in (3, 5):
        model = normed()
        train(model, Noisy(seed), None, RECIPE, start_epoch=0.5, seed=seed)
        ends.append(dense_state(model))
    expected = path_errors(normed(), *ends, Noisy(), points=4, train_batches=Noisy(3))
    found = instability(normed(), RECIPE, Noisy, Noisy(), seeds=(3, 5), start_epoch=0.5, points=4)
    assert same(found, Instability(expected, *ends))


def fused(batches: int) -> Callable[[], None]:
    """A tick that interrupts at the batch of that number."""
    left = batches

    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    return tick


def until_done(work: Callable[[Callable[[], None]], Instability | RewindScan], batches: int):
    """Interrupts again and again after so many batches; at last lets it finish."""
    for _ in range(3):
        try:
            work(fused(batches))
        except KeyboardInterrupt:
            continue
    return work(lambda: None)


@pytest.mark.parametrize("batches", range(1, 34, 4))
def test_instability_that_is_killed_goes_on_to_the_same(batches: int, tmp_path: Path) -> None:
    def work(tick: Callable[[], None], folder: Path | None = tmp_path / "new" / "folder"):
        def batches_for(seed: int) -> Noisy:
            return Noisy(seed, tick)

        return instability(normed(), RECIPE, batches_for, Noisy(0, tick), points=3, folder=folder)

    assert same(until_done(work, batches), work(lambda: None, None))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    found = instability(mlp(), RECIPE, Noisy, Noisy(), points=3, folder=tmp_path)
    assert same(found, instability(mlp(), RECIPE, Noisy, Noisy(), points=3, folder=tmp_path))
    for start, options in (
        (mlp(seed=1), {}),
        (mlp(), {"seeds": (1, 3)}),
        (mlp(), {"start_epoch": 1}),
        (mlp(), {"points": 4}),
    ):
        options = {"points": 3, "folder": tmp_path} | options
        with pytest.raises(ValueError, match="belongs to another"):
            instability(start, RECIPE, Noisy, Noisy(), **options)


@pytest.mark.parametrize("bad", [{"points": 1}, {"seeds": (1,)}, {"seeds": (1, 2, 3)}], ids=str)
def test_bad_input_is_told_before_anything_is_trained(bad: dict) -> None:
    def untouched(seed: int) -> Noisy:
        raise AssertionError("asked for batches")

    with pytest.raises(ValueError, match=r"(points|seeds): expected"):
        instability(mlp(), RECIPE, untouched, Noisy(), **bad)
    with pytest.raises(ValueError, match=r"(points|seeds): expected"):
        rewind_by_instability(mlp(), RECIPE, untouched, Noisy(), [0], **bad)


# The rewind epoch


def test_the_earliest_stable_epoch() -> None:
    def hill(height: float) -> LinearPath:
        return LinearPath((0.0, 0.5, 1.0), (5.0, 5 + height, 5.0), (0.0, 0.0, 0.0))

    paths = {0.0: hill(30), 0.5: hill(1.9), 1.0: hill(2.0), 2.0: hill(0.5)}
    scan = RewindScan(paths, {})
    assert scan.earliest == 0.5
    assert scan.instabilities == pytest.approx({0.0: 30, 0.5: 1.9, 1.0: 2.0, 2.0: 0.5})
    assert RewindScan(paths, {}, threshold=1).earliest == 2.0
    assert RewindScan(paths, {}, threshold=0.1).earliest is None


def test_a_scan_rewinds_one_dense_training() -> None:
    model, epochs = normed(), [1.25, 0, 1]
    before = copy.deepcopy(model.state_dict())
    scan = rewind_by_instability(model, RECIPE, Noisy, Noisy(), epochs, seed=7, points=3)
    assert equal(before, model.state_dict())
    assert list(scan.paths) == list(scan.starts) == [0, 1, 1.25]
    dense = normed()
    history = train(dense, Noisy(7), None, RECIPE, stop_epoch=1.25, snapshots=epochs, seed=7)
    for epoch, path in scan.paths.items():
        assert equal(scan.starts[epoch], history.snapshots[epoch])
        start = normed()
        start.load_state_dict(scan.starts[epoch])
        found = instability(start, RECIPE, Noisy, Noisy(), start_epoch=epoch, points=3)
        assert found.path == path


def test_a_scan_may_stop_at_the_first_stable_candidate() -> None:
    def scan(threshold: float) -> RewindScan:
        return rewind_by_instability(
            mlp(), RECIPE, Noisy, Noisy(), [0, 1], points=3, threshold=threshold, exhaustive=False
        )

    assert list(scan(1000).paths) == [0] and scan(1000).earliest == 0
    assert list(scan(0).paths) == [0, 1] and scan(0).earliest is None


@pytest.mark.parametrize("batches", [3, 7, 11, 20, 40])
def test_a_scan_that_is_killed_goes_on_to_the_same(batches: int, tmp_path: Path) -> None:
    def work(tick: Callable[[], None], folder: Path | None = tmp_path):
        def batches_for(seed: int) -> Noisy:
            return Noisy(seed, tick)

        return rewind_by_instability(
            mlp(), RECIPE, batches_for, Noisy(0, tick), [0, 0.5, 1], points=3, folder=folder
        )

    found, expected = until_done(work, batches), work(lambda: None, None)
    assert found.paths == expected.paths
    assert all(equal(found.starts[e], expected.starts[e]) for e in (0, 0.5, 1))
    _, dense = checkpoints.read(tmp_path / "dense.checkpoint")
    assert dense["epochs"][-1]["epoch"] == 1  # no further than the last candidate


@pytest.mark.parametrize("candidates", [[], [-1, 0], [0, 2], [math.nan, 1]], ids=str)
def test_bad_candidates_are_refused(candidates: list[float]) -> None:
    with pytest.raises(ValueError, match="candidates: expected rewind epochs from 0 to below 2"):
        rewind_by_instability(mlp(), RECIPE, Noisy, Noisy(), candidates)
