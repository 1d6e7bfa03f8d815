"""What torch.fx does not show by itself is seen, or kept whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import assert_exact
from helpers import randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.compaction import compact

relu = torch.relu
Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Three layers, and a forward of one's own."""

    def __init__(self, forward: Forward, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, n, bias=bias) for n in (6, 6, 4))
        self.compute = forward

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def net(forward: Forward, bias: bool = True) -> Any:
    """Outputs 0 and 1 of a are dead, output 2 of b reads nothing else; their biases are below 0."""
    model: Any = sc.sparsify_(seeded(lambda: Net(forward, bias)).double())
    live = torch.ones(6, 6, dtype=torch.bool)
    live[:2] = False
    model.a.set_mask_(live)
    live = torch.ones(6, 6, dtype=torch.bool)
    live[2] = torch.arange(6) < 2
    model.b.set_mask_(live)
    with torch.no_grad():
        for layer in (model.a, model.b) if bias else ():
            layer.bias[:3] = -0.01
    return model


def drift(model: Any, loss: Callable[[Any, Any], Tensor], steps: int = 40) -> float:
    """How far the losses of the small and the full model part in training."""
    pair = copy.deepcopy(model), compact(model, randn(1, 6, dtype=torch.float64)).model
    optimisers = [torch.optim.SGD(m.parameters(), 0.02, 0.9, weight_decay=0.01) for m in pair]
    furthest = 0.0
    for step in range(steps):
        x = randn(6, 6, seed=step, dtype=torch.float64)
        full, small = (loss(m, m(x)) for m in pair)
        furthest = max(furthest, abs(full - small).item())
        for value, optimiser in zip((full, small), optimisers, strict=True):
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    return furthest


def squares(model: Any, outputs: Tensor) -> Tensor:
    return (outputs - 1).square().mean()


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return relu(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        return grad


def plain(m: Any, x: Tensor) -> Tensor:
    return m.c(relu(m.b(relu(m.a(x)))))


def overwritten(change: Callable[[Tensor], Any]) -> Forward:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        change(y)
        return m.c(relu(m.b(y)))

    return forward


def renamed(y: Tensor) -> None:
    z = y
    z += -0.01


def saved(m: Any, x: Tensor) -> Tensor:
    m.inner = m.b(relu(m.a(x)))
    return m.c(relu(m.inner))


def saved_in_a_list(m: Any, x: Tensor) -> Tensor:
    m.inner = [m.b(relu(m.a(x)))]
    return m.c(relu(m.inner[0]))


FORWARDS: dict[str, tuple[Forward, bool]] = {
    "as it should be": (plain, True),
    "custom gradient": (
        lambda m, x: m.c(StraightThrough.apply(m.b(StraightThrough.apply(m.a(x))))),
        True,
    ),
    "through a transpose": (overwritten(lambda y: y.transpose(0, 1).add_(-0.01)), False),
    "through a slice": (overwritten(lambda y: y.narrow(1, 0, 3).sub_(0.01)), False),
    "another function": (overwritten(lambda y: torch.cos_(y.unsqueeze(1))), False),
    "another name": (overwritten(renamed), False),
    "weight in the loss": (lambda m, x: plain(m, x) + 1e-3 * m.b.weight.square().sum(), True),
    "weight used twice": (lambda m, x: plain(m, x) + F.linear(x, m.b.weight).sum(), True),
    "default that is a tuple": (lambda m, x, sizes=(1,): plain(m, x), True),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_forward_code(case: str) -> None:
    forward, bias = FORWARDS[case]
    model = net(forward, bias)
    assert drift(model, squares) <= 1e-9
    if case == "as it should be":
        layers = assert_exact(model, (6,)).layers
        assert layers["a"].outputs == (4, 6) and layers["b"].outputs == (5, 6)


@pytest.mark.parametrize("forward", [saved, saved_in_a_list])
def test_tensors_left_on_a_module(forward: Forward) -> None:
    def loss(model: Any, outputs: Tensor) -> Tensor:
        inner = model.inner[0] if isinstance(model.inner, list) else model.inner
        return squares(model, outputs) + (inner - 1).square().sum()

    assert drift(net(forward), loss) <= 1e-9


def test_attributes_that_are_tensors() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        return m.c(relu(m.b(relu(y)))), y.mT

    def loss(model: Any, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return squares(model, outputs[0]) + (outputs[1] - 1).square().mean()

    assert drift(net(forward), loss) <= 1e-9


def test_hooks() -> None:
    model = net(plain)
    model.a.register_full_backward_pre_hook(lambda module, grads: (grads[0] - 1,))
    assert drift(model, squares) <= 1e-9

    model = net(lambda m, x: m.c(m.body(x)))
    model.body = nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU())
    seen: list[int] = []
    model.body.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    compact(model, randn(1, 6, dtype=torch.float64)).model(randn(2, 6, dtype=torch.float64))
    assert set(seen) == {6}

    model = net(plain)
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    assert drift(model, squares) <= 1e-9


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(relu(m.b(relu(m.a(x)) + (1.0 if m.training else 0.0)))),
        lambda m, x: m.c(relu(m.b(F.hardtanh(m.a(x), 0.5 if m.training else 0.0, 5.0)))),
    ],
)
def test_another_constant_in_training(forward: Forward) -> None:
    with pytest.raises(ValueError, match="other operations in training"):
        compact(net(forward), randn(1, 6, dtype=torch.float64))


def test_the_small_model_has_not_run() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return plain(m, x)

    model = net(forward)
    model.register_buffer("calls", torch.zeros(()))
    small: Any = compact(model, randn(1, 6, dtype=torch.float64)).model
    assert small.calls == 0 and model.calls == 0


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_outputs() -> None:
    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 0))))
    assert compact(model, torch.zeros(1, 6)).model(torch.zeros(2, 6)).shape == (2, 0)


def test_a_layer_of_another_class_that_is_not_called() -> None:
    class Mine(sc.SparseLinear):
        pass

    model = net(plain)
    model.my = seeded(lambda: Mine(6, 6)).double()
    assert compact(model, randn(1, 6, dtype=torch.float64)).layers["my"].outputs == (6, 6)


def test_what_cannot_be_copied_or_is_compiled() -> None:
    model, x = net(saved), randn(1, 6, dtype=torch.float64)
    model(x)
    with pytest.raises(
        ValueError, match=r"got its attribute inner that it cannot .*; delete what forward has left"
    ):
        compact(model, x)
    with pytest.raises(ValueError, match="got a compiled one"):
        compact(torch.compile(net(plain)), x)  # pyright: ignore
    with pytest.raises(ValueError, match="inputs one by one, tensors each, got a list"):
        compact(net(plain), [1, 2])  # pyright: ignore
    planned = sc.plan_(net(plain), "state")
    with pytest.raises(ValueError, match="after compaction"):
        compact(planned, x)
