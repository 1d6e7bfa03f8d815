"""A loss that is a user's function: which kind it is, and one line for each mistake in it."""

import functools
import re
import warnings
from typing import Any

import pytest
import torch
from helpers import mlp, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.loss_functions import takes_model
from sparsecore.losses import Loss
from sparsecore.scores import grasp, snip
from sparsecore.training import Recipe, evaluate, train

X, Y = randn(16, 6), torch.arange(16) % 3
ADAM = Recipe(optimizer="adam", lr=0.01, batch=16, epochs=1)


def net(outputs: int = 3) -> nn.Module:
    return sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, outputs))))


def refused(loss: Any, y: Tensor = Y, outputs: int = 3) -> str:
    """What training says, in a line, with the model as it was."""
    model = net(outputs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        train(model, [(X, y)], None, ADAM, loss=loss, engine="eager")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert "\n" not in str(error.value)
    return str(error.value)


def of_model(model: nn.Module, b: Any) -> Any: ...
def of_net(net: nn.Module, data: Any) -> Any: ...
def of_batch(m: Any, batch: Any) -> Any: ...
def annotated(f: nn.Module, b: Any) -> Any: ...
def of_output(output: Any, batch: Any) -> Any: ...
def of_net_output(net_out: Any, batch: Any) -> Any: ...
def of_prediction(y_pred: Any, y: Any) -> Any: ...
def tensors(model: Tensor, y: Any) -> Any: ...
def of_net_target(net, y): ...
def of_network_labels(network, y_true): ...


class WithModel(nn.Module):
    def forward(self, model: Any, batch: Any) -> Any: ...


@pytest.mark.parametrize(
    "fn", [of_model, of_net, of_batch, annotated, WithModel(), lambda net, b: 0]
)
def test_functions_of_model_and_batch(fn: Any) -> None:
    assert takes_model(fn)


@pytest.mark.parametrize(
    "fn",
    [
        of_output, of_net_output, of_prediction, tensors, of_net_target, of_network_labels, nn.MSELoss(), F.mse_loss,
        lambda a, b: 0, functools.partial(of_output),
    ],
)  # fmt: skip
def test_functions_of_output_and_target(fn: Any) -> None:
    assert not takes_model(fn)


@pytest.mark.parametrize(
    "fn",
    [
        lambda o, t, w: 0, lambda: 0, lambda o: 0, nn.GaussianNLLLoss(), F.gaussian_nll_loss, nn.TripletMarginLoss(),
        functools.partial(F.cross_entropy, reduction="sum"), nn.CrossEntropyLoss(reduction="sum"),
        nn.MSELoss(reduction="none"), nn.CrossEntropyLoss, functools.partial(nn.CrossEntropyLoss, ignore_index=2),
    ],
)  # fmt: skip
def test_what_is_no_loss_is_refused_when_it_is_made(fn: Any) -> None:
    with pytest.raises(ValueError, match=r"^loss.*(expected a function|expected a mean|make one)"):
        Loss(fn)


def test_a_function_may_take_more_than_it_needs_and_reduce_by_itself() -> None:
    class PerClass(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target).mean()

    for fn in (lambda o, t, w=None: F.cross_entropy(o, t), lambda *both: F.cross_entropy(*both)):
        assert torch.equal(Loss(fn).of(randn(16, 3), (X, Y)), F.cross_entropy(randn(16, 3), Y))
    assert Loss(PerClass(reduction="none")).of(randn(16, 3), (X, Y)).ndim == 0


@pytest.mark.parametrize(
    ("loss", "y", "mend"),
    [
        (F.cross_entropy, F.one_hot(Y), r"target\.argmax\(1\)"),
        (nn.CrossEntropyLoss(), Y.float(), r"target\.long\(\)"),
        (functools.partial(F.cross_entropy), Y[:, None], r"target\.squeeze\(-1\)"),
        (F.cross_entropy, Y + 9, "out of bounds"),
        (nn.BCEWithLogitsLoss(), Y.clamp(max=1).float(), "expected targets that it can take"),
        (lambda o, t: F.cross_entropy(o, t.float()), Y, "expected targets that it can take"),
        (lambda o, t: F.cross_entropy(o["logits"], t), Y, "loss <lambda>|loss .*lambda"),
        (lambda o, t: F.cross_entropy(o.logits, t), Y, "expected a function of"),
        (lambda model, b: F.cross_entropy(model(b), b[1]), Y, "for batches of a tuple of float32"),
        (lambda model, t: F.cross_entropy(model, t), Y, "calls its first parameter output"),
        (lambda o, t: (o.argmax(1) != t).float().mean(), Y, "gradients pass through"),
        (lambda model, b: model(b[0]).detach().mean(), Y, "gradients pass through"),
        (lambda o, t: torch.tensor(1.0, requires_grad=True), Y, "gradients pass through"),
        (lambda o, t: o.mean().item(), Y, "a tensor of one number, got a float"),
        (lambda o, t: {"a": o.mean()}, Y, "got a dict"),
    ],
)
def test_a_mistake_is_one_line(loss: Any, y: Tensor, mend: str) -> None:
    assert re.search(mend, refused(loss, y))


def test_a_users_own_error_stays_as_it_is() -> None:
    def strict(output: Tensor, target: Tensor) -> Tensor:
        raise ValueError("my own words")

    assert refused(strict) == "my own words"


BROADCAST: dict[str, Any] = {
    "poisson": nn.PoissonNLLLoss(),
    "partial": functools.partial(F.mse_loss),
    "huber": functools.partial(nn.HuberLoss()),
    "function": lambda o, t: F.gaussian_nll_loss(o, t, torch.ones(16)),
    "keywords": lambda o, t: F.poisson_nll_loss(input=o, target=t),
    "arithmetic": lambda o, t: ((o - t) ** 2).mean(),
    "the other way": lambda o, t: (t - o).abs().mean(),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_targets_are_not_broadcast_against_outputs(name: str) -> None:
    assert "would be broadcast" in refused(BROADCAST[name], Y.float(), outputs=1)


def test_what_only_looks_like_broadcasting_is_computed() -> None:
    out, y = randn(16, 1), Y.float()
    for fn in (
        lambda o, t: F.mse_loss(o[:, 0], t),
        lambda o, t: ((o.squeeze(1) - t) ** 2).mean(),
        lambda o, t: (t[:, None] - o).abs().mean(),
        lambda o, t: torch.cdist(o, t[:, None]).mean(),
    ):
        assert torch.equal(Loss(fn).of(out, (X, y)), fn(out, y))
    quantiles = lambda o, t: (t[:, None] - o).abs().mean()  # noqa: E731
    assert torch.equal(Loss(quantiles).of(randn(16, 3), (X, y)), quantiles(randn(16, 3), y))


def test_signs_are_no_targets_of_bce_nor_zeros_of_margins() -> None:
    sign = (2 * (Y > 0) - 1).float()[:, None]
    for loss in (
        "bce",
        nn.BCEWithLogitsLoss(),
        lambda o, t: F.binary_cross_entropy_with_logits(o, t),
    ):
        assert "from 0 to 1, got -1 to 1" in refused(loss, sign, outputs=1)
        with pytest.raises(ValueError, match="from 0 to 1"):
            evaluate(net(1), [(X, sign)], loss)
    assert "-1 and 1 alone, got 0 to 1" in refused(nn.SoftMarginLoss(), (sign + 1) / 2, outputs=1)
    for y in ((sign + 1) / 2, sign > 0):
        Loss("bce").of(randn(16, 1), (X, y))


class Head(nn.Module):
    """A loss with parameters and statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.norm = nn.Parameter(torch.eye(3)), nn.BatchNorm1d(3)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.norm(output @ self.centres), target)


def test_a_losss_own_parameters_are_told_of_and_given_back() -> None:
    data = [(X, Y)] * 2
    for run in (
        lambda head: train(net(), data, None, ADAM, loss=head),
        lambda head: sc.JointSearch(epochs=1)(net(), data, sparsity=0.5, loss=head),
        lambda head: sc.GradualMagnitude(ADAM, 2)(net(), data, sparsity=0.5, loss=head),
    ):
        head = Head()
        with pytest.warns(sc.SparsityWarning, match="'centres'.*not trained") as caught:
            run(head)
        assert sum("not trained" in str(w.message) for w in caught) == 1
        assert all(p.grad is None for p in head.parameters()) and head.training
    head = Head()
    before = {k: v.clone() for k, v in head.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.OneShot(sc.scores.snip)(net(), data, sparsity=0.5, loss=head)
    evaluate(net(), data, head)
    assert head.training
    assert all(torch.equal(v, head.state_dict()[k]) for k, v in before.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net(), data, None, ADAM, loss=head.requires_grad_(False))


def test_a_part_of_a_batch_that_cannot_be_is_told() -> None:
    flat = torch.ones(16)  # as long as the batch, and no samples
    loss = lambda model, b: (model(b["x"])[:, 0] * b["w"]).mean() + b["w"].view(16)[0]  # noqa: E731
    recipe = Recipe(batch=16, epochs=1, accumulate=2)
    with pytest.raises(ValueError, match=r"accumulate=2.*accumulate=1"):
        train(net(), [{"x": X, "y": Y, "w": flat}], None, recipe, loss=loss, engine="eager")


def test_nothing_to_train_is_told() -> None:
    with pytest.raises(ValueError, match=r"require gradients, got 4 that are frozen"):
        train(net().requires_grad_(False), [(X, Y)], None, ADAM)
    with pytest.raises(ValueError, match=r"require gradients, got none"):
        train(nn.ReLU(), [(X, Y)], None, ADAM)


@pytest.mark.parametrize("score", [snip, grasp])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_loss_that_is_no_number_gives_no_ticket(score, bad: float) -> None:
    """Its gradients may be zeros, of which a ranking says nothing."""
    model, data = sc.sparsify_(mlp()), [(randn(8, 12), torch.arange(8) % 4)]
    with pytest.raises(ValueError, match=rf"the loss is {bad}: expected finite numbers"):
        sc.OneShot(score)(model, data, sparsity=0.5, loss=lambda o, t: 0 * o.sum() + bad)
