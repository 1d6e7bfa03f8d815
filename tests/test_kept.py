"""A mask keeps its parameter and nothing else: other parameters, gradients changed by hand, several layers, models."""

from collections.abc import Callable

import pytest
import torch
from helpers import rand, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sparsecore as sc
from sparsecore.patterns import Dense

X, Y = randn(6, 8), torch.arange(6) % 4


def plain(seed: int = 0) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), seed)


def masked(seed: int = 0) -> nn.Module:
    model = sc.sparsify_(plain(seed))
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight_shape, seed=10 * seed + i) < 0.5)
    return model


def pruned_of(model: nn.Module) -> Tensor:
    return model[0].raw_weight.detach()[~model[0].pattern.mask]


def backward(model: nn.Module) -> None:
    F.cross_entropy(model(X), Y).backward()


def noise(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.add_(randn(*p.shape, seed=7))


def centralised(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.sub_(p.grad.mean(0, keepdim=True))


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "noise": noise,
    "centralised": centralised,
    "new": lambda m: [setattr(p, "grad", torch.ones_like(p)) for p in m.parameters()],  # type: ignore
    "hook": lambda m: None,
}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_by_hand_move_no_pruned_place(change: str, kind: type) -> None:
    model = masked()
    parameters = [p for p in model.parameters() if p.ndim == 2]
    optimizer = kind(parameters, lr=0.1)
    if change == "hook":
        for p in parameters:
            p.register_hook(lambda grad: grad + 1)
    for i in range(4):
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        backward(model)
        CHANGES[change](model)
        optimizer.step()
        assert not pruned_of(model).any()
        if kind is torch.optim.AdamW:
            held = optimizer.state[model[0].raw_weight]["exp_avg"]
            assert not held[~model[0].pattern.mask].any()


def test_gradients_as_they_are_are_not_masked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen: list[int] = []
    zero = sc.zeros.zero_outside_
    monkeypatch.setattr(sc.zeros, "zero_outside_", lambda *a: seen.append(1) or zero(*a))

    def steps(**options: bool) -> int:
        seen.clear()
        for _ in range(3):
            optimizer.zero_grad(**options)
            for _ in range(2):  # accumulated
                backward(model)
            with sc.zeros.scaling(model.parameters()):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return len(seen)

    steps(set_to_none=True)  # once: the optimiser's state is new
    assert steps(set_to_none=True) == steps(set_to_none=False) == 0


def test_a_call_with_other_parameters_leaves_both_alone() -> None:
    model = masked()
    teacher = {k: nn.Parameter(randn(*p.shape, seed=5)) for k, p in model.named_parameters()}
    before = {k: p.detach().clone() for k, p in teacher.items()}
    own = model[0].raw_weight
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    loss = model(X).square().sum()
    taught = torch.func.functional_call(model, teacher, (X,))
    expected = F.linear(X, before["0.weight"] * model[0].pattern.mask, before["0.bias"]).relu()
    expected = F.linear(expected, before["2.weight"] * model[2].pattern.mask, before["2.bias"])
    torch.testing.assert_close(taught, expected)
    loss.backward()
    optimizer.step()
    assert own._backward_hooks and not pruned_of(model).any()
    assert all(torch.equal(teacher[k], before[k]) for k in before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["set", "assign", "empty"])
def test_a_parameter_of_its_own_that_is_new_is_kept(how: str, frozen: bool) -> None:
    model = masked().requires_grad_(not frozen)
    old = model[0].raw_weight  # an optimiser may still hold it
    if how == "set":
        model[0].weight = nn.Parameter(randn(16, 8), requires_grad=not frozen)
    elif how == "assign":
        model.load_state_dict(
            {k: v.clone() for k, v in masked(seed=2).state_dict().items()}, assign=True
        )
    else:
        model.to("meta").to_empty(device="cpu")
        model.load_state_dict(masked(seed=2).state_dict())
    assert model[0].raw_weight is not old
    model(X)
    assert not pruned_of(model).any()
    with torch.no_grad():
        model[0].raw_weight.add_(1)
    model(X)
    assert not pruned_of(model).any()


def test_hooks_of_masks_that_are_gone_go_too() -> None:
    model = masked()
    for i in range(5):
        sc.remask_(model, {"0": rand(16, 8, seed=i) < 0.5})
    assert len(model[0].raw_weight._backward_hooks) == 1


def test_one_weight_under_two_masks_is_refused() -> None:
    one, two = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    two.weight = one.weight
    a, b = sc.sparsify_(nn.Sequential(one)), sc.sparsify_(nn.Sequential(two))
    first, second = (sc.Ticket({"0": rand(8, 8, seed=i) < 0.5}, {}) for i in range(2))
    first.apply_(a, weights=False)
    with pytest.raises(ValueError, match="expected one mask for one weight"):
        second.apply_(b, weights=False)
    assert isinstance(b[0].pattern, Dense)
    first.apply_(b, weights=False)  # the same mask
    tied = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))))
    for i, layer in enumerate(tied):
        layer.set_mask_(rand(8, 8, seed=i) < 0.5)
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="expected one mask for one weight"):
        tied(X)


@pytest.mark.parametrize("held", [False, True])
def test_a_parameter_put_past_setattr_is_kept(held: bool) -> None:
    """As Hugging Face's and others' loaders do, while an optimiser may hold the old one."""
    model = masked()
    old = torch.optim.SGD(model.parameters(), 0.1) if held else None
    model[0]._parameters["weight"] = nn.Parameter(randn(16, 8))
    model(X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        backward(model)
        optimizer.step()
    assert not pruned_of(model).any() and isinstance(model[0].weight, nn.Parameter)
    assert old is None or old.param_groups


@pytest.mark.parametrize("frozen", [False, True])
def test_another_mask_for_a_weight_of_two_models_is_refused_whole(frozen: bool) -> None:
    a = sc.sparsify_(plain())
    b = plain()
    for i in (0, 2):
        b[i].weight = a[i].raw_weight
    sc.sparsify_(b)
    for model in (a, b):
        model.requires_grad_(not frozen)
    one, two = (
        sc.Ticket({"0": rand(16, 8, seed=i) < 0.5, "2": rand(4, 16, seed=i) < 0.5}, {})
        for i in range(2)
    )
    one.apply_(a, weights=False)
    one.apply_(b, weights=False)  # which looks last
    state = {k: v.clone() for k, v in b.state_dict().items()}
    for refused in (
        lambda: two.apply_(b, weights=False),
        lambda: two.apply_(a, weights=False),
        lambda: sc.remask_(b, two.masks),
        lambda: b[0].remask_(two.masks["0"]),
        lambda: b.load_state_dict(state | {"0.pattern.mask": two.masks["0"]}),
    ):
        with pytest.raises((ValueError, RuntimeError), match="expected one mask for one weight"):
            refused()
        assert torch.equal(b[0].pattern.mask, one.masks["0"])
        b(X)


def test_a_dense_model_is_free_of_layers_that_others_still_hold() -> None:
    model = masked()
    layers = sc.sparse_layers(model)
    pruned = ~layers["0"].pattern.mask
    sc.densify_(model)
    backward(model)
    alive = model[0].weight.grad.any(1, keepdim=True)
    assert (model[0].weight.grad != 0)[pruned & alive].all()
    sc.sparsify_(model)
    sc.Ticket({"0": rand(16, 8, seed=5) < 0.5}, {}).apply_(model, weights=False)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(randn(2, 8)), nn.Parameter(torch.zeros(16, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def test_a_parametrisation_that_fills_pruned_places_later_is_refused_then() -> None:
    model = masked()
    parametrize.register_parametrization(model[0], "weight", LowRank())
    model(X)
    with torch.no_grad():
        model[0].parametrizations.weight[0].b.add_(1)
    with pytest.raises(ValueError, match="leaves pruned places zero"):
        model(X)


def test_layers_behind_hooks_of_others_are_refused() -> None:
    model = plain()
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)
    with pytest.raises(ValueError, match="sparsify_: expected 0 to have its class's forward"):
        sc.sparsify_(model)
    assert type(model[2]) is nn.Linear
    sc.sparsify_(model, "!0")
