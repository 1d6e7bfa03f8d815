"""Inputs that a model does not take are told in a line: their dtype, their number, their shape."""

from typing import Any

import pytest
import torch
from helpers import rand, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.calls import forward
from sparsecore.training import Recipe, evaluate, train

Y = torch.arange(8) % 3


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))


def attentive() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))


def embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


SHAPES: dict[Any, tuple[int, ...]] = {
    dense: (8, 6),
    convolutional: (8, 1, 6, 6),
    attentive: (8, 4, 6),
    Recurrent: (8, 4, 6),
}
SEARCHES: list[Any] = [
    lambda m, b: evaluate(m, b),
    lambda m, b: sc.OneShot(sc.scores.snip)(m, b, sparsity=0.5),
    lambda m, b: sc.JointSearch(epochs=1)(m, b, sparsity=0.5),
    lambda m, b: sc.Rewinding(Recipe(lr=0.01), 1)(m, b, sparsity=0.1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.int64])
@pytest.mark.parametrize("build", SHAPES)
def test_inputs_of_another_dtype(build: Any, dtype: torch.dtype) -> None:
    x = (9 * rand(*SHAPES[build])).to(dtype)
    named = str(dtype).removeprefix("torch.")
    model = sc.sparsify_(seeded(build))
    for run in SEARCHES:
        with pytest.raises(ValueError, match=rf"(expected inputs of float32.*got {named}|{named})"):
            run(model, [(x, Y)] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_tokens_of_another_dtype(dtype: torch.dtype) -> None:
    model, x = sc.sparsify_(seeded(embedded), "!0"), (8 * rand(8, 4)).to(dtype)
    for run in SEARCHES:
        with pytest.raises(ValueError, match="expected inputs of int64, as an embedding"):
            run(model, [(x, Y)] * 2)


class Two(nn.Module):
    """Numbers beside tokens and a mask: what is right of them is not blamed."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.a(self.e(tokens) * mask[:, None] + x)


def test_the_input_that_is_wrong_is_named() -> None:
    model, tokens, mask = seeded(Two), torch.arange(8), Y > 0
    batch = {"tokens": tokens, "mask": mask, "x": rand(8, 6, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"got float64 \[8, 6\]"):
        forward(model, batch)
    batch["x"] = batch["x"].float()
    assert forward(model, batch).shape == (8, 3)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((rand(8, 6), Y, rand(8)), r"takes one input, got 3 parts.*function of \(model, batch\)"),
        ((rand(8, 6), Y, torch.arange(8)), "takes one input, got 3 parts"),
        ((rand(8, 5), Y), r"got float32 \[8, 5\] \(RuntimeError: mat1 and mat2"),
        ((Y, rand(8, 6)), r"expected inputs of float32.*got int64 \[8\]"),
    ],
    ids=["weights", "numbers", "width", "order"],
)
def test_batches_of_another_kind(batch: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        train(sc.sparsify_(seeded(dense)), [batch], None, Recipe(epochs=1, batch=8))
    assert error.value.__cause__ is not None


def test_weights_of_samples_go_beside_the_target_or_to_a_loss_of_the_batch() -> None:
    x, w = rand(8, 6), rand(8)
    weighed = lambda o, y, w: (w * F.cross_entropy(o, y, reduction="none")).mean()  # noqa: E731
    first = lambda output, target: weighed(output, *target)  # noqa: E731
    second = lambda model, b: weighed(model(b[0]), b[1], b[2])  # noqa: E731
    losses = []
    for batch, loss in (((x, (Y, w)), first), ((x, Y, w), second)):
        model = sc.sparsify_(seeded(dense))
        history = train(model, [batch], None, Recipe(epochs=1, batch=8), loss=loss)
        losses.append(history.epochs[-1]["loss"])
    assert losses[0] == losses[1]


def test_an_error_of_the_model_itself_is_its_own() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.missing

    with pytest.raises(AttributeError, match="missing"):
        forward(seeded(Broken), rand(8, 6))
