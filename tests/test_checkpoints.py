"""What a checkpoint belongs to: the run, its loss, and all data that lies in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn, seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsecore as sc
from sparsecore import checkpoints
from sparsecore.loaders import batches_of
from sparsecore.losses import Loss
from sparsecore.training import Recipe, train

X, Y = randn(24, 6), torch.arange(24) % 3
LATER = Y.clone()
LATER[20:] = LATER[20:].flip(0)
MOVED = X.clone()
MOVED[20:] = MOVED[20:].flip(0)
RECIPE = Recipe(optimizer="adam", lr=0.01, batch=8, epochs=2)

KINDS: dict[str, Any] = {
    "list": lambda x, y: list(zip(x.split(8), y.split(8), strict=True)),
    "tuple": lambda x, y: tuple(zip(x.split(8), y.split(8), strict=True)),
    "dicts": lambda x, y: [
        {"input": a, "y": b} for a, b in zip(x.split(8), y.split(8), strict=True)
    ],
    "arrays": lambda x, y: [
        (a.numpy(), b.numpy()) for a, b in zip(x.split(8), y.split(8), strict=True)
    ],
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), 8),
}


def net() -> nn.Module:
    return sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))))


@pytest.mark.parametrize(("x", "y"), [(X, LATER), (MOVED, Y)], ids=["labels", "inputs"])
@pytest.mark.parametrize("kind", KINDS)
def test_data_that_differ_later_are_other_data(kind: str, x: torch.Tensor, y: torch.Tensor) -> None:
    prints = [
        checkpoints.fingerprint(net(), batches_of(KINDS[kind](*data)))
        for data in ((X, Y), (X.clone(), Y.clone()), (x, y))
    ]
    assert prints[0] == prints[1]
    assert not checkpoints.same_run(prints[0], prints[2])


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    make, path = KINDS["list"], tmp_path / "run"
    search = sc.Rewinding(RECIPE, 1, rate=0.5, rounds=tmp_path / "rounds")
    train(net(), make(X, Y), None, RECIPE, checkpoint=path)
    search(net(), make(X, Y), sparsity=0.5)
    for run in (
        lambda: train(net(), make(X, LATER), None, RECIPE, checkpoint=path),
        lambda: search(net(), make(X, LATER), sparsity=0.5),
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            run()


def test_a_file_from_before_that_goes_on() -> None:
    """It tells of the first batch alone."""
    now = checkpoints.fingerprint(net(), batches_of(KINDS["list"](X, Y)), "a fact")
    before, _, data = now.partition("-")
    assert len(before) == 64 and data
    assert checkpoints.same_run(before, now) and checkpoints.same_run(before * 2, now * 2)
    assert not checkpoints.same_run(before[::-1], now) and not checkpoints.same_run(None, now)

    class Fixed:
        def __len__(self) -> int:
            return 3

        def epoch(self, index: int) -> Any:
            return iter(KINDS["list"](X, Y))

    assert checkpoints.fingerprint(net(), Fixed(), "a fact") == before
    assert checkpoints.fingerprint(net(), Fixed(), "a fact", loss=Loss()) == before


def test_rounding_by_other_threads_does_not_tell() -> None:
    x = X.clone()
    x[::5] *= 1 + 2e-7  # an ulp or two
    made = [checkpoints._of_contents(batches_of(KINDS["list"](data, Y))) for data in (X, x)]
    assert not torch.equal(x, X) and made[0] == made[1]


def test_data_are_looked_at_once_and_again_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    digest_of = checkpoints._digest_of
    monkeypatch.setattr(checkpoints, "_digest_of", lambda d: looked.append(1) or digest_of(d))
    x = X.clone()
    batches = batches_of([(x, Y)])
    first = [checkpoints.fingerprint(net(), batches) for _ in range(3)]
    assert len(looked) == 1 and len(set(first)) == 1
    x[-1] += 1
    assert checkpoints.fingerprint(net(), batches) != first[0] and len(looked) == 2


def test_sums_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = X.reshape(-1)
    whole = checkpoints._sums_over_places(flat)
    monkeypatch.setattr(checkpoints, "_PIECE", 7)
    assert checkpoints._sums_over_places(flat) == pytest.approx(whole, rel=1e-12)
