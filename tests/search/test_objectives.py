"""Objectives by hand and against finite differences; a teacher that remembers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import Blobs, rand, randn, seeded, trained_mlp
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.control import (
    CONTROLS,
)
from sparsecore.gates import AbstractGate, Concrete
from sparsecore.objectives import (
    OBJECTIVES,
    Net,
    Objective,
    features,
    gradient_norm,
    loss_change,
    reverse_kl,
)
from sparsecore.patterns import Gated
from sparsecore.search import ConcreteSearch


def gated_net(model: nn.Module, gate: AbstractGate | None = None) -> Net:
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        shape = layer.raw_weight.shape
        layer.pattern = Gated(shape, gate or Concrete(), density=0.5, layer=i)
    return Net(model)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
@pytest.mark.parametrize("control", CONTROLS.values(), ids=list(CONTROLS))
def test_every_objective_with_every_control(objective: Objective, control: type) -> None:
    model = trained_mlp(1)
    search = ConcreteSearch(epochs=2, objective=objective, control=control())
    ticket = search(model, Blobs(), sparsity=0.8)
    assert ticket.sparsity == pytest.approx(0.8, abs=0.01)
    assert len(set(ticket.meta["objective_by_epoch"])) == 2  # it moves


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_objective_gradients_against_finite_differences(objective: Objective) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double())
    net = gated_net(sc.sparsify_(model))
    model.double()
    x, y = randn(7, 5, dtype=torch.float64), torch.arange(7) % 3
    logits = [g.pattern.logits for g in net.layers.values()]
    noise = [0.2 + 0.6 * rand(*p.shape, seed=i, dtype=torch.float64) for i, p in enumerate(logits)]

    class Fixed(nn.Module):
        """A gate pattern with its noise held, so that the objective is a plain function."""

        def __init__(self, gated: Gated, u: Tensor) -> None:
            super().__init__()
            self.gated, self.u = gated, u

        def forward(self, weight: Tensor) -> Tensor:
            g = self.gated
            if g.open:
                return weight
            return sc.gated_weight(weight, g.logits, self.u, g.gate, g.granularity)

    class FixedNet(Net):
        @contextmanager
        def opened(self) -> Iterator[None]:
            for layer in self.layers.values():
                layer.pattern.gated.open = True
            yield
            for layer in self.layers.values():
                layer.pattern.gated.open = False

    for layer, u in zip(net.layers.values(), noise, strict=True):
        layer.pattern = Fixed(layer.pattern, u)
    fixed = FixedNet(model)
    grads = torch.autograd.grad(objective(fixed, (x, y)), logits)
    step = 1e-5
    for p, g in zip(logits, grads, strict=True):
        values = []
        for change in (step, -2 * step):
            p.data[1, 2] += change
            values.append(objective(fixed, (x, y)).item())
        p.data[1, 2] += step
        expected = (values[0] - values[1]) / (2 * step)
        assert g[1, 2].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_reverse_kl_by_hand() -> None:
    net = gated_net(trained_mlp(1))
    x, y = next(Blobs().epoch(0))
    p, q = net.sparse(x).softmax(-1), net.dense(x).softmax(-1)
    expected = 100 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(reverse_kl(net, (x, y)), expected, rtol=1e-4, atol=1e-4)
    backward = 100 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(
        OBJECTIVES["forward-kl"](net, (x, y)), backward, rtol=1e-4, atol=1e-4
    )


def test_scales_are_the_authors() -> None:
    scales = {name: objective.scale for name, objective in OBJECTIVES.items()}
    assert scales.pop("loss-change") == 10_000 and scales.pop("gradient-norm") == 1
    assert set(scales.values()) == {100}


def test_loss_change_and_gradient_norm_by_hand() -> None:
    net = gated_net(trained_mlp(1))
    x, y = next(Blobs().epoch(0))
    sparse, dense = F.cross_entropy(net.sparse(x), y), F.cross_entropy(net.dense(x), y)
    torch.testing.assert_close(loss_change(net, (x, y)), 10_000 * (sparse / dense - 1).abs())
    weights = [net.layers[name].raw_weight for name in ("0", "2")]  # no biases
    found = gradient_norm(net, (x, y))
    grads = torch.autograd.grad(F.cross_entropy(net.sparse(x), y), weights)
    torch.testing.assert_close(found, -torch.cat([g.flatten() for g in grads]).norm())


def by_sample(values: Tensor) -> Tensor:
    """[B, ...]: each sample of mean 0 and deviation 1."""
    rows = values.reshape(len(values), -1)
    return torch.stack([(row - row.mean()) / (row.std() + 1e-9) for row in rows])


def test_features_standardise_each_sample_and_end_in_softmax() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(60, 6), nn.ReLU(), nn.Linear(6, 4),
        )
    )  # fmt: skip
    net = gated_net(sc.sparsify_(model))
    x, y = next(Blobs().epoch(0))
    x = x * torch.logspace(-2, 2, len(x))[:, None]  # samples of very different scales

    def outputs() -> list[Tensor]:
        images = model[2](model[1](model[0](x)))
        hidden = model[5](model[4](model[3](images)))
        return [images, hidden, model[6](hidden).softmax(1)]

    with net.opened():
        dense = [by_sample(value) for value in outputs()]
    sparse = [by_sample(value) for value in outputs()]
    layers = [(s - d).square().mean() for s, d in zip(sparse, dense, strict=True)]
    torch.testing.assert_close(features(net, (x, y)), 100 * sum(layers) / 3, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 6])
def test_features_that_are_all_alike_leave_gradients_finite(width: int, dtype: torch.dtype) -> None:
    """Of a sample that no unit sees, and of a layer of one unit, which has no deviation."""
    model = seeded(lambda: nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3)))
    net = gated_net(sc.sparsify_(model))
    x, y = next(Blobs().epoch(0))
    x = torch.cat([x, torch.zeros(1, 12)])
    with torch.no_grad():
        model[0].bias.fill_(-0.1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = features(net, (x, torch.cat([y, y[:1]])))
    assert loss.isfinite() and loss.dtype == torch.float32
    for grad in torch.autograd.grad(loss, [g.pattern.logits for g in net.layers.values()]):
        assert grad.isfinite().all()


def test_the_teacher_sees_a_sample_once_and_says_the_same_ever_after() -> None:
    model, batches = trained_mlp(1), Blobs()
    dense = sc.densify_(copy.deepcopy(model))
    forwards = []

    def watch(net: Net, batch: Batch) -> Tensor:
        forwards.append(len(batch[1]))
        torch.testing.assert_close(net.teacher(batch[0]), dense(batch[0]))
        return reverse_kl(net, batch)

    search = ConcreteSearch(epochs=3, objective=Objective("watched", watch))
    model.register_forward_pre_hook(lambda module, args: forwards.append(-1))
    search(model, batches, sparsity=0.5)
    # In the first epoch: watched, dense, sparse, and dense again for the objective; then sparse alone.
    assert len(forwards) == 4 * (1 + 3) + 8 * (1 + 1)

    class Anonymous:
        """Samples without numbers: nothing can be remembered."""

        def __len__(self) -> int:
            return len(batches)

        def epoch(self, index: int) -> Iterator[Batch]:
            return batches.epoch(index)

    forwards.clear()
    search(model, Anonymous(), sparsity=0.5)
    assert len(forwards) == 12 * (1 + 3)
