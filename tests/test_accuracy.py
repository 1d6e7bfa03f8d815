"""Accuracy is printed where it is certain what it is, of the labels that count, and means are over those too."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.losses import Loss
from sparsecore.training import Recipe, evaluate, train

X = randn(24, 6)
LABELS = torch.arange(24) % 4
ADAM = Recipe(optimizer="adam", lr=1e-6, batch=24, epochs=1)


def net() -> nn.Module:
    return sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(6, 4))))


def percent(model: nn.Module) -> float:
    return 100 * (model(X).argmax(1) == LABELS).float().mean().item()


def ordinal(output: Tensor, target: Tensor) -> Tensor:
    """Of cumulative logits: integer labels, and no class scores."""
    return F.binary_cross_entropy_with_logits(output, (torch.arange(4) < target[:, None]).float())


class Focal(nn.CrossEntropyLoss):
    pass


CLASSIFIERS: list[Any] = [
    None, "cross-entropy", F.cross_entropy, nn.CrossEntropyLoss(), nn.NLLLoss(), nn.MultiMarginLoss(), F.nll_loss,
    F.multi_margin_loss, Focal(), functools.partial(F.cross_entropy, label_smoothing=0.1),
    Loss(lambda output, y: F.cross_entropy(output, y), class_axis=1),
    torch.compile(nn.CrossEntropyLoss(), backend="eager"),
]  # fmt: skip
OTHERS: list[Any] = [
    ordinal, lambda output, y: F.cross_entropy(output, y), functools.partial(ordinal), Loss(ordinal),
    lambda model, b: F.cross_entropy(model(b[0]), b[1]), nn.PoissonNLLLoss(),
]  # fmt: skip


@pytest.mark.parametrize("loss", CLASSIFIERS)
def test_accuracy_under_losses_of_class_scores(loss: Any) -> None:
    model = net()
    assert evaluate(model, [(X, LABELS)], loss=loss) == pytest.approx(percent(model))
    assert "accuracy" in train(model, [(X, LABELS)], [(X, LABELS)], ADAM, loss=loss).epochs[-1]


@pytest.mark.parametrize("loss", OTHERS[:-1])
def test_other_functions_have_none_unless_it_is_asked_for(loss: Any) -> None:
    model, data = net(), [(X, LABELS)]
    with pytest.raises(ValueError, match=r"metric='accuracy'.*class_axis.*metric="):
        evaluate(model, data, loss=loss)
    record = train(net(), data, data, ADAM, loss=loss).epochs[-1]
    assert "accuracy" not in record and record["test_loss"] > 0
    assert evaluate(model, data, "accuracy", loss) == pytest.approx(percent(model))
    with pytest.raises(ValueError, match="metric='accuracy'"):
        _ = train(net(), data, data, ADAM, loss=loss).accuracy
    record = train(net(), data, data, ADAM, loss=loss, metric="accuracy").epochs[-1]
    assert record["accuracy"] == pytest.approx(percent(model))


def test_an_accuracy_that_is_none_is_refused_before_anything_trains() -> None:
    model, y = net(), randn(24, 4)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="metric accuracy: expected a loss with classes, got mse"):
        train(model, [(X, y)], [(X, y)], ADAM, loss="mse", metric="accuracy")
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(ValueError, match=r"metric accuracy: expected targets.*got float32"):
        evaluate(model, [(X, y)], "accuracy", F.l1_loss)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=255),
        functools.partial(F.cross_entropy, ignore_index=255),
        functools.partial(nn.CrossEntropyLoss(), ignore_index=255),
        nn.NLLLoss(ignore_index=255),
    ],
)
def test_a_losss_own_label_is_left_out(loss: Any) -> None:
    if isinstance(loss, functools.partial) and isinstance(loss.func, nn.Module):
        loss = Loss(loss.func.__class__(ignore_index=255))
    x = randn(8, 1, 4, 4)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 1), nn.LogSoftmax(1)))
    y = model(x).argmax(1)
    y[0], y[1:, :2] = 255, 255
    assert evaluate(model, [(x[:3], y[:3]), (x[3:], y[3:])], loss=loss) == 100
    mean = evaluate(model, [(x[:3], y[:3]), (x[3:], y[3:])], loss)
    assert mean == pytest.approx(F.nll_loss(model(x), y, ignore_index=255).item(), rel=1e-5)


def test_labels_of_no_class_are_no_misses() -> None:
    y = LABELS.clone()
    y[:3] = 255
    with pytest.raises(
        ValueError, match=r"labels of the model's classes, got 3 others among 24.*ignore_index"
    ):
        evaluate(net(), [(X, y)])


def test_nan_is_no_prediction() -> None:
    assert evaluate(net(), [(X * float("nan"), 0 * LABELS)]) == 0


def test_a_metric_may_be_a_number() -> None:
    model, data = net(), [(X[:16], LABELS[:16]), (X[16:], LABELS[16:])]
    hits = lambda output, y: (output.argmax(1) == y).float().mean()  # noqa: E731
    for metric in (hits, lambda o, y: float(hits(o, y)), lambda o, y: hits(o, y).numpy()):
        assert evaluate(model, data, metric) == pytest.approx(percent(model) / 100)
    with pytest.raises(ValueError, match=r"^metric .*one number, got bool \[16\]; take its mean"):
        evaluate(model, data, lambda output, y: output.argmax(1) == y)
    with pytest.raises(ValueError, match="metric: expected one of accuracy, cross-entropy"):
        evaluate(model, data, "f1")


LEFT_OUT = LABELS.clone()
LEFT_OUT[:9] = -100
WEIGHT = torch.tensor([1.0, 10.0, 0.1, 3.0])


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (None, LEFT_OUT),
        (nn.CrossEntropyLoss(), LEFT_OUT),
        (functools.partial(F.cross_entropy, ignore_index=2), LABELS),
        (nn.CrossEntropyLoss(weight=WEIGHT), LEFT_OUT.sort().values),
        (lambda output, y: F.cross_entropy(output, y), LABELS),
    ],
    ids=["named", "module", "partial", "weights", "function"],
)
def test_parts_of_a_batch_add_up_to_it(loss: Any, y: Tensor) -> None:
    """Gradients and the loss in the record, however many labels count in each part; a part may have none."""
    models, means = [], []
    for accumulate in (1, 3):
        models.append(net())
        recipe = Recipe(lr=1.0, momentum=0, batch=24, epochs=1, accumulate=accumulate)
        history = train(models[-1], [(X, y)], None, recipe, loss=loss, engine="eager")
        means.append(history.epochs[-1]["loss"])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    assert means[0] == pytest.approx(Loss(loss)(net(), (X, y)).item(), rel=1e-6)


def test_the_record_is_a_mean_over_labels_as_the_test_loss_is() -> None:
    data = [(X[:12], LEFT_OUT[:12]), (X[12:], LEFT_OUT[12:])]
    record = train(net(), data, data, ADAM, metric="cross-entropy", engine="eager").epochs[-1]
    expected = F.cross_entropy(net()(X), LEFT_OUT).item()
    assert record["loss"] == pytest.approx(expected, rel=1e-4)
    assert record["metric"] == pytest.approx(expected, rel=1e-4)


class Language(nn.Module):
    """Its loss has each token predict the next, or name itself."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.e, self.o = shift, nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores, s = self.o(self.e(ids)), self.shift
        scored = scores[:, : scores.shape[1] - s].flatten(0, 1)
        return {"loss": F.cross_entropy(scored, labels[:, s:].flatten()), "logits": scores}


@pytest.mark.parametrize("shift", [0, 1])
def test_a_models_own_loss_is_over_the_labels_that_it_counts(shift: int) -> None:
    ids = (7 * randn(6, 5)).abs().long() % 9
    labels = ids.clone()
    labels[:3, 2:] = -100
    model = seeded(lambda: Language(shift))
    parts = [{"ids": i, "labels": y} for i, y in zip(ids.split(4), labels.split(4), strict=True)]
    whole = model(ids, labels)["loss"].item()
    assert evaluate(model, parts, Loss()) == pytest.approx(whole, rel=1e-5)


def test_probabilities_may_have_their_classes_last() -> None:
    scores, soft = randn(4, 6, 9), randn(4, 6, 9, seed=1).softmax(-1)
    expected = F.cross_entropy(scores.flatten(0, 1), soft.flatten(0, 1))
    found = Loss("cross-entropy").of(scores, (X, soft))
    torch.testing.assert_close(found, expected)
    first = Loss("cross-entropy").of(scores.movedim(-1, 1), (X, soft.movedim(-1, 1)))
    torch.testing.assert_close(first, expected)


def test_axes_that_nothing_tells_are_refused() -> None:
    with pytest.raises(ValueError, match="class_axis=1"):
        Loss().class_scores(randn(4, 6, 9))
    assert Loss(class_axis=-1).class_scores(randn(4, 6, 9)).shape == (4, 9, 6)
    with pytest.raises(ValueError, match=r"class_axis: expected an axis.*got 7"):
        Loss("cross-entropy", class_axis=7).of(randn(4, 6), (X, LABELS[:4]))
    with pytest.raises(ValueError, match=r"class_axis="):
        Loss("cross-entropy", class_axis=1).of(randn(4, 6, 9), (X, torch.ones(4, 6).long()))


def test_a_function_may_leave_labels_out_by_itself() -> None:
    """What it copes with counts where it is a class, and is no error."""
    model, y = net(), LABELS.clone()
    y[::3] = 255
    own = Loss(lambda o, t: F.cross_entropy(o, t, ignore_index=255) + 0, class_axis=1)
    by_name = nn.CrossEntropyLoss(ignore_index=255)
    assert evaluate(model, [(X, y)], loss=own) == evaluate(model, [(X, y)], loss=by_name)


def test_test_data_that_do_not_fit_are_refused_before_anything_moves() -> None:
    """As soft targets in training and labels in the test data."""
    model, soft = net(), F.one_hot(LABELS, 4).float()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe, state = Recipe(epochs=1, lr=0.1), torch.get_rng_state()
    loss = Loss(lambda output, target: -(target * output.log_softmax(1)).sum(1).mean())
    with pytest.raises(ValueError, match="say metric='accuracy'"):
        train(model, [(X, soft)], [(X, LABELS)], recipe, loss=loss)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    found = train(model, [(X, soft)], [(X, LABELS)], recipe, loss=loss, metric="accuracy")
    assert "accuracy" in found.epochs[-1]


def test_a_loss_that_counts_its_calls_is_one_loss() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(output, target)

    loss = Loss(Counting())
    facts = loss.facts
    evaluate(net(), [(X, LABELS)], metric=loss)
    assert loss.fn.calls and loss.facts == facts  # type: ignore


def test_what_is_no_number_loses_no_run(tmp_path: Path) -> None:
    """A metric or a watched number may be NaN: JSON has none, and the run goes on and is kept."""
    data, recipe = [(X, LABELS)] * 4, Recipe(epochs=2, lr=0.1)
    options: Any = {"metric": lambda o, t: o.sum() * torch.nan, "checkpoint": tmp_path / "run"}
    train(net(), data, data, recipe, stop_epoch=1, total_epochs=2, **options)
    found = train(net(), data, data, recipe, metrics=tmp_path / "lines", **options)
    assert [math.isnan(e["metric"]) for e in found.epochs] == [True, True]
    assert json.loads((tmp_path / "lines").read_text().splitlines()[-1])["metric"] is None
    for search in (sc.JointSearch(epochs=2), sc.Rewinding(recipe, 1), sc.SET(recipe, 2)):
        folder = {"rounds": tmp_path / "rounds"} if isinstance(search, sc.Rewinding) else {}
        search = dataclasses.replace(search, **folder)
        ticket = search(net(), data, sparsity=0.5, watch=lambda m: torch.inf)
        ticket.save(tmp_path / "ticket")
        assert sc.Ticket.load(tmp_path / "ticket").hash == ticket.hash
