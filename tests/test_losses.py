"""The loss: what shapes leave no doubt about, what is refused, and the same value through all that take one."""

from typing import Any, NamedTuple

import pytest
import torch
from helpers import randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.accuracy import hits
from sparsecore.losses import Loss, loss_of
from sparsecore.training import Recipe, evaluate, train

IDS = (7 * randn(24, 6)).abs().long() % 9
LABELS = torch.arange(24) % 4
SGD = Recipe(lr=0.05, batch=8, epochs=2, schedule="constant")


class Own(nn.Module):
    """A classifier of vectors or tokens whose output is of some kind; dicts give it its names."""

    def __init__(self, kind: str = "tensor", outputs: int = 4) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 16), nn.Linear(16, outputs)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.a(x).relu()
        scores = self.b(h)
        if self.kind == "tuple":
            return scores, h
        if self.kind == "own" and labels is not None:
            return {"loss": F.cross_entropy(scores, labels), "logits": scores}
        return {"tensor": scores, "own": {"logits": scores}, "dict": {"logits": scores}}[self.kind]


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 9)

    def forward(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.b(self.a(self.e(ids)).relu())


def net(kind: str = "tensor", outputs: int = 4) -> nn.Module:
    return sc.sparsify_(seeded(lambda: Own(kind, outputs)))


def cut(x: Tensor, y: Tensor) -> list[Any]:
    return list(zip(x.split(8), y.split(8), strict=True))


X = randn(24, 6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_integers_are_labels(dtype: torch.dtype) -> None:
    scores = randn(24, 4)
    assert torch.equal(Loss().of(scores, (X, LABELS.to(dtype))), F.cross_entropy(scores, LABELS))


def test_pixels_have_their_classes_on_axis_1() -> None:
    scores, y = randn(5, 3, 4, 2), (torch.arange(40) % 3).view(5, 4, 2)
    y[0] = -100
    assert torch.equal(Loss().of(scores, (X, y)), F.cross_entropy(scores, y))
    right, counts, others = hits(Loss(), scores, (X, y))
    assert (
        int(counts.sum()) == 32 and torch.equal(right, scores.argmax(1) == y) and not others.any()
    )


@pytest.mark.parametrize(
    ("scores", "target"),
    [
        (randn(5, 1), randn(5, 1)),
        (randn(5), randn(5)),
        (randn(5, 3), randn(5, 3)),
        (randn(5, 1), torch.ones(5, dtype=torch.int64)),
        (randn(5, 3), torch.ones(5, 1, dtype=torch.int64)),
        (randn(5, 4, 3), torch.ones(5, 4, dtype=torch.int64)),
        (randn(5, 4, 4), torch.ones(5, 4, dtype=torch.int64)),
        (randn(5, 3), torch.ones(5, dtype=torch.bool)),
        ((randn(5, 3), randn(5, 2)), torch.ones(5, dtype=torch.int64)),
    ],
    ids=str,
)
def test_what_is_in_doubt_is_refused_by_the_default(scores: Any, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"loss="):
        Loss().of(scores, (X[:5], target))


def test_torchs_own_losses_do_not_broadcast_or_give_0() -> None:
    for fn in (F.mse_loss, nn.MSELoss(), F.l1_loss):
        with pytest.raises(ValueError, match="broadcast"):
            Loss(fn).of(randn(5, 1), (X, randn(5)))
    for fn in (F.cross_entropy, nn.CrossEntropyLoss()):
        with pytest.raises(ValueError, match="is 0 whatever"):
            Loss(fn).of(randn(5, 1), (X, randn(5, 1)))


def test_names() -> None:
    out, y = randn(5, 1), randn(5, seed=2)
    assert torch.equal(Loss("mse").of(out, (X, y)), F.mse_loss(out[:, 0], y))
    many = (randn(5, 3) > 0).long()
    expected = F.binary_cross_entropy_with_logits(randn(5, 3, seed=1), many.float())
    assert torch.equal(Loss("bce").of(randn(5, 3, seed=1), (X, many)), expected)
    tokens, scores = IDS[:5], randn(5, 6, 9)
    lm = F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert Loss("lm").of(scores, (tokens, tokens)).item() == pytest.approx(lm.item(), rel=1e-6)
    tagged = F.cross_entropy(scores.movedim(-1, 1), tokens)
    assert torch.equal(Loss("cross-entropy").of(scores, (tokens, tokens)), tagged)
    with pytest.raises(ValueError, match="expected one of cross-entropy"):
        loss_of("crossentropy")
    with pytest.raises(ValueError, match="label_smoothing"):
        Loss("mse").smoothed(0.1)


def test_labels_out_of_range_are_told() -> None:
    with pytest.raises(ValueError, match=r"labels from 0 to 3.*got 0 to 4"):
        Loss().of(randn(5, 4), (X, torch.arange(5)))


def test_functions_are_told_apart() -> None:
    batch = (X, LABELS)
    model = net()
    expected = Loss()(model, batch)
    for fn in (
        lambda output, y: F.cross_entropy(output, y),
        lambda model, b: F.cross_entropy(model(b[0]), b[1]),
        lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
        F.cross_entropy,
        nn.CrossEntropyLoss(),
    ):
        assert torch.equal(Loss(fn)(model, batch), expected)
    with pytest.raises(ValueError, match="first parameter model"):
        Loss(lambda m, b: F.cross_entropy(m(b[0]), b[1]))(model, batch)
    with pytest.raises(ValueError, match="a tensor of one number"):
        Loss(lambda output, y: F.cross_entropy(output, y, reduction="none"))(model, batch)


SEARCHES: dict[str, Any] = {
    "snip": sc.OneShot(sc.scores.snip),
    "grasp": sc.OneShot(sc.scores.grasp),
    "synflow": sc.Iterative(sc.scores.synflow, rounds=2),
    "joint": sc.JointSearch(epochs=2),
    "cts": sc.ConcreteSearch(epochs=2, objective=sc.objectives.loss_change),
    "strong": sc.StrongSearch(epochs=2),
    "continuous": sc.ContinuousSparsification(epochs=2),
    "edge-popup": sc.EdgePopup(epochs=2),
    "rewinding": sc.Rewinding(SGD, 1),
    "rigl": sc.RigL(SGD, 2, interval=2),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.filterwarnings("ignore")
def test_every_search_takes_a_loss(name: str) -> None:
    """Regression, and the same by a function: one ticket, whose provenance knows the loss."""
    data = cut(X, X @ randn(6, 1, seed=3))
    tickets = [
        SEARCHES[name](net(outputs=1), data, sparsity=0.5, loss=loss)
        for loss in ("mse", lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
    ]
    assert all(torch.equal(m, tickets[1].masks[k]) for k, m in tickets[0].masks.items())
    assert tickets[0].meta["loss"] == "mse" and "lambda" in tickets[1].meta["loss"]
    if name != "synflow":  # which asks for none
        with pytest.raises(ValueError, match="loss="):
            SEARCHES[name](net(outputs=1), data, sparsity=0.5)


def test_teachers_need_classes() -> None:
    with pytest.raises(ValueError, match=r"objective reverse-kl.*got mse"):
        sc.ConcreteSearch(epochs=1)(net(outputs=1), cut(X, X[:, :1]), sparsity=0.5, loss="mse")
    first = Loss(lambda output, y: F.cross_entropy(output[0], y), scores=lambda output: output[0])
    expected = sc.ConcreteSearch(epochs=2)(net(), cut(X, LABELS), sparsity=0.5)
    found = sc.ConcreteSearch(epochs=2)(net("tuple"), cut(X, LABELS), sparsity=0.5, loss=first)
    assert all(torch.equal(m, found.masks[k]) for k, m in expected.masks.items())


def test_the_teachers_class_axis_is_the_losss() -> None:
    """Tokens' classes are last: the same divergence as with classes on axis 1."""
    a, b = randn(5, 6, 9), randn(5, 6, 9, seed=1)

    class Two(sc.objectives.Net):
        def __init__(self, loss: Loss) -> None:
            self.loss, self.target = loss, None

        def outputs(self, x: Any) -> tuple[Tensor, Tensor]:
            return a, b

    found = sc.objectives.reverse_kl(Two(Loss("lm")), (IDS[:5], IDS[:5]))
    p, q = (t.movedim(-1, 1).log_softmax(1) for t in (a, b))
    expected = 100 * F.kl_div(q, p, reduction="batchmean", log_target=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_training_tells_what_it_measures() -> None:
    y = X @ randn(6, 1, seed=3)
    model = net(outputs=1)
    history = train(model, cut(X, y), cut(X, y), SGD, loss="mse", engine="eager")
    assert "accuracy" not in history.epochs[-1]
    assert history.epochs[-1]["test_loss"] == pytest.approx(
        F.mse_loss(model(X), y).item(), rel=1e-5
    )
    mean = evaluate(model, cut(X, y), metric=F.l1_loss)
    assert mean == pytest.approx(F.l1_loss(model(X), y).item(), rel=1e-5)
    with pytest.raises(ValueError, match="loss="):
        evaluate(model, cut(X, y))
    with pytest.raises(ValueError, match="metric="):
        evaluate(model, cut(X, y), loss="mse")


def test_accuracy_is_per_pixel_and_token() -> None:
    x = randn(12, 1, 2, 2)
    y = (x[:, 0] > 0).long()
    y[0] = -100
    model = seeded(lambda: nn.Conv2d(1, 2, 1))
    right = (model(x).argmax(1) == y)[1:].float().mean().item()
    assert evaluate(model, [(x, y)]) == pytest.approx(100 * right)
    language = seeded(Language)
    right = (language(IDS).argmax(-1)[:, :-1] == IDS[:, 1:]).float().mean().item()
    assert evaluate(language, [(IDS, IDS)], loss="lm") == pytest.approx(100 * right)


def test_a_models_own_loss_and_dicts() -> None:
    batches = [{"x": x, "labels": y} for x, y in cut(X, LABELS)]
    expected = train(net(), cut(X, LABELS), cut(X, LABELS), SGD, engine="eager")
    for kind in ("tensor", "dict", "own"):
        found = train(net(kind), batches, batches, SGD, engine="eager")
        assert [e["loss"] for e in found.epochs] == [e["loss"] for e in expected.epochs]
        assert found.accuracy == expected.accuracy
    with pytest.raises(ValueError, match="the model's own"):
        train(net("own"), batches, None, Recipe(batch=8, epochs=1, label_smoothing=0.1))


def test_auxiliary_outputs_are_not_left_untrained() -> None:
    class Outputs(NamedTuple):
        logits: Tensor
        aux_logits: Tensor | None

    with pytest.raises(ValueError, match="aux_logits"):
        Loss().of(Outputs(randn(5, 4), randn(5, 4)), (X, LABELS[:5]))
    Loss().of(Outputs(randn(5, 4), None), (X, LABELS[:5]))


def test_parts_of_a_batch_weigh_by_their_labels() -> None:
    """Also where some labels are left out: the numbers of the whole batch."""
    y = LABELS.clone()
    y[:9] = -100
    whole, parts = net(), net()
    for model, accumulate in ((whole, 1), (parts, 3)):
        recipe = Recipe(lr=0.1, batch=24, epochs=1, accumulate=accumulate)
        train(model, [(X, y)], None, recipe, engine="eager")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_scores_are_a_function() -> None:
    with pytest.raises(ValueError, match="scores= as a function of the model's output, got a str"):
        Loss("cross-entropy", scores="logits")  # pyright: ignore


def test_one_loss_reads_probabilities_of_each_shape_by_themselves() -> None:
    """A loss value may be used for several models: what the first batch's shape told is not the next one's."""
    loss, soft = Loss("cross-entropy"), randn(2, 3, 5).softmax(1)
    last = soft.movedim(1, 2)
    scores = randn(2, 3, 5)
    expected = F.cross_entropy(scores, soft)
    torch.testing.assert_close(loss.of(scores, (X, soft)), expected)
    torch.testing.assert_close(loss.of(scores.movedim(1, 2), (X, last)), expected)
