"""What `layer.weight` is: the parameter under no pattern and under a mask, computed and read-only elsewhere."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import mlp, rand, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import sparsecore as sc
from sparsecore.gates import Concrete
from sparsecore.patterns import Gated, Masked
from sparsecore.zeros import Keeper


def net() -> nn.Sequential:
    return sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)))
    )


def masked(model: nn.Module, share: float = 0.4) -> nn.Module:
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight_shape, seed=i) < share)
    return model


def zeros(model: nn.Module) -> bool:
    """Whether every stored pruned entry is 0, by whoever looks: parameters, state_dict, weight."""
    state = model.state_dict()
    for name, layer in sc.sparse_layers(model).items():
        pruned = ~layer.pattern.mask
        for seen in (layer.raw_weight, state[f"{name}.weight"], layer.weight):
            if seen.detach()[pruned].any():
                return False
    return True


X, Y = randn(64, 20), torch.arange(64) % 5


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def test_the_weight_is_the_parameter_without_a_pattern_and_under_a_mask() -> None:
    model = net()
    assert model[0].weight is model[0].raw_weight is dict(model.named_parameters())["0.weight"]
    masked(model)
    layer = model[0]
    assert layer.weight is layer.raw_weight and isinstance(layer.weight, nn.Parameter)
    F.cross_entropy(model(X), Y).backward()
    assert layer.weight.grad is not None and not layer.weight.grad[~layer.pattern.mask].any()


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "init": lambda layer: nn.init.constant_(layer.weight, 7.0),
    "data": lambda layer: layer.weight.data.fill_(7.0),
    "data=": lambda layer: setattr(layer.weight, "data", torch.full_like(layer.weight, 7.0)),
    "no_grad": lambda layer: layer.weight.fill_(7.0),
    "parameter": lambda layer: setattr(
        layer, "weight", nn.Parameter(torch.full_like(layer.weight, 7.0))
    ),
    "merge": lambda layer: layer.weight.data.add_(7.0 - layer.weight.data),
    "state": lambda layer: layer.load_state_dict(
        {"weight": torch.full_like(layer.weight, 7.0), "bias": layer.bias}, strict=False
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_computed_saved_and_densified(write: str) -> None:
    model = masked(net())
    layer, mask = model[0], model[0].pattern.mask
    with torch.no_grad():
        WRITES[write](layer)
    expected = F.linear(X, 7.0 * mask, layer.bias)
    torch.testing.assert_close(layer(X), expected)
    assert torch.equal(layer.weight, 7.0 * mask) and zeros(model)
    again = masked(net())
    again.load_state_dict(model.state_dict())
    plain = sc.densify_(copy.deepcopy(model))
    for other in (again, plain, copy.deepcopy(model), sc.plan_(copy.deepcopy(model), "state")):
        torch.testing.assert_close(other[0](X), expected)


@pytest.mark.parametrize("plan", ["mask", "state", "csr"])
def test_reset_parameters_draws_the_kept_weights_anew(plan: str) -> None:
    model = sc.plan_(masked(net()), plan)
    layer = model[0]
    before, bias = layer.effective_weight.detach().clone(), layer.bias.detach().clone()
    mask = layer.pattern.mask
    drawn = seeded(lambda: nn.Linear(20, 30), 1)
    seeded(layer.reset_parameters, 1)
    assert torch.equal(layer.effective_weight, drawn.weight * mask)
    assert not torch.equal(layer.bias, bias) and not torch.equal(layer.effective_weight, before)


def test_weights_under_gates_and_plans_refuse_to_be_written_to() -> None:
    planned, gated = sc.plan_(masked(net()), "state")[0], net()[0]
    gated.pattern = Gated(gated.raw_weight.shape, Concrete(), density=0.5)
    looked_through = net()[0]
    looked_through.pattern = Masked(rand(30, 20) < 0.5)  # as a search does, for a while
    for layer in (planned, gated, looked_through):
        before = layer.raw_weight.detach().clone()
        for write in (
            lambda layer=layer: nn.init.constant_(layer.weight, 7.0),
            lambda layer=layer: nn.init.kaiming_uniform_(layer.weight),
            lambda layer=layer: layer.weight.data.fill_(7.0),
            lambda layer=layer: layer.weight.__setitem__(0, 7.0),
            lambda layer=layer: setattr(layer.weight, "data", torch.zeros(30, 20)),
            lambda layer=layer: torch.mul(layer.weight, 2, out=layer.weight),
            lambda layer=layer: layer.weight.T.copy_(torch.zeros(20, 30)),
            lambda layer=layer: layer.weight.detach()[0].add_(1),
            lambda layer=layer: layer.weight.grad,
        ):
            with pytest.raises(RuntimeError, match="raw_weight"):
                seeded(write)
        assert torch.equal(layer.raw_weight, before)
        # To read, compute and differentiate it is a weight.
        weight = layer.weight
        assert weight.shape == (30, 20) and type(weight + 1) is Tensor
        torch.testing.assert_close(F.linear(X, weight, layer.bias), layer(X))
        (grad,) = torch.autograd.grad(layer.weight.square().sum(), layer.raw_weight)
        assert grad.shape == layer.raw_weight.shape and grad.any()
    with pytest.raises(ValueError, match="kept weights of its plan"):
        planned.weight = nn.Parameter(torch.zeros(30, 20))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, 0.1),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], 0.02),
    "own": lambda p: Mixing(p, {}),
}


class Mixing(torch.optim.Optimizer):
    """Moves every weight by the mean gradient of its tensor."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.mean() + 0.1, alpha=-0.1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_optimiser_brings_pruned_weights_back(kind: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    for _ in range(3):
        step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    F.cross_entropy(model(X), Y).backward()  # a gradient from before the mask as well
    masked(model)
    optimizer.step()
    assert zeros(model)
    for i in range(4):
        if i == 2:  # an older state comes back
            optimizer.load_state_dict(saved)
        step(model, optimizer)
        assert zeros(model)
    plain = sc.densify_(copy.deepcopy(model))
    assert torch.equal(plain(X), model(X))
    for layer in sc.sparse_layers(model).values():  # a tighter mask while it trains
        layer.set_mask_(layer.pattern.mask & (rand(*layer.weight_shape, seed=9) < 0.5))
    step(model, optimizer)
    assert zeros(model)


def test_averages_and_copies_are_kept_too() -> None:
    model = masked(net())
    average = AveragedModel(model)
    optimizer = torch.optim.Muon([layer.raw_weight for layer in sc.sparse_layers(model).values()])
    for _ in range(3):
        step(model, optimizer)
        average.update_parameters(model)
    assert zeros(model) and zeros(average.module)
    twin = copy.deepcopy(model)
    step(twin, torch.optim.Muon([layer.raw_weight for layer in sc.sparse_layers(twin).values()]))
    assert zeros(twin)


def test_gradients_are_masked_once_and_wherever_they_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = masked(net()), []
    original = Keeper.masked
    monkeypatch.setattr(
        Keeper, "masked", lambda self, grad: seen.append(original(self, grad)) or seen[-1]
    )
    F.cross_entropy(model(X), Y).backward()
    assert seen == [None, None]  # the layer had done so
    layer = model[0]
    layer.weight.grad = None
    (layer(X).sum() + F.linear(X, layer.weight).square().sum()).backward()
    pruned = ~layer.pattern.mask
    assert layer.weight.grad is not None and not layer.weight.grad[pruned].any()
    (grad,) = torch.autograd.grad(layer.weight.exp().sum(), layer.weight)
    assert not grad[pruned].any() and grad[~pruned].all()


def test_a_search_that_looks_through_masks_leaves_the_weights() -> None:
    model = net()
    before = model[0].raw_weight.detach().clone()
    model[0].pattern = Masked(rand(30, 20) < 0.5)
    assert (model[0].weight == 0).any()
    model(X)
    model.state_dict()
    step(model, torch.optim.SGD(model.parameters(), 0.0))
    assert torch.equal(model[0].raw_weight, before)


def test_masks_of_other_tools_on_top() -> None:
    model = masked(net())
    layer = model[0]
    prune.l1_unstructured(layer, "weight", 0.9)
    both = layer.pattern.mask & layer.weight_mask.bool()
    expected = F.linear(X, layer.weight_orig * both, layer.bias)
    torch.testing.assert_close(layer(X), expected)
    for refused in (lambda: layer.set_mask_(both), lambda: sc.plan_(model, "state")):
        with pytest.raises(ValueError, match="another tool computes"):
            refused()
    with pytest.raises(ValueError, match="another tool computes"):
        sc.densify_(model)
    prune.remove(layer, "weight")
    torch.testing.assert_close(layer(X), expected)
    assert torch.equal(sc.densify_(model)[0](X), F.linear(X, model[0].weight, model[0].bias))
    model = masked(net())
    parametrizations.weight_norm(model[2])
    model(X).sum().backward()
    with pytest.raises(ValueError, match="another tool computes"):
        sc.plan_(model, "state")


@pytest.mark.parametrize("kind", ["prune", "weight_norm", "spectral_norm", "parametrize", "lazy"])
def test_reparametrised_layers_are_refused_before_anything_changes(kind: str) -> None:
    def make() -> nn.Module:
        layer = nn.Linear(6, 8)
        return {
            "prune": lambda: prune.l1_unstructured(layer, "weight", 0.5),
            "weight_norm": lambda: nn.utils.weight_norm(layer),
            "spectral_norm": lambda: nn.utils.spectral_norm(layer),
            "parametrize": lambda: parametrizations.orthogonal(layer),
            "lazy": lambda: nn.LazyLinear(8),
        }[kind]()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of its older norms
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 6), make()))
    with pytest.raises(ValueError, match="run the model once" if kind == "lazy" else "remove that"):
        sc.sparsify_(model)
    assert not sc.sparse_layers(model)
    assert list(sc.sparse_layers(sc.sparsify_(model, "!1"))) == ["0"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_noise_between_backward_and_step_leaves_zeros(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    model = sc.sparsify_(mlp())
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(randn(*layer.weight_shape) > 0)
    steps = optimizer(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    for i in range(4):
        steps.zero_grad()
        model(randn(8, 12, seed=i)).square().sum().backward()
        if i % 2:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(randn(*p.shape))
        steps.step()
        for layer in sc.sparse_layers(model).values():
            assert bool((layer.raw_weight[~layer.pattern.mask] == 0).all()), i
