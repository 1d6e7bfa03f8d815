"""Masks that move under a plan: a checkpoint's moments are those of its own masks."""

from pathlib import Path

from helpers import Blobs, equal, mlp, rand
from torch import Tensor

import sparsecore as sc
from sparsecore.tickets import dense_state
from sparsecore.training import Recipe, Step, train

MASKS = [rand(24, 12, seed=i) < 0.3 * (i + 1) for i in range(2)]  # of other sizes


def trained(stop: float, checkpoint: Path | None) -> dict[str, Tensor]:
    model = sc.sparsify_(mlp())
    sc.Ticket({"0": MASKS[0]}, dense_state(model)).apply_(model)
    sc.plan_(model, "csr", Blobs().x[:4])

    def moved(step: Step) -> None:
        if step.index == 2:
            sc.remask_(step.model, {"0": MASKS[1]}, step.optimizer)

    recipe = Recipe(optimizer="adam", lr=1e-2, epochs=3)
    train(
        model, Blobs(), None, recipe, stop_epoch=stop, total_epochs=3, after_step=moved,
        checkpoint=checkpoint, engine="eager",
    )  # fmt: skip
    return dense_state(model)


def test_a_run_goes_on_with_the_moments_of_its_masks(tmp_path: Path) -> None:
    path = tmp_path / "c"
    trained(1, path)
    assert equal(trained(3, path), trained(3, None))
