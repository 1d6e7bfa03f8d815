"""Sparse layers as drop-ins: same outputs, keys and habits as the plain layers they replace."""

import copy
import io
import pickle

import pytest
import torch
from helpers import mlp, rand, randn, seeded
from torch import nn

import sparsecore as sc
from sparsecore.convert import batch_statistics
from sparsecore.gates import Concrete, HardConcrete, TopK
from sparsecore.layer import SparseLayer
from sparsecore.nn import SparseConv2d, SparseLinear
from sparsecore.patterns import Gated, Masked

CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 1), "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 4},
]


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_conv_computes_with_the_masked_weight(options: dict) -> None:
    dense = seeded(lambda: nn.Conv2d(4, 8, **options))
    sparse = seeded(lambda: SparseConv2d(4, 8, **options))
    x = randn(2, 4, 9, 9, seed=3)
    assert torch.equal(dense(x), sparse(x))
    mask = rand(*dense.weight.shape, seed=4) > 0.7
    sparse.set_mask_(mask)
    with torch.no_grad():
        dense.weight.mul_(mask)
    assert torch.equal(dense(x), sparse(x))
    sparse(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(sparse.raw_weight.grad, dense.weight.grad * mask)
    channels_last = sparse(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, dense(x))


def test_signature_and_repr_are_those_of_the_plain_layers() -> None:
    layer = seeded(lambda: SparseLinear(3, 5, bias=False, dtype=torch.float64))
    assert isinstance(layer, nn.Linear) and layer.bias is None
    assert layer.weight.dtype == torch.float64 and "in_features=3" in repr(layer)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]


def test_pruned_gradients_are_exact_zeros_even_from_inf() -> None:
    layer = seeded(lambda: SparseLinear(2, 2, bias=False))
    layer.set_mask_(torch.tensor([[True, False], [False, True]]))
    layer(torch.tensor([[float("inf"), 1.0]])).sum().backward()
    grad = layer.raw_weight.grad
    assert grad is not None and grad[1, 0] == 0 and grad[0, 1] == 0


def test_a_mask_that_changes_is_seen_at_once() -> None:
    layer = seeded(lambda: SparseLinear(6, 5, bias=False))
    layer.pattern = Masked(rand(5, 6) < 0.5)  # looked through, and not decided
    with torch.no_grad():
        layer.raw_weight.fill_(2.0)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            layer.to(dtype)
            for other in (rand(5, 6, seed=1) < 0.5, rand(5, 6, seed=2) < 0.5):
                layer.pattern.mask.copy_(other)  # in place, and as another tensor
                assert torch.equal(layer.weight, 2.0 * other.to(dtype))
                layer.pattern.mask = ~other
                assert torch.equal(layer.weight, 2.0 * (~other).to(dtype))


def test_from_dense_shares_and_to_dense_gives_back() -> None:
    dense = seeded(lambda: nn.Linear(4, 3))
    dense.eval()
    sparse = SparseLinear.from_dense(dense)
    assert sparse.raw_weight is dense.weight and not sparse.training
    assert type(dense) is nn.Linear and "pattern" not in dense._modules
    sparse.set_mask_(rand(3, 4) > 0.5)
    back = sparse.to_dense()
    assert type(back) is nn.Linear and list(back.state_dict()) == ["weight", "bias"]
    x = randn(2, 4)
    assert torch.equal(back(x), sparse(x))
    with pytest.raises(TypeError, match="expected Linear, got Conv2d"):
        SparseLinear.from_dense(seeded(lambda: nn.Conv2d(1, 1, 1)))


def test_state_dict_carries_the_topology_both_ways() -> None:
    model = sc.sparsify_(mlp())
    first = sc.sparse_layers(model)["0"]
    mask = rand(*first.weight.shape) > 0.6
    first.set_mask_(mask)
    assert set(model.state_dict()) == {*mlp().state_dict(), "0.pattern.mask"}

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = sc.sparsify_(mlp(seed=1))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    loaded = sc.sparse_layers(other)["0"]
    assert isinstance(loaded.pattern, Masked) and torch.equal(loaded.pattern.mask, mask)

    # A dense checkpoint loads under the mask, pruned entries zero.
    model.load_state_dict(mlp(seed=2).state_dict())
    assert torch.equal(first.raw_weight != 0, mask)
    # ... and the plain model takes the densified weights.
    mlp().load_state_dict(sc.densify_(copy.deepcopy(model)).state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_patterns(how) -> None:
    model = sc.sparsify_(mlp())
    sc.sparse_layers(model)["0"].set_mask_(rand(24, 12) > 0.5)
    sc.sparse_layers(model)["2"].pattern = Gated(torch.Size((4, 24)), Concrete(), density=0.3)
    twin, x = how(model), randn(5, 12)
    assert torch.equal(twin(x), model(x))
    assert sc.sparse_layers(twin)["0"].raw_weight is not sc.sparse_layers(model)["0"].raw_weight


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam"])
def test_any_optimiser_leaves_pruned_weights_at_positive_zero(optimizer: str) -> None:
    model = sc.sparsify_(mlp())
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight.shape, seed=5) > 0.8)
    build = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    }
    steps = build[optimizer](model.parameters())
    before = {n: m.raw_weight.detach().clone() for n, m in sc.sparse_layers(model).items()}
    for i in range(20):
        steps.zero_grad()
        model(randn(8, 12, seed=i)).square().mean().backward()
        steps.step()
    for name, layer in sc.sparse_layers(model).items():
        mask = layer.pattern.mask
        pruned = layer.raw_weight.detach()[~mask]
        assert torch.equal(pruned.view(torch.int32), torch.zeros_like(pruned).view(torch.int32))
        assert bool((layer.raw_weight != before[name])[mask].any())


def test_bad_masks_change_nothing() -> None:
    layer = seeded(lambda: SparseLinear(3, 2))
    before = layer.raw_weight.detach().clone()
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\), got \(3, 2\)"):
        layer.set_mask_(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        layer.set_mask_(torch.ones(2, 3))
    assert torch.equal(layer.raw_weight, before)


def test_gated_draws_by_address_and_uses_the_mean_in_evaluation() -> None:
    layer = seeded(lambda: SparseLinear(16, 8))
    layer.pattern = Gated(torch.Size((8, 16)), HardConcrete(), density=0.5, seed=3)
    first = layer.weight
    assert torch.equal(first, layer.weight)  # same address, same draw
    sc.advance_(layer)
    assert not torch.equal(first, layer.weight)
    layer.eval()
    assert torch.equal(layer.weight, layer.weight) and not torch.equal(layer.weight, first)
    layer.train()
    layer(randn(2, 16)).sum().backward()
    assert layer.pattern.logits.grad is not None
    baked = layer.to_dense()
    layer.eval()
    assert torch.equal(baked.weight, layer.weight)


def test_topk_gates_train_scores_straight_through() -> None:
    layer = seeded(lambda: SparseLinear(10, 10))
    layer.pattern = Gated(torch.Size((10, 10)), TopK(0.7), density=0.3)
    with torch.no_grad():
        layer.pattern.logits.copy_(randn(10, 10))
    assert int((layer.weight != 0).sum()) == 30
    layer(randn(4, 10)).sum().backward()
    grad = layer.pattern.logits.grad
    assert grad is not None and bool((grad != 0).all())


def test_filters_by_function_type_and_glob() -> None:
    assert list(sc.sparse_layers(sc.sparsify_(mlp(), "2"))) == ["2"]
    assert list(sc.sparse_layers(sc.sparsify_(mlp(), ["0", "9*"]))) == ["0"]
    assert list(sc.sparse_layers(sc.sparsify_(mlp(), nn.Linear))) == ["0", "2"]
    assert list(sc.sparse_layers(sc.sparsify_(mlp(), lambda n, m: n == "0"))) == ["0"]
    with pytest.raises(ValueError, match="no layer matches 'conv"):
        sc.sparsify_(mlp(), "conv*")
    assert isinstance(sc.sparsify_(seeded(lambda: nn.Linear(2, 2))), SparseLinear)


def test_sparsify_twice_is_once_and_keeps_the_optimiser() -> None:
    model = mlp()
    parameters = list(model.parameters())
    sc.sparsify_(sc.sparsify_(model))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_compiles_without_graph_breaks() -> None:
    model = sc.sparsify_(mlp())
    sc.sparse_layers(model)["0"].set_mask_(rand(24, 12) > 0.5)
    x = randn(5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = sc.sparsify_(mlp())
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight.shape) > 0.5)
    x = randn(5, 12)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)


def test_activation_checkpointing_redraws_the_same_gates() -> None:
    from torch.utils.checkpoint import checkpoint

    model = sc.sparsify_(mlp())
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.pattern = Gated(layer.raw_weight.shape, Concrete(), density=0.5, layer=i)
    logits = [m.pattern.logits for m in sc.sparse_layers(model).values()]
    x = randn(5, 12)
    plain = torch.autograd.grad(model(x).square().sum(), logits)
    again = torch.autograd.grad(
        checkpoint(model, x, use_reentrant=False, preserve_rng_state=False).square().sum(), logits
    )
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_batch_statistics_leaves_running_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    x = 5 + randn(16, 3)
    with batch_statistics(model):
        y = model(x)
        assert not model[1].training
        torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model[1].training


def _torchvision(name: str, **options: object) -> nn.Module:
    import torchvision

    return seeded(lambda: torchvision.models.get_model(name, weights=None, **options))


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 64, {"num_classes": 10}),
        ("vit_b_16", 32, {"num_classes": 10, "image_size": 32}),
        ("swin_t", 64, {"num_classes": 10}),
    ],
)
def test_unmodified_torchvision_models(name: str, size: int, options: dict) -> None:
    model = _torchvision(name, **options).eval()
    x = randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        keys = list(model.state_dict())
        sc.sparsify_(model)
        torch.testing.assert_close(model(x), expected)
    layers = sc.sparse_layers(model)
    assert layers and all(isinstance(m, SparseLayer) for m in layers.values())
    for i, layer in enumerate(layers.values()):
        layer.set_mask_(rand(*layer.weight.shape, seed=i) > 0.5)
    model.train()
    with torch.random.fork_rng(devices=[]):  # Swin's stochastic depth
        model(x.expand(2, -1, -1, -1)).square().sum().backward()
    used = 0
    for layer in layers.values():
        grad = layer.raw_weight.grad
        if grad is not None:
            used += 1
            assert bool((grad[~layer.pattern.mask] == 0).all())
    assert used == len(layers)  # Swin reads the weight out of the layer: masked too
    assert list(sc.densify_(model).state_dict()) == keys
