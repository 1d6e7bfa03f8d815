"""Models: shapes, published parameter counts, and a gradient to every parameter."""

import pytest
import torch
from helpers import randn, seeded
from torch import nn

import sparsecore as sc
from sparsecore.models import BUILDERS
from sparsecore.recipes import build, model_names, recipe_for


def prunable(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in sc.sparse_layers(sc.sparsify_(model)).values())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)], ids=str)
def test_every_model_trains_on_every_shape(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, 7)
    scores = model(randn(2, *shape))
    assert scores.shape == (2, 7)
    scores.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(isinstance(m, (nn.ReLU, nn.GELU)) for m in model.modules())
    assert recipe_for(name).epochs > 0


def test_counts_against_the_papers() -> None:
    cifar = (3, 32, 32)
    assert prunable(build("lenet-300-100", (1, 28, 28), 10)) == 266_200
    assert parameters(build("lenet-300-100", (1, 28, 28), 10)) == 266_610
    assert prunable(build("resnet-20", cifar, 10, shortcut="3x3")) == 291_376
    assert parameters(build("resnet-20", cifar, 10)) == 269_722
    assert parameters(build("resnet-56", cifar, 10)) == 853_018
    assert parameters(build("conv-4", cifar, 10)) == 2_425_930
    assert 14.7e6 < parameters(build("vgg-16-bn", cifar, 10)) < 14.8e6
    small = build("vgg-16-bn", cifar, 10, width=0.125)
    assert [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)] == (
        [8] * 2 + [16] * 2 + [32] * 3 + [64] * 6
    )
    assert small(randn(2, *cifar)).shape == (2, 10)


def test_building_is_seeded_and_leaves_the_global_generator_alone() -> None:
    first, second = (build("lenet-300-100", (1, 8, 8), 10, seed=s) for s in (1, 1))
    other = build("lenet-300-100", (1, 8, 8), 10, seed=2)
    assert torch.equal(first[1].weight, second[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_resnet_variants() -> None:
    shape = (3, 32, 32)
    uniform = build("resnet-20", shape, 10, bn_init="uniform")
    scales = torch.cat([m.weight for m in uniform.modules() if isinstance(m, nn.BatchNorm2d)])
    assert 0.4 < scales.mean().item() < 0.6 and scales.min() >= 0 and scales.max() <= 1
    plain = build("resnet-20", shape, 10, affine=False)
    assert not any(m.affine for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    assert build("resnet-20", shape, 10, shortcut="B")(randn(2, *shape)).shape == (2, 10)
    model = build("resnet-20", shape, 10).eval()
    x = randn(2, *shape)
    torch.testing.assert_close(
        model(x.contiguous(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet-20", (3, 32, 32), {"shortcut": "C"}, "one of A, B, 3x3"),
        ("resnet-20", (3, 32, 32), {"bn_init": "normal"}, "one of ones, uniform"),
        ("conv-4", (1, 30, 30), {}, "divisible by 4"),
        ("vgg-16-bn", (1, 8, 8), {}, "at least 16"),
        ("vgg-16-bn", (3, 32, 32), {"width": 0}, "a positive factor"),
        ("vit-small", (3, 30, 30), {}, "divisible by 4"),
        ("vit-small", (3, 32, 32), {"heads": 5}, "divisible by 5"),
        ("lenet", (1, 8, 8), {}, "expected one of lenet-300-100"),
        (
            "lenet-300-100",
            (1, 8, 8),
            {"classes": 3},
            "model option: .* it takes, width, activation",
        ),
        ("lenet-300-100", (1, 8, 8), {"name": "x"}, "model option: .* it takes, width, activation"),
        ("resnet-20", (3, 32, 32), {"affine": 1}, "expected true or false"),
        ("torchvision:resnet18", (3, 32, 32), {"num_classes": 3}, "which the data gives"),
        ("torchvision:googlenet", (3, 64, 64), {"aux_logits": True}, "expected one head"),
        ("torchvision:resnet0", (3, 32, 32), {}, "it has alexnet"),
        ("torchvision:resnet18", (1, 32, 32), {}, "3 channels"),
    ],
)
def test_bad_requests_list_what_is_valid(name: str, shape, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, 10, **options)


def test_torchvision_models_by_name() -> None:
    model = build("torchvision:mobilenet_v3_small", (3, 32, 32), 5)
    assert model.eval()(randn(1, 3, 32, 32)).shape == (1, 5)
    assert recipe_for("torchvision:resnet18").epochs == 90 and "torchvision:NAME" in model_names()
    assert seeded(lambda: build("lenet-300-100", (1, 4, 4), 2)) is not None


def test_lenet_variants() -> None:
    shape = (1, 28, 28)
    small = build("lenet-300-100", shape, 10, width=0.2, activation="prelu", init="uniform")
    assert [m.out_features for m in small if isinstance(m, nn.Linear)] == [60, 20, 10]
    assert sum(isinstance(m, nn.PReLU) for m in small) == 2
    assert small[1].weight.abs().max().item() == pytest.approx((6 / 784) ** 0.5, rel=0.01)
    plain = build("lenet-300-100", shape, 10, init="torch")
    assert (
        plain[1].weight.abs().max().item() == pytest.approx(784**-0.5, rel=0.01)
        and plain[1].bias.any()
    )
    assert prunable(build("conv-4", (3, 32, 32), 10, width=0.5)) < 700_000
    for options in ({"width": 0}, {"activation": "tanh"}, {"init": "zeros"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build("lenet-300-100", shape, 10, **options)
