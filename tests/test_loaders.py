"""Batches of all kinds: the same data, however it comes, and one line where there is none."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import equal, generator, mlp, normed, randn, seeded
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import sparsecore as sc
from sparsecore.data import Batches, Dataset, Split
from sparsecore.loaders import batches_of
from sparsecore.training import Recipe, TrainingError, evaluate, train

X, Y = randn(40, 12), torch.arange(40) % 4
LIST = list(zip(X.split(8), Y.split(8), strict=True))
SGD = Recipe(lr=0.05, batch=8, epochs=2, schedule="constant")


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(X, Y, strict=True)


def trained(batches: Any, model: nn.Module | None = None, **options: Any) -> dict[str, Tensor]:
    model = model or mlp()
    train(model, batches, None, SGD, engine="eager", **options)
    return model.state_dict()


KINDS: dict[str, Any] = {
    "list": lambda: LIST,
    "loader": lambda: DataLoader(TensorDataset(X, Y), 8),
    "workers": lambda: DataLoader(TensorDataset(X, Y), 8, num_workers=1),
    "function": lambda: lambda: iter(LIST),
    "arrays": lambda: [(x.numpy(), y.numpy()) for x, y in LIST],
    "stream": lambda: (batch for _ in range(2) for batch in LIST),
    "endless": lambda: DataLoader(Endless(), 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_data_is_the_same_run(kind: str) -> None:
    steps = {"steps_per_epoch": 5} if kind in ("stream", "endless") else {}
    assert equal(trained(KINDS[kind](), **steps), trained(LIST))


def loader_of(kind: str) -> DataLoader:
    data = TensorDataset(X, Y)
    if kind == "torch":
        return DataLoader(data, 8, shuffle=True)
    if kind == "loader's":
        return DataLoader(data, 8, shuffle=True, generator=generator(3))
    sampler = RandomSampler(data, generator=generator(3))
    if kind == "sampler's":
        return DataLoader(data, 8, sampler=sampler)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 8, False))


@pytest.mark.parametrize("kind", ["torch", "loader's", "sampler's", "batch sampler's"])
def test_a_shuffled_loader_goes_on_as_it_was(kind: str, tmp_path: Path) -> None:
    """Its order follows from the epoch alone, however often it was read; conftest looks at torch's generator."""
    loader = partial(loader_of, kind)
    given = loader()
    seeds = [
        g and g.get_state() for g in (given.generator, getattr(given.sampler, "generator", None))
    ]
    batches = batches_of(given)
    epochs = [torch.cat([y for _, y in batches.epoch(i)]) for i in (0, 1, 0)]
    epochs += [torch.cat([y for _, y in batches_of(given).epoch(1)])]
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])
    for seed, now in zip(
        seeds, (given.generator, getattr(given.sampler, "generator", None)), strict=True
    ):
        assert now is None or torch.equal(seed, now.get_state())
    whole = trained(loader())
    model, path = mlp(), tmp_path / "run"
    train(mlp(), loader(), None, SGD, stop_epoch=1, total_epochs=2, checkpoint=path)
    assert train(model, loader(), None, SGD, checkpoint=path).epochs[0]["epoch"] == 1
    assert equal(model.state_dict(), whole)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if isinstance(x, tuple):
            x, scale = x
        return self.net(x if scale is None else x * scale)


class Needs(Two):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x, scale)


@pytest.mark.parametrize("model", [Two, Needs])
def test_several_inputs(model: type) -> None:
    twice = torch.full((8, 1), 2.0)
    expected = trained([(2 * x, y) for x, y in LIST], seeded(Two))
    for batches in (
        [((x, twice), y) for x, y in LIST],
        [(x, twice, y) for x, y in LIST],
        [{"x": x, "scale": twice, "label": y} for x, y in LIST],
    ):
        assert equal(trained(batches, seeded(model)), expected)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([], "expected at least one, got none"),
        (DataLoader(TensorDataset(X, Y), 64, drop_last=True), "drop_last"),
        ((b for b in LIST), "steps_per_epoch"),
        (DataLoader(Endless(), 8), "steps_per_epoch"),
        (TensorDataset(X, Y), "DataLoader"),
        ((X, Y), "in a list"),
        ("train", "got a str"),
        (X, "got float32"),
        (None, "got a NoneType"),
        (3, "expected a DataLoader"),
        (["a", "b"], "tensors in every batch"),
        (lambda: None, "gives an iterator"),
        ([{"pixels": x, "mask": y, "labels": y} for x, y in LIST], "keywords of"),
        ([{"pixels": x} for x, _ in LIST], "with a target"),
        ([x for x, _ in LIST], "with a target"),
        ([((255 * x).byte(), y) for x, y in LIST], "inputs of float32.*uint8"),
        ([(x.double(), y) for x, y in LIST], "inputs of float32.*float64"),
        ([(x.numpy().astype(np.float64), y) for x, y in LIST], "float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_data_is_told_in_a_line(batches: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as found:
        trained(batches)
    assert "\n" not in str(found.value)


def test_an_iterator_that_is_used_up() -> None:
    stream = iter(LIST)
    list(stream)
    with pytest.raises(ValueError, match="ended after 0"):
        trained(stream, steps_per_epoch=2)
    with pytest.raises(ValueError, match="ended after 2"):
        trained(iter(LIST), steps_per_epoch=3)
    with pytest.raises(ValueError, match="the same one again"):
        made = iter(LIST)
        trained(lambda: made)


def test_a_stream_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint: expected data that can be read again"):
        trained(iter(LIST), steps_per_epoch=2, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("where", [0, 3])
def test_nan_in_the_data_is_told_by_batch(where: int) -> None:
    poisoned = [(x.clone(), y) for x, y in LIST]
    poisoned[where][0][2, 1] = float("nan")
    with pytest.raises(TrainingError, match=f"batch {where + 1} of the epoch: its inputs hold NaN"):
        trained(poisoned)
    with pytest.raises(ValueError, match=f"batch {where + 1} of the epoch: its inputs hold NaN"):
        sc.JointSearch(epochs=1)(sc.sparsify_(mlp()), poisoned, sparsity=0.5)


def small(count: int) -> Dataset:
    images = (64 * randn(count, 1, 3, 4).abs()).clamp_max(255).to(torch.uint8)
    split = Split(images, torch.arange(count) % 4)
    return Dataset("small", split, split, 4, (1, 3, 4), (0.5,), (0.25,), flip_crop=False)


def flat(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *model)


def test_a_last_batch_of_one_under_batchnorm_is_left_out() -> None:
    """By a model in training alone, and told everywhere: with BatchNorm the run is that of drop_last."""
    last, dropped = (Batches(small(17), "train", 8, drop_last=drop) for drop in (None, True))
    assert (
        len(last) == 3
        and len(batches_of(last, mlp())) == 3
        and len(batches_of(last, normed())) == 2
    )
    assert equal(trained(last, flat(normed())), trained(dropped, flat(normed())))
    pixels = last.images.flatten(1).float()
    for data in (
        DataLoader(TensorDataset(pixels, last.labels), 8),
        list(zip(pixels.split(8), last.labels.split(8), strict=True)),
    ):
        assert len(batches_of(data, normed())) == 2 and len(batches_of(data, mlp())) == 3
    ticket = sc.OneShot(sc.scores.snip)(sc.sparsify_(flat(normed())), last, sparsity=0.5)
    assert ticket.sparsity == pytest.approx(0.5, abs=0.01)
    assert evaluate(flat(mlp()), last) >= 0  # which sees all samples


def test_batchnorm_on_single_samples_is_told() -> None:
    with pytest.raises(ValueError, match=r"got a batch of 1; .*drop_last=True.*batch size"):
        trained(Batches(small(4), "train", 1), flat(normed()))
    with pytest.raises(ValueError, match="drop_last=True"):
        trained(lambda: iter([*LIST, (X[:1], Y[:1])]), normed(), steps_per_epoch=6)
    with pytest.raises(ValueError, match="drop_last=True"):
        trained(
            (LIST[0] if i % 4 == 0 else (X[:1], Y[:1]) for i in range(9)),
            normed(),
            steps_per_epoch=2,
        )


def test_a_stream_goes_past_a_batch_of_one_under_batchnorm() -> None:
    """It has no end to know of: data that begins again, and one batch that is smaller."""
    again = DataLoader(Counted(17), 8)

    def sizes(model: nn.Module) -> list[int]:
        batches = batches_of(again, model, 3)
        return [len(y) for i in range(2) for _, y in batches.epoch(i)]

    assert sizes(mlp()) == [8, 8, 1] * 2 and sizes(normed()) == [8] * 6
    assert trained(again, normed(), steps_per_epoch=3)
    stream = iter([*LIST, (X[:1], Y[:1]), *LIST])
    assert sum(len(y) for _, y in batches_of(stream, normed(), 10).epoch(0)) == 80


class Counted(IterableDataset):
    """So many samples, which it does not tell."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X[: self.count], Y[: self.count], strict=True)


class Sized(IterableDataset):
    """Seventeen samples, and what it says of that."""

    def __init__(self, length: int = 17) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X[:17], Y[:17], strict=True)


class ByClass(BatchSampler):
    """Groups of its own: how many samples there are says nothing of the last."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2], [3, 4], [5, 6, 7, 8]])

    def __len__(self) -> int:
        return 3


SEVENTEEN = TensorDataset(X[:17], Y[:17])
IN_PARTS = list(zip(X[:17].split(8), Y[:17].split(8), strict=True))


def sampled(drop_last: bool) -> DataLoader:
    by = BatchSampler(RandomSampler(SEVENTEEN, generator=generator(1)), 8, drop_last)
    return DataLoader(SEVENTEEN, batch_sampler=by)


@pytest.mark.parametrize(
    ("batches", "left"),
    [
        (DataLoader(SEVENTEEN, 8), 2),
        (sampled(False), 2),
        (sampled(True), 2),
        (DataLoader(SEVENTEEN, batch_sampler=[[0, 1, 2], [3, 4], [5]]), 2),
        (DataLoader(SEVENTEEN, batch_sampler=[[0, 1, 2], [5], [3, 4]]), 3),
        (DataLoader(SEVENTEEN, batch_sampler=ByClass(range(17), 2, False)), 3),  # type: ignore[arg-type]
        (DataLoader(Sized(), 8), 2),
        (DataLoader(Sized(), 1), 17),
        (tuple(IN_PARTS), 2),
        (IN_PARTS, 2),
        (lambda: iter(IN_PARTS), 2),
        (lambda: IN_PARTS, 2),
        (lambda: DataLoader(SEVENTEEN, 8), 2),
    ],
    ids=lambda value: "" if isinstance(value, int) else type(value).__name__,
)
def test_where_a_last_batch_of_one_is_known(batches: Any, left: int) -> None:
    found = batches_of(batches, normed())
    again = batches_of(found, normed())  # as rounds of rewinding ask
    for index in (1, 0):
        sizes = [len(y) for _, y in again.epoch(index)]
        assert len(sizes) == len(found) == len(again) == left
    if left == 2:
        assert min(sizes) > 1
        assert sc.Rewinding(SGD, 1, rate=0.5)(sc.sparsify_(normed()), batches, sparsity=0.6)
    whole = [len(y) for _, y in batches_of(batches, mlp()).epoch(0)]
    assert sum(whole) in (17, 16, 9, 6)


def varying() -> Any:
    lengths = iter([2, 2, 3, 3])
    return lambda: iter(LIST[: next(lengths)])


class Short(list):
    """Tells one batch less than it has."""

    def __len__(self) -> int:
        return super().__len__() - 1


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (varying, "epoch 2: expected 2 batches, as the first epoch had, got more.*steps_per_epoch"),
        (lambda: Short(LIST), r"epoch 1: expected 4 batches, as len\(batches\) says, got more"),
        (lambda: DataLoader(Sized(9), 8), "epoch 1: expected 2 batches"),
    ],
    ids=["function", "sized", "data set"],
)
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_more_batches_than_were_told(make: Any, told: str) -> None:
    """Training goes on without them, and says so once; a measure of a part would be no measure."""
    with pytest.warns(sc.data.DataWarning, match=told) as caught:
        trained(make())
    assert len([w for w in caught if w.category is sc.data.DataWarning]) == 1
    batches = batches_of(make())
    with pytest.raises(ValueError, match=told) as found:
        for index in range(3):
            len(batches), list(batches.epoch(index))
    assert "\n" not in str(found.value)


def test_functions_that_make_fewer() -> None:
    with pytest.raises(ValueError, match="expected at least one, got none"):
        trained(lambda: iter(()))
    with pytest.raises(ValueError, match="test_batches: expected at least one, got none"):
        train(mlp(), LIST, lambda: iter(()), SGD, engine="eager")
    lengths = iter([3, 3, 2])
    with pytest.raises(ValueError, match=r"expected 3 batches.*ended after 2"):
        trained(lambda: iter(LIST[: next(lengths)]))


@pytest.mark.parametrize(
    "search",
    [
        sc.JointSearch(epochs=1),
        sc.ContinuousSparsification(epochs=1),
        sc.EdgePopup(epochs=1),
        sc.Rewinding(SGD, 1),
        sc.GradualMagnitude(SGD, 1),
        sc.OneShot(sc.scores.snip),
        sc.Iterative(sc.scores.snip, 2),
    ],
    ids=lambda search: type(search).__name__,
)
def test_no_search_takes_a_function_without_batches(search: Any) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        search(sc.sparsify_(mlp()), lambda: iter(()), sparsity=0.5)


@pytest.mark.parametrize("kind", ["stream", "endless"])
def test_what_test_data_lacks_is_what_holds_for_it(kind: str) -> None:
    with pytest.raises(
        ValueError, match=r"test_batches: expected a DataLoader.*give a list"
    ) as found:
        train(mlp(), LIST, KINDS[kind](), SGD)
    assert "steps_per_epoch" not in str(found.value)


@pytest.mark.parametrize("steps", [2.5, "2", 0, -1, float("nan")])
def test_steps_are_a_whole_number(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps_per_epoch: expected a whole number"):
        trained(iter(LIST), steps_per_epoch=steps)
    assert len(batches_of(iter(LIST), None, np.int64(2))) == 2  # type: ignore[arg-type]


def test_synflow_feeds_ones_where_embeddings_are() -> None:
    """The scores do not depend on the tokens, and are those of the layers alone."""
    body = lambda: sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))))  # noqa: E731
    text = nn.Sequential(seeded(lambda: nn.Embedding(7, 5)), *body())
    tokens = [(torch.arange(8).view(2, 4) % 7, torch.zeros(2))]
    found = sc.scores.synflow(text, tokens, 0)
    expected = sc.scores.synflow(body(), [(randn(2, 4, 5), torch.zeros(2))], 0)
    assert torch.allclose(found["1"], expected["0"]) and torch.allclose(found["2"], expected["1"])


def test_steps_of_ones_own_take_dicts() -> None:
    model = seeded(Needs)
    batch = {"x": X[:8], "scale": torch.ones(8, 1), "label": Y[:8]}
    step = sc.TrainStep(
        model, None, torch.optim.SGD(model.parameters(), 0.1), batch, engine="eager"
    )
    assert step(batch) > step(batch)
