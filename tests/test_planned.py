"""Planned layers as drop-ins: the same numbers, keys and habits under every plan."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import DEVICE, Blobs, mlp, rand, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sparsecore as sc
from sparsecore.convert import sparse_layers
from sparsecore.granularity import parse_granularity
from sparsecore.nn import SparseConv2d, SparseLinear
from sparsecore.patterns import Masked, Planned
from sparsecore.scores import SCORES
from sparsecore.tickets import Ticket, TicketError

PLANS = ["state", "csr", "compact", "auto"]
CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 1), "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))


def masked(density: float = 0.3, **shape: int) -> nn.Module:
    model = sc.sparsify_(mlp(**shape))
    for i, layer in enumerate(sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight_shape, seed=i) < density)
    return model


def small_conv() -> nn.Module:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip

    model = sc.sparsify_(seeded(build))
    for i, layer in enumerate(sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.weight_shape, seed=i) < 0.3)
    return model


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("plan", PLANS)
def test_plans_of_one_ticket_train_to_the_same_weights(plan: str, optimizer: str) -> None:
    runs = []
    for name in ("mask", plan):
        model = sc.plan_(masked(), name)
        steps = OPTIMIZERS[optimizer](model.parameters())
        for index in range(25):
            for x, y in Blobs().epoch(index):
                steps.zero_grad()
                F.cross_entropy(model(x), y).backward()
                steps.step()
        held = sum(s.numel() for p in steps.state.values() for s in p.values() if s.ndim)
        runs.append((model, held))
    (dense, dense_state), (planned, kept_state) = runs
    states = [m.state_dict() for m in (dense, planned)]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=2e-4, atol=2e-5, msg=key)
    assert kept_state < 0.5 * dense_state  # an optimiser holds kept weights only


@pytest.mark.parametrize("plan", PLANS)
def test_convolutional_models_train_alike(plan: str) -> None:
    models = [sc.plan_(small_conv(), name) for name in ("mask", plan)]
    x, y = randn(6, 3, 9, 9), torch.arange(6) % 4
    for model in models:
        steps = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(10):
            steps.zero_grad()
            F.cross_entropy(model(x), y).backward()
            steps.step()
    for (key, mine), other in zip(
        models[1].state_dict().items(), models[0].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["block:16x16", "block"])
def test_formats_of_kernels_train_alike(plan: str) -> None:
    models = [sc.plan_(masked().to(DEVICE), name) for name in ("mask", plan)]
    for model in models:
        steps = torch.optim.AdamW(model.parameters(), 1e-2)
        for x, y in Blobs():
            steps.zero_grad()
            F.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE)).backward()
            steps.step()
    for (key, mine), other in zip(
        models[1].state_dict().items(), models[0].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("plan", ["state", "csr", "compact"])
def test_every_convolution(options: dict, plan: str) -> None:
    layers = [seeded(lambda: SparseConv2d(4, 8, **options)) for _ in range(2)]
    for layer in layers:
        layer.set_mask_(rand(*layer.weight_shape, seed=4) > 0.7)
    layers[1].plan_(plan)
    x = randn(2, 4, 9, 9, seed=3)
    results = []
    for layer in layers:
        image = x.clone().requires_grad_()
        y = layer(image)
        y.square().sum().backward()
        results.append((y, image.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
    dense = layers[0].raw_weight.grad[layers[0].pattern.mask]
    torch.testing.assert_close(layers[1].raw_weight.grad, dense)


@pytest.mark.parametrize("plan", PLANS)
def test_files_do_not_depend_on_plans(plan: str) -> None:
    plain, planned = masked(), sc.plan_(masked(), plan)
    x = randn(5, 12)
    for model in (plain, planned):
        assert torch.equal(model.state_dict()["0.weight"], plain.state_dict()["0.weight"])
        assert list(model.state_dict()) == list(plain.state_dict())
    file = io.BytesIO()
    torch.save(planned.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for target in (sc.sparsify_(mlp(seed=5)), masked(0.6), sc.plan_(masked(0.6), plan)):
        target.load_state_dict(state)
        torch.testing.assert_close(target(x), plain(x))
        assert torch.equal(
            sparse_layers(target)["2"].pattern.mask, sparse_layers(plain)["2"].pattern.mask
        )
    dense = mlp(seed=9)
    missing, unexpected = planned.load_state_dict(dense.state_dict(), strict=False)
    assert not missing and not unexpected  # a dense checkpoint loads, our mask stays
    expected = dense[0].weight * sparse_layers(plain)["0"].pattern.mask
    assert torch.equal(planned[0].weight, expected)
    with pytest.raises(RuntimeError, match="size mismatch"):
        planned.load_state_dict(mlp(hidden=7).state_dict())


@pytest.mark.parametrize("plan", PLANS)
def test_copies_and_pickles(plan: str) -> None:
    model = sc.plan_(masked(), plan)
    x = randn(5, 12)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), y)
        with torch.no_grad():
            other[0].raw_weight.zero_()
        assert not torch.equal(other(x), y)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("plan", PLANS)
def test_densify_gives_plain_layers_with_the_same_keys(plan: str) -> None:
    model = sc.plan_(masked(), plan)
    x, keys = randn(5, 12), list(mlp().state_dict())
    y = model(x)
    plain = sc.densify_(model)
    assert type(plain[0]) is nn.Linear and list(plain.state_dict()) == keys
    assert isinstance(plain[0].weight, nn.Parameter) and plain[0].weight.requires_grad
    torch.testing.assert_close(plain(x), y)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_accumulation_checkpointing_and_averages(plan: str) -> None:
    model = sc.plan_(masked(), plan)
    x, y = randn(8, 12), torch.arange(8) % 4

    def gradients(run: Callable[[], None]) -> list[Tensor]:
        model.zero_grad()
        run()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients(lambda: F.cross_entropy(model(x), y).backward())

    def halves() -> None:
        for part, labels in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(part), labels) / 2).backward()

    def recomputed() -> None:
        F.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()

    for found in (gradients(halves), gradients(recomputed)):
        for a, b in zip(found, whole, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)
        low = gradients(lambda: F.cross_entropy(model(x), y).backward())
    assert scores.dtype == torch.bfloat16
    for a, b in zip(low, whole, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(average(x), model(x))
    assert all(not g for g in torch.autograd.grad(model(x).sum(), [model[0].raw_weight])[0].isnan())


@pytest.mark.parametrize("plan", PLANS)
def test_compiles_as_one_graph(plan: str) -> None:
    torch._dynamo.reset()
    model, x = sc.plan_(masked(), plan), randn(8, 12)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, b in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
    fresh = sc.plan_(masked(), plan)  # compiled before it ever ran: the floor is chosen
    torch.testing.assert_close(torch.compile(fresh, fullgraph=True)(x), expected)


def test_code_that_takes_the_weight_out_of_a_layer() -> None:
    layers = [seeded(lambda: SparseLinear(6, 5)) for _ in range(2)]
    for layer in layers:
        layer.set_mask_(rand(5, 6) < 0.5)
    layers[1].plan_("csr")
    x = randn(3, 6)
    torch.testing.assert_close(F.linear(x, layers[1].weight, layers[1].bias), layers[0](x))
    F.linear(x, layers[1].weight).square().sum().backward()
    F.linear(x, layers[0].weight).square().sum().backward()
    kept = layers[0].raw_weight.grad[layers[0].pattern.mask]
    torch.testing.assert_close(layers[1].raw_weight.grad, kept)


@pytest.mark.parametrize("plan", ["mask", "state", "csr", "compact"])
def test_another_mask_keeps_what_stays(plan: str) -> None:
    layer = seeded(lambda: SparseLinear(30, 20))
    before, after = rand(20, 30, seed=1) < 0.4, rand(20, 30, seed=2) < 0.4
    sc.plan_(layer.set_mask_(before), plan)
    parameter, weight = layer.raw_weight, layer.weight.detach()
    assert torch.equal(layer.remask_(after), before)
    assert layer.raw_weight is parameter
    assert parameter.shape == ((20, 30) if plan == "mask" else (int(after.sum()),))
    assert torch.equal(layer.weight, torch.where(after, weight, 0))  # what has grown starts at 0
    assert torch.equal(layer.pattern.mask, after)
    layer.remask_(before, grown=torch.ones(20, 30))
    expected = torch.where(after, weight, 1.0) * before
    assert torch.equal(layer.weight, expected)
    layer(randn(4, 30)).sum().backward()
    with pytest.raises(ValueError, match="layer with a mask"):
        layer.remask_(after[1:])


@pytest.mark.parametrize("plan", ["mask", "csr"])
def test_another_mask_carries_the_optimizers_state_along(plan: str) -> None:
    model = sc.plan_(masked(), plan)
    adam = torch.optim.AdamW(model.parameters(), 1e-2)
    for x, y in Blobs():
        adam.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        adam.step()
    layer = sparse_layers(model)["0"]
    dense = layer.pattern(adam.state[layer.raw_weight]["exp_avg"])
    masks = {
        name: rand(*la.weight_shape, seed=7) < 0.2 for name, la in sparse_layers(model).items()
    }
    sc.remask_(model, masks, adam)
    moved = adam.state[layer.raw_weight]["exp_avg"]
    moved = moved if plan == "mask" else layer.pattern(moved)
    assert torch.equal(moved, torch.where(masks["0"], dense, 0)) and moved.any()
    for x, y in Blobs():
        adam.zero_grad()
        loss = F.cross_entropy(model(x), y)  # while the last graph of the old shape is still alive
        loss.backward()
        adam.step()


def ticket() -> tuple[Ticket, nn.Module]:
    model = masked(0.2)
    masks = {name: layer.pattern.mask for name, layer in sparse_layers(model).items()}
    weights = dict(mlp().state_dict())
    return Ticket(masks, weights, {"granularity": "weight"}), model


@pytest.mark.parametrize("granularity", ["block:16x16", "vector:16", "channel", "2:4"])
@pytest.mark.parametrize("method", ["cts", *SCORES])
def test_structured_searches_feed_plans(method: str, granularity: str) -> None:
    """The ticket carries its granularity, and "auto" and the format made for it train it."""
    of = parse_granularity(granularity)
    search = (
        sc.OneShot(SCORES[method], of)
        if method != "cts"
        else sc.ConcreteSearch(epochs=1, granularity=of)
    )
    found = search(sc.sparsify_(mlp(hidden=64)), Blobs(), sparsity=0.5)
    assert str(found.granularity) == granularity
    expected = found.apply_(sc.sparsify_(mlp(hidden=64)))
    x = randn(5, 12)
    for plan in ("auto", "block" if granularity == "block:16x16" else "state"):
        model = found.apply_(sc.sparsify_(mlp(hidden=64)), plan=plan)
        model, x = model.to(DEVICE), x.to(DEVICE)
        torch.testing.assert_close(model(x).cpu(), expected(x.cpu()), rtol=1e-3, atol=1e-4)
        formats = {row.choice.formats for row in sc.report(model)}
        if plan == "block":
            assert formats == {(granularity,) * 3}


@pytest.mark.parametrize("plan", PLANS)
def test_a_ticket_applies_with_a_plan_and_again_with_another(plan: str) -> None:
    found, plain = ticket()
    model = found.apply_(sc.sparsify_(mlp(seed=3)), plan=plan)
    x = randn(5, 12)
    torch.testing.assert_close(model(x), plain(x))
    model = found.apply_(model, plan="mask")
    assert all(isinstance(la.pattern, Masked) for la in sparse_layers(model).values())
    torch.testing.assert_close(model(x), plain(x))
    model = found.apply_(model, x, plan="auto")
    assert all(row.choice.measured for row in sc.report(model))
    torch.testing.assert_close(model(x), plain(x))


def test_bad_plans_change_nothing() -> None:
    model = masked()
    before = copy.deepcopy(model.state_dict())
    for plan, message in (
        ("nope", "expected auto"),
        ("csr:3", "expected auto"),
        ("block:x", "sides"),
    ):
        with pytest.raises(ValueError, match=message):
            sc.plan_(model, plan)
    shared = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    shared[1].weight = shared[0].weight
    sc.sparsify_(shared)
    for layer in shared:
        layer.set_mask_(torch.eye(4) > 0)
    with pytest.raises(ValueError, match=r"shared by 0\.weight, 1\.weight"):
        sc.plan_(shared, "state")
    with pytest.raises(ValueError, match="no sparse layers"):
        sc.plan_(mlp(), "state")
    with pytest.raises(ValueError, match="expected a layer with a mask"):
        seeded(lambda: SparseLinear(3, 3)).plan_("state")
    assert all(isinstance(la.pattern, Masked) for la in sparse_layers(model).values())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(TicketError):
        ticket()[0].apply_(sc.sparsify_(mlp(hidden=9)), plan="csr")


def test_what_is_not_a_weight_or_a_place_is_refused() -> None:
    layer = seeded(lambda: SparseLinear(6, 5)).set_mask_(rand(5, 6) < 0.5)
    with torch.no_grad():
        layer.raw_weight[layer.pattern.mask] = torch.nan
    with pytest.raises(ValueError, match="finite kept weights"):
        layer.plan_("csr")
    assert isinstance(layer.pattern, Masked) and layer.raw_weight.shape == (5, 6)
    pattern = Planned(rand(5, 6) < 0.5)
    for bad in (pattern.index + 30, pattern.index - 30, pattern.index.flip(0), pattern.index * 0):
        state = pattern.__getstate__() | {"index": bad}
        with pytest.raises(ValueError, match="ascending places"):
            Planned.__new__(Planned).__setstate__(state)


def test_searches_refuse_a_planned_model() -> None:
    model = sc.plan_(masked(), "csr")
    with pytest.raises(ValueError, match="plan_"):
        sc.OneShot(sc.scores.magnitude)(model, Blobs(), sparsity=0.5)
    with pytest.raises(ValueError, match="plan_"):
        sc.ConcreteSearch(epochs=1)(model, Blobs(), sparsity=0.5)


def test_whole_and_empty_masks() -> None:
    model = masked()
    layers = sparse_layers(model)
    layers["0"].set_mask_(torch.ones(24, 12, dtype=torch.bool))
    layers["2"].set_mask_(torch.zeros(4, 24, dtype=torch.bool))
    x, keys = randn(5, 12), set(model.state_dict())
    expected = model(x)
    expected.square().sum().backward()
    bias = layers["0"].bias.grad.clone()
    model.zero_grad()
    sc.plan_(model, "auto", x)
    assert set(model.state_dict()) == keys
    assert "nothing is pruned" in sc.report(model)[0].choice.reason
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    torch.testing.assert_close(layers["0"].bias.grad, bias)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    adam.step()
    assert layers["2"].raw_weight.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [lambda: nn.Linear(12, 24), lambda: nn.Conv2d(4, 6, 3, groups=2)])
def test_nothing_pruned_under_state(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    plain = seeded(build)
    layer = sc.sparsify_(copy.deepcopy(plain))
    layer.set_mask_(torch.ones_like(layer.raw_weight, dtype=torch.bool)).plan_("state")
    x = randn(*((5, 12) if isinstance(plain, nn.Linear) else (2, 4, 5, 5))).requires_grad_()
    grads = []
    for module in (plain, layer):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = module(x)
        parameters = (x, module.bias, module.weight if module is plain else module.raw_weight)
        grads.append([y, *torch.autograd.grad(y.float().square().sum(), parameters)])
    # In bf16 ours sums the bias's gradient in float32, PyTorch does not.
    rounding = 4 * torch.finfo(dtype).eps
    for a, b in zip(*grads, strict=True):
        scale = rounding * a.abs().max().item()
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=0, atol=scale)
