"""Paths of models without classes, and of loaders as users have them: the loss is measured, errors are not made up."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import Blobs, mlp, randn, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsecore as sc
from sparsecore import figures
from sparsecore.connectivity import (
    LinearPath,
    barrier,
    instability,
    is_stable,
    path_errors,
    rewind_by_instability,
)
from sparsecore.regions import round_paths

X = randn(40, 12, seed=1)
Y = X[:, :4] @ randn(4, 4, seed=2)
RECIPE = sc.Recipe(epochs=2, lr=0.05, weight_decay=0)


def loader(seed: int = 0) -> DataLoader:
    order = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=order)


def ends() -> list[dict]:
    return [mlp(seed=i).state_dict() for i in range(2)]


def test_a_path_of_a_regression_measures_its_loss() -> None:
    a, b = ends()
    path = path_errors(mlp(), a, b, loader(), loss="mse", points=3)
    assert all(map(math.isnan, path.errors))
    probe = mlp()
    for alpha, found in zip(path.alphas, path.losses, strict=True):
        probe.load_state_dict({k: (1 - alpha) * a[k] + alpha * b[k] for k in a})
        expected = F.mse_loss(probe(X), Y).item()
        assert found == pytest.approx(expected, rel=1e-5)
    by_function = path_errors(mlp(), a, b, loader(), loss=lambda o, t: F.mse_loss(o, t), points=3)
    assert by_function.losses == pytest.approx(path.losses, rel=1e-6)


def test_barriers_of_losses_need_a_threshold_of_their_unit() -> None:
    path = LinearPath((0.0, 0.5, 1.0), (math.nan,) * 3, (1.0, 4.0, 2.0))
    assert barrier(path, "loss") == 2.5
    assert not is_stable(path, 2.5, of="loss") and is_stable(path, 2.6, of="loss")
    with pytest.raises(ValueError, match="of='loss'"):
        barrier(path)
    with pytest.raises(ValueError, match="threshold: expected a number in the loss's own unit"):
        is_stable(path, of="loss")
    with pytest.raises(ValueError, match="of 'error' or 'loss', got 'errors'"):
        barrier(path, "errors")  # type: ignore[arg-type]


def test_instability_of_a_regression_on_loaders() -> None:
    zero = instability(mlp(), RECIPE, loader, loader(), loss="mse", seeds=(1, 1), points=3)
    assert barrier(zero.path, "loss") == 0
    found = instability(mlp(), RECIPE, loader, loader(), loss="mse", points=3)
    assert barrier(found.path, "loss") > 0


def test_a_scan_of_a_regression() -> None:
    scan = rewind_by_instability(
        mlp(), RECIPE, loader, loader(), [0, 1], loss="mse", of="loss", threshold=100.0, points=3
    )
    assert scan.earliest == 0 and set(scan.instabilities) == {0, 1}
    assert (scan.threshold, scan.of) == (100.0, "loss")


def test_a_stream_trains_both_runs() -> None:
    def stream(seed: int):
        while True:
            yield from loader(seed)

    found = instability(
        mlp(), RECIPE, stream, loader(), loss="mse", steps_per_epoch=2, seeds=(1, 1), points=3
    )
    assert barrier(found.path, "loss") == 0


@pytest.mark.parametrize("loss", ["mse", lambda o, t: F.mse_loss(o, t)])
def test_a_scan_without_classes_is_refused_before_anything_is_trained(loss: Callable) -> None:
    def untouched(seed: int) -> DataLoader:
        raise AssertionError("trained")

    for options in ({}, {"of": "loss"}):
        with pytest.raises(ValueError, match=r"of='loss'|threshold: expected"):
            rewind_by_instability(mlp(), RECIPE, untouched, loader(), [0], loss=loss, **options)


def test_rounds_of_a_regression(tmp_path) -> None:
    def rounds(seed: int):
        trained = mlp(seed=seed).state_dict()
        masks = {n: torch.ones_like(trained[f"{n}.weight"], dtype=torch.bool) for n in "02"}
        return SimpleNamespace(masks=masks, trained=trained)

    (path,) = round_paths(mlp(), [rounds(0), rounds(1)], loader(), loss="mse", points=3)
    assert path.losses == path_errors(mlp(), *ends(), loader(), loss="mse", points=3).losses
    assert figures.draw_paths(tmp_path / "path.png", {"a": path}).stat().st_size


def test_what_statistics_are_measured_on_may_be_a_loader() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4)))
    data = list(Blobs())
    path = path_errors(
        model, model.state_dict(), model.state_dict(), data, points=2, train_batches=data
    )
    assert path.losses[0] == path.losses[1]


def test_a_path_of_another_loss_is_another_path(tmp_path) -> None:
    measure = partial(path_errors, mlp(), *ends(), loader(), points=3, checkpoint=tmp_path / "path")
    path = measure(loss="mse")
    assert measure(loss="mse").losses == path.losses
    with pytest.raises(ValueError, match="another path"):
        measure(loss=F.l1_loss)
