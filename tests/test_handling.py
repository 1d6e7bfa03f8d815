"""What others do to a sparse layer's weight: stand in for it, share it, write past autograd, save it otherwise."""

import copy
import gc
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rand, randn, seeded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import sparsecore as sc
from sparsecore.patterns import Planned

X, IDS = randn(6, 8), torch.arange(10)


def plain(seed: int = 0) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), seed)


def masked(plan: str = "mask", seed: int = 0) -> nn.Module:
    model = sc.sparsify_(plain(seed))
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight_shape, seed=10 * seed + i) < 0.5)
    return sc.plan_(model, plan)


def pruned_of(model: nn.Module) -> Tensor:
    return model[0].raw_weight.detach()[~model[0].pattern.mask]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("plan", ["mask", "state"])
def test_masks_that_a_cast_made_numbers(plan: str, dtype: torch.dtype) -> None:
    a, b = masked(), masked(plan, seed=1)
    state = {k: v.to(dtype) if k.endswith("mask") else v for k, v in a.state_dict().items()}
    b.load_state_dict(state)
    assert torch.equal(b[0].pattern.mask, a[0].pattern.mask)
    torch.testing.assert_close(b(X), a(X))
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(RuntimeError, match=r"0.pattern.mask: expected a mask of 0 and 1"):
        b.load_state_dict(state | {"0.pattern.mask": torch.full((16, 8), 0.5)})
    assert torch.equal(b.state_dict()["0.weight"], before["0.weight"])


def test_a_plans_state_is_plain_elsewhere_and_tells_of_what_is_lost(tmp_path: Path) -> None:
    model = masked("state")
    with pytest.warns(sc.SparsityWarning, match=r"plan_\(model, 'mask'\) for tools that write"):
        for value in model.state_dict().values():  # as timm's averages do
            value.copy_(0.5 * value)
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state["0.weight"].detach().mul_(2)  # as torch.distributed.checkpoint reads
        other = masked("state", seed=1)
        other.load_state_dict(state)
        del state
        gc.collect()
    assert torch.equal(other[0].effective_weight, 2 * model[0].effective_weight)
    state = model.state_dict()
    expected = masked().state_dict()["0.weight"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    save_file(dict(state), tmp_path / "state")
    for made in (
        torch.load(file, weights_only=True),
        copy.deepcopy(state),
        load_file(tmp_path / "state"),
        {k: v.clone() for k, v in state.items()},
    ):
        assert type(made["0.weight"]) is Tensor and torch.equal(made["0.weight"], expected)
        made["0.weight"].zero_()
    dense = plain(1)
    dense.load_state_dict({k: v for k, v in state.items() if "mask" not in k}, assign=True)
    assert type(dense[0].weight) is nn.Parameter and dense[0].weight.requires_grad
    F.cross_entropy(dense(X), torch.arange(6) % 4).backward()
    torch.optim.SGD(dense.parameters(), 0.1).step()
    assert not torch.equal(dense[0].weight, expected)
    assert torch.equal(model[0].effective_weight, expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.chunk(2)[0].fill_(7),
        lambda w: [row.fill_(7) for row in w],
        lambda w: w.split(4)[1].zero_(),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: w.detach().numpy().fill(7),
    ],
)
def test_views_of_computed_weights_refuse_too(write: Callable) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"expected no writing|read-only"):
        write(masked("state")[0].weight.data)


class Held(nn.Module):
    """Somebody else computes with the layer's parameter as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.w = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.w)


@pytest.mark.parametrize("how", ["data", "vector"])
def test_writes_past_autograd_do_not_reach_other_holders(how: str) -> None:
    model = sc.sparsify_(seeded(Held))
    mask = rand(8, 8) < 0.5
    sc.Ticket({"a": mask}, {}).apply_(model, weights=False)
    values = randn(8, 8)
    if how == "data":
        next(model.parameters()).data.copy_(values)
    else:
        nn.utils.vector_to_parameters(values.flatten(), model.parameters())
    kept = values * mask
    torch.testing.assert_close(model(X), F.linear(F.linear(X, kept), kept))
    assert not next(model.parameters()).detach()[~mask].any()


def test_replaced_memory_is_seen_without_another_holder() -> None:
    model = masked()
    vector = randn(sum(p.numel() for p in model.parameters()))
    nn.utils.vector_to_parameters(vector, model.parameters())
    model(X)
    assert not pruned_of(model).any()


def test_two_parameters_in_one_memory_are_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ValueError, match=r"0.weight and 1.weight in one"):
        sc.sparsify_(model)
    assert type(model[0]) is nn.Linear
    parts = randn(2, 8, 8)  # side by side is fine
    model[0].weight.data, model[1].weight.data = parts[0], parts[1]
    sc.sparsify_(model)


def test_a_skeleton_without_values_takes_a_file() -> None:
    expected = masked()
    with torch.device("meta"):
        model = sc.sparsify_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    ticket = sc.Ticket(
        {n: la.pattern.mask for n, la in sc.sparse_layers(expected).items()}, plain().state_dict()
    )
    with pytest.raises(ValueError, match=r"got the meta device in 0\.weight"):
        ticket.apply_(model)
    model.load_state_dict(expected.state_dict(), assign=True)
    torch.testing.assert_close(model(X), expected(X))
    with torch.device("meta"):
        model = sc.sparsify_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    ticket.apply_(model, weights=False).to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(model(X), expected(X))
    planned = masked("state").to("meta").to_empty(device="cpu")
    planned.load_state_dict(expected.state_dict())
    torch.testing.assert_close(planned(X), expected(X))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda m: torch.vmap(m)(X),
    "jacobian": lambda m: torch.func.jacrev(m)(X[0]),
    "jvp": lambda m: torch.func.jvp(m, (X,), (X,)),
    "grad": lambda m: torch.func.grad(
        lambda p: torch.func.functional_call(m, p, (X,)).square().sum()
    )(dict(m.named_parameters())),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_functions(name: str) -> None:
    model = masked()
    dense = sc.densify_(copy.deepcopy(model))
    found, expected = TRANSFORMS[name](model), TRANSFORMS[name](dense)
    if name == "grad":
        masks = {f"{n}.weight": la.pattern.mask for n, la in sc.sparse_layers(model).items()}
        expected = {k: g * masks.get(k, 1) for k, g in expected.items()}
    torch.testing.assert_close(found, expected)


def test_a_parametrisation_that_fills_pruned_places_is_refused() -> None:
    model = masked()
    parametrizations.weight_norm(model[2])
    model(X)
    seeded(lambda: parametrizations.orthogonal(model[0]))
    with pytest.raises(ValueError, match="leaves pruned places zero"):
        model(X)


def test_weights_of_other_shapes_are_refused() -> None:
    model = masked()
    with pytest.raises(ValueError, match=r"of its mask's shape \(16, 8\), got \(1, 8\)"):
        model[0].weight = nn.Parameter(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="got None"):
        model[0].weight = None
    model[0].weight.data = torch.zeros(20, 8)
    with pytest.raises(ValueError, match=r"densify_\(model\) before layers are resized"):
        model(X)


def test_rows_are_renormalised_by_what_is_kept() -> None:
    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Embedding(10, 8, max_norm=1.0))), "0")
    mask, values = rand(10, 8) < 0.5, 3 * randn(10, 8)
    model[0].set_mask_(mask)
    model(IDS)
    next(model.parameters()).data.copy_(values)
    plain = nn.Embedding(10, 8, max_norm=1.0, _weight=values * mask)
    torch.testing.assert_close(model(IDS), plain(IDS))


@pytest.mark.parametrize("plan", ["csr", "compact"])
def test_formats_do_not_multiply_for_recurrent_matrices(plan: str) -> None:
    model = sc.sparsify_(seeded(lambda: nn.LSTM(8, 6)))
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.1)
    with pytest.raises(ValueError, match="no format multiplies for LSTM"):
        sc.plan_(model, plan)
    sc.plan_(model, "auto", randn(3, 2, 8))
    assert all("no format multiplies for LSTM" in row.choice.reason for row in sc.report(model))


def test_an_open_choice_is_not_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plans.json"
    monkeypatch.setenv("SPARSECORE_PLANS", str(file))
    model = sc.plan_(masked("mask"), "auto")
    with pytest.raises(TypeError, match=r"torch.jit.trace: expected formats that are chosen"):
        torch.jit.trace(model, X)
    assert all(isinstance(layer.pattern, Planned) for layer in sc.sparse_layers(model).values())
    expected = masked()(X)
    torch.testing.assert_close(model(X), expected)
    assert json.loads(file.read_text())


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}])
def test_embeddings_that_gates_cannot_stand_before(options: dict) -> None:
    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Embedding(10, 8, **options), nn.Linear(8, 4))), ["0", "1"]
    )
    batches = [(IDS, IDS % 4)]
    before = copy.deepcopy(model.state_dict())
    for search in (
        sc.JointSearch(epochs=1),
        sc.ContinuousSparsification(epochs=1),
        sc.EdgePopup(epochs=1),
    ):
        with pytest.raises(ValueError, match="in the embedding 0"):
            search(model, batches, sparsity=0.5)
    ticket = sc.OneShot(sc.scores.snip)(model, batches, sparsity=0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(ticket.weights["0.weight"], before["0.weight"])
    ticket.apply_(model)
    if "sparse" in options:
        with pytest.raises(ValueError, match="dense gradients, got sparse=True"):
            sc.plan_(model, "state")
