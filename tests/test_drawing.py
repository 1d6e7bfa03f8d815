"""What data draws follows from the epoch's number, whoever's generator it is, and leaves all as they were."""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import equal, generator, mlp, randn
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
)

import sparsecore as sc
from sparsecore.drawing import Drawing, global_sources, held_sources
from sparsecore.loaders import batches_of
from sparsecore.training import Recipe, train

X, Y = randn(24, 12), torch.arange(24) % 4
SGD = Recipe(lr=0.05, batch=8, epochs=3, schedule="constant")
AT_MODULE_LEVEL = np.random.default_rng(5)


class Augmented(Dataset):
    """Samples times a number that `draw` gives."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] * (1 + self.draw()), Y[index]


class Own(Augmented):
    """The same with a generator of its own, as augmentations hold one."""

    def __init__(self, made: Any) -> None:
        self.inner = {"transforms": [made]}
        super().__init__(made.random)


class Slotted:
    __slots__ = ("own",)

    def __init__(self) -> None:
        self.own = random.Random(3)

    def random(self) -> float:
        return self.own.random()


class Stored(IterableDataset):
    def __init__(self) -> None:
        self.own = np.random.RandomState(1)

    def __len__(self) -> int:
        return len(X)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((X[i], Y[i]) for i in self.own.permutation(len(X)))


def module_level() -> float:
    return AT_MODULE_LEVEL.random()


def within_an_expression() -> float:
    return sum(AT_MODULE_LEVEL.random() for _ in range(2))


def drawn_by_torch() -> float:
    return float(torch.rand(()))


def shuffling(draw: Callable[[int], Any]) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    def epochs() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.as_tensor(draw(len(X)))
        for rows in order.split(8):
            yield X[rows], Y[rows]

    return epochs


def of_a_torch_generator() -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    own = generator(4)
    return shuffling(lambda n: torch.randperm(n, generator=own))


def given(batches: Any) -> Callable[[], Any]:
    return lambda: batches


class Scaling:
    """A collate that augments whole batches."""

    def __init__(self) -> None:
        self.own = random.Random(1)

    def __call__(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(part) for part in zip(*rows, strict=True))
        return x * self.own.random(), y


def loader(data: Dataset, **options: Any) -> DataLoader:
    return DataLoader(data, 8, **{"shuffle": True, **options})


def batch_sampler(shuffled: RandomSampler) -> DataLoader:
    return DataLoader(Augmented(random.random), batch_sampler=BatchSampler(shuffled, 8, False))


KINDS: dict[str, Callable[[], Any]] = {
    "python": lambda: loader(Augmented(random.random)),
    "numpy": lambda: loader(Augmented(np.random.rand)),
    "numpy's normal": lambda: loader(Augmented(np.random.randn)),  # of which every second is kept
    "torch": lambda: loader(Augmented(drawn_by_torch)),
    "in a worker": lambda: loader(Augmented(random.random), num_workers=1),
    "in persistent workers": lambda: loader(
        Augmented(np.random.rand), num_workers=1, persistent_workers=True
    ),
    "a data set's numpy": lambda: loader(Own(np.random.default_rng(3))),
    "a data set's legacy numpy": lambda: loader(Own(np.random.RandomState(3))),
    "a data set's python": lambda: loader(Own(random.Random(3))),
    "in slots": lambda: loader(Own(Slotted())),
    "at module level": lambda: loader(Augmented(module_level)),
    "within an expression": lambda: loader(Augmented(within_an_expression)),
    "a subset of joined sets": lambda: loader(
        Subset(ConcatDataset([Own(np.random.default_rng(3)), Own(random.Random(2))]), range(40))
    ),
    "an iterable data set's": lambda: DataLoader(Stored(), 8),
    "a batch sampler's": lambda: batch_sampler(
        RandomSampler(range(24), generator=generator(3))  # type: ignore[arg-type]
    ),
    "a collate's": lambda: loader(Augmented(lambda: 0.0), collate_fn=Scaling()),
    "a function by torch": lambda: shuffling(torch.randperm),
    "a function by numpy": lambda: shuffling(np.random.permutation),
    "a function by its closure": of_a_torch_generator,
    "a function of a loader": lambda: given(loader(Augmented(random.random))),
}


def states(kind: Any) -> list[str]:
    held = [source.read() for source in held_sources(kind)]
    return [
        repr(s) for s in (random.getstate(), np.random.get_state(), torch.get_rng_state(), held)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_draws_by_its_number(kind: str, tmp_path: Path) -> None:
    """However often it is read, whatever was read or drawn before, in a run that was killed and one that was not."""
    given = KINDS[kind]()
    before = states(given)
    batches = batches_of(given)
    epochs = [list(batches.epoch(i)) for i in (1, 0, 1)] + [list(batches_of(given).epoch(1))]
    next(iter(batches.epoch(0)))  # left in the middle
    assert states(given) == before
    read = [torch.cat([x for x, _ in epoch]) for epoch in epochs]
    assert torch.equal(read[0], read[2]) and torch.equal(read[0], read[3])
    assert not torch.equal(read[0], read[1])
    whole, model, path = mlp(), mlp(), tmp_path / "run"
    train(whole, KINDS[kind](), None, SGD, engine="eager")
    run = {"checkpoint": path, "engine": "eager", "total_epochs": 3}
    train(mlp(), KINDS[kind](), None, SGD, stop_epoch=1, **run)
    saved = random.getstate(), np.random.get_state()
    try:
        random.seed(9), np.random.seed(9)  # another process has drawn otherwise
        train(model, KINDS[kind](), None, SGD, **run)
    finally:
        random.setstate(saved[0]), np.random.set_state(saved[1])
    assert equal(model.state_dict(), whole.state_dict())


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["in persistent workers", "a batch sampler's", "numpy"])
@pytest.mark.parametrize(
    "search",
    [sc.Rewinding(Recipe(lr=0.05), 2, rate=0.5), sc.JointSearch(epochs=3, engine="eager")],
    ids=["ltr", "joint"],
)
def test_a_search_goes_on_to_the_same_ticket(search: Any, kind: str, tmp_path: Path) -> None:
    asked = []

    def killing(model: Any) -> float:
        asked.append(1)
        if len(asked) == 2:
            raise Killed
        return 0.0

    def found(**options: Any) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sc.SparsityWarning)
            return dict(search(sc.sparsify_(mlp()), KINDS[kind](), sparsity=0.7, **options).masks)

    with pytest.raises(Killed):
        found(checkpoint=tmp_path / "run", watch=killing)
    assert equal(found(checkpoint=tmp_path / "run", watch=lambda m: 0.0), found())


def test_workers_that_live_on_are_left_to_their_loader() -> None:
    given = KINDS["in persistent workers"]()
    with torch.random.fork_rng(devices=[]):
        own = iter(given)
    list(batches_of(given).epoch(0))
    assert given.persistent_workers and given._iterator is own


class Slow(Augmented):
    """Whose first samples take longest."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.2 * (index < 8))
        return X[index], Y[index]


def test_workers_batches_come_in_order() -> None:
    given = DataLoader(Slow(random.random), 8, num_workers=2, in_order=False)
    assert torch.equal(torch.cat([x for x, _ in batches_of(given).epoch(0)]), X)
    assert not given.in_order


def test_what_draws_nothing_of_its_own_holds_no_generator() -> None:
    assert not held_sources(loader(Augmented(random.random)))
    assert not held_sources([(X, Y)] * 3)
    large = Own(random.Random(1))
    large.rows = list(range(100_000))  # type: ignore[attr-defined]
    assert len(held_sources(large)) == 1


@pytest.mark.parametrize("draws", [False, True])
def test_states_that_nobody_draws_from_are_left_alone(draws: bool) -> None:
    """They would take a tenth of a millisecond a batch."""
    drawing = Drawing(global_sources("1"), "0")
    draw = random.random if draws else int
    drawn = [drawing(draw) for _ in range(6)]
    assert len(drawing.sources) == 1 + draws  # torch's stays
    assert len(set(drawn)) == (6 if draws else 1)
    again = Drawing(global_sources("1"), "0")
    assert drawn == [again(draw) for _ in range(6)]
