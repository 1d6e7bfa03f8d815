"""Which dead units go, which stay and why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import assert_close, assert_exact
from helpers import randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.compaction import Compacted, compact


def reports(compacted: Compacted) -> str:
    return "\n".join(f"{w} {s}" for x in compacted.layers.values() for _, s, w in x.stays)


def silence_(layer: Any, bias: float) -> None:
    """Masks the first two outputs."""
    mask = torch.ones_like(layer.raw_weight, dtype=torch.bool)
    mask[:2] = False
    layer.set_mask_(mask)
    if layer.bias is not None:
        layer.bias.data[:2] = bias


def both_silent(m: Any) -> nn.Module:
    silence_(m.b, -1)
    return m


def chain(*layers: nn.Module, dead: tuple[int, ...] = (0,), bias: float = 0.0) -> nn.Module:
    """A sequence in which the first two outputs of the given layers are masked, with this bias."""
    model: Any = sc.sparsify_(nn.Sequential(*layers).double())
    for i in dead:
        silence_(model[i], bias)
    return model


def conv(a: int, b: int, **options: Any) -> nn.Module:
    return nn.Conv2d(a, b, 3, padding=1, **options)


class Wired(nn.Module):
    """Three linear layers of six units, wired as a test says."""

    def __init__(self, forward: Callable[["Wired", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.wiring = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def wired(forward: Callable[[Any, Tensor], Tensor], bias: float = 0.0) -> nn.Module:
    """`Wired` with the first two outputs of layer a masked."""
    model: Any = sc.sparsify_(Wired(forward).double())
    silence_(model.a, bias)
    return model


def overwriting(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(torch.relu_(y)) + m.c(y)


def twice_read(m: Any, y: Tensor) -> Tensor:
    return m.b(y.relu()) + m.c(y)


def sliced(m: Any, y: Tensor) -> Tensor:
    return m.b(torch.cat([y[:, 3:], y[:, :3]], 1))


def by_width(m: Any, y: Tensor) -> Tensor:
    return m.b(y) / y.shape[1]


def sharing(m: Any) -> nn.Module:
    m.b.bias = m.a.bias
    return m


def shifted(norm: Any) -> nn.Module:
    norm.running_mean.fill_(0.1)
    return norm


def with_attribute(m: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(m, name, value)
    return m


def with_hook(m: Any) -> nn.Module:
    m.a.register_forward_hook(lambda module, args, output: None)
    return m


IMAGE, POINT = (3, 4, 4), (6,)


REASONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, str]] = {
    "positive": (
        lambda: chain(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), bias=0.5),
        *(POINT, True, "the bias of a dead unit is positive and trains outputs"),
    ),
    "gelu": (
        lambda: chain(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3), bias=-1),
        *(POINT, True, "the bias of a dead unit trains: GELU 1 passes its gradient on outputs"),
    ),
    "beta": (
        lambda: chain(conv(3, 5, bias=False), nn.BatchNorm2d(5), nn.SiLU(), conv(5, 3)),
        *(IMAGE, True, "the bias of a dead unit trains: SiLU 2 passes its gradient on outputs"),
    ),
    "statistics": (
        lambda: chain(conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 3), bias=-1),
        *(IMAGE, True, "BatchNorm2d 1's statistics differ between training and evaluation outputs"),
    ),
    "running mean": (
        lambda: chain(conv(3, 5, bias=False), shifted(nn.BatchNorm2d(5)), nn.ReLU(), conv(5, 3)),
        *(IMAGE, True, "BatchNorm2d 1's statistics differ between training and evaluation outputs"),
    ),
    "batch statistics": (
        lambda: chain(
            conv(3, 5), nn.BatchNorm2d(5, track_running_stats=False), nn.ReLU(), conv(5, 3), bias=1
        ),
        *(IMAGE, True, "BatchNorm2d 1's statistics differ between training and evaluation outputs"),
    ),
    "sum of biases": (
        lambda: both_silent(wired(lambda m, x: m.c(torch.relu(m.a(x) + m.b(x))), bias=0.5)),
        *(POINT, True, "the bias of a dead unit is positive and trains outputs"),
    ),
    "sigmoid": (
        lambda: chain(nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 3)),
        *(POINT, True, "Sigmoid 1 makes something else of 0 outputs"),
    ),
    "scalar": (
        lambda: wired(lambda m, x: m.b(torch.relu(m.a(x)) + 1)),
        *(POINT, True, "add makes something else of 0 outputs"),
    ),
    "moving scalar": (  # the bias decays: relu(bias + 1) is 0 only at first
        lambda: wired(lambda m, x: m.b(torch.relu(m.a(x) + 1)), bias=-1),
        *(POINT, True, "add makes something else of 0 outputs"),
    ),
    "residual": (
        lambda: wired(lambda m, x: m.c(torch.relu(m.a(x)) + m.b(x))),
        *(POINT, True, "a residual sum adds something alive to it outputs"),
    ),
    "second reader": (
        lambda: wired(lambda m, x: twice_read(m, m.a(x)), bias=-1),
        *(
            POINT,
            True,
            "the bias of a dead unit trains: SparseLinear c passes its gradient on outputs",
        ),
    ),
    "in place": (
        lambda: wired(overwriting, bias=-1),
        *(POINT, False, "an operation in place overwrites it under its other readers outputs"),
    ),
    "padding": (
        lambda: chain(conv(3, 5), nn.ReLU(), conv(5, 3), bias=0.5),
        *(IMAGE, False, "a convolution's zero padding does not continue its constant outputs"),
    ),
    "average": (
        lambda: chain(conv(3, 5), nn.AvgPool2d(2), nn.Conv2d(5, 3, 1), bias=0.5),
        *(IMAGE, False, "AvgPool2d 1 may pad with 0 outputs"),
    ),
    "surrounded": (
        lambda: wired(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 1, 1)))[:, 0], bias=1),
        *((2, 6), False, "pad surrounds it with another number outputs"),
    ),
    "padded channels": (
        lambda: wired(lambda m, x: m.b(F.pad(m.a(x), (1, -1)))),
        *(POINT, True, "pad needs every unit outputs"),
    ),
    "input and output": (
        lambda: wired(lambda m, x: m.a(x)),
        *(POINT, True, "the model's output keeps its size outputs"),
    ),
    "layer norm": (
        lambda: chain(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        *(POINT, True, "LayerNorm 1 needs every unit outputs"),
    ),
    "parameter": (
        lambda: with_attribute(
            wired(lambda m, x: m.b(m.a(x) * m.scale)), "scale", nn.Parameter(torch.ones(6).double())
        ),
        *(POINT, True, "mul needs every unit outputs"),
    ),
    "reshape": (
        lambda: wired(lambda m, x: m.b(m.a(x).reshape(-1, 2, 3).reshape(-1, 6))),
        *(POINT, True, "reshape needs every unit outputs"),
    ),
    "indexing": (
        lambda: wired(lambda m, x: m.b(m.a(x)[:, [5, 4, 3, 2, 1, 0]])),
        *(POINT, True, "getitem needs every unit outputs"),
    ),
    "slice": (
        lambda: wired(lambda m, x: sliced(m, m.a(x))),
        *(POINT, True, "getitem needs every unit outputs"),
    ),
    "mean of channels": (
        lambda: wired(lambda m, x: m.b(x * m.a(x).mean(1, keepdim=True))),
        *(POINT, True, "mean needs every unit outputs"),
    ),
    "view of tokens": (
        lambda: wired(lambda m, x: m.b(m.a(x).reshape(x.size(0), -1)[:, :6])),
        *((2, 6), True, "reshape needs every unit outputs"),
    ),
    "channel pooling": (
        lambda: wired(lambda m, x: m.b(F.max_pool1d(m.a(x), 3, 1, 1))),
        *((2, 6), True, "max_pool1d needs every unit outputs"),
    ),
    "number of channels": (
        lambda: wired(lambda m, x: by_width(m, m.a(x))),
        *(POINT, True, "getattr tells the number of channels outputs"),
    ),
    "grouped": (
        lambda: chain(conv(3, 6), nn.ReLU(), conv(6, 6, groups=2), nn.Flatten(), nn.Linear(96, 2)),
        *(IMAGE, True, "SparseConv2d 2 is grouped, and its groups stay whole outputs"),
    ),
    "depthwise": (
        lambda: chain(conv(3, 6), nn.ReLU(), conv(6, 6, groups=6), conv(6, 2), dead=(2,)),
        *(
            IMAGE,
            True,
            "the bias of a dead unit trains: SparseConv2d 3 passes its gradient on outputs",
        ),
    ),
    "twice": (
        lambda: wired(lambda m, x: m.b(m.a(m.a(x)))),
        *(POINT, True, "it is called more than once outputs"),
    ),
    "read": (
        lambda: wired(lambda m, x: m.b(m.a(x) + m.a.bias)),
        *(POINT, True, "its parameters are used outside of it or reparametrised outputs"),
    ),
    "shared": (
        lambda: sharing(wired(lambda m, x: m.c(m.b(m.a(x))))),
        *(POINT, True, "it shares a parameter with another module outputs"),
    ),
    "hook": (
        lambda: with_hook(wired(lambda m, x: m.b(m.a(x)))),
        *(POINT, True, "it has hooks, which may do anything outputs"),
    ),
    "uncalled": (
        lambda: wired(lambda m, x: m.b(F.linear(x, m.a.weight))),
        *(POINT, True, "it is not called as a module of its own outputs"),
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons_to_keep_a_dead_unit(case: str) -> None:
    make, shape, training, reason = REASONS[case]
    model = seeded(make)
    if training:
        compacted = assert_exact(model, shape)
    else:
        x = randn(4, *shape, dtype=torch.float64)
        compacted = compact(model, x[:1], training=False)
        assert_close(compacted.model.eval()(x), model.eval()(x), "evaluation")
    assert reason in reports(compacted)
    assert reason.removesuffix(" outputs") in str(compacted)


def pooled(m: Any, x: Tensor) -> Tensor:
    y = torch.relu(m.a(x)).unsqueeze(0)[0]  # unknown operations keep units, those after them do not
    return m.c(torch.relu(m.b(y)).mean(1))


REMOVED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "gate": (lambda: wired(lambda m, x: m.c(torch.relu(m.a(x)) * m.b(x)), bias=-1), POINT, "a b"),
    "sum": (
        lambda: both_silent(wired(lambda m, x: m.c(torch.relu(m.a(x) + m.b(x))), bias=-1)),
        *(POINT, "a b"),
    ),
    "tokens": (lambda: both_silent(wired(pooled, bias=-1)), (2, 6), "b"),
    "depthwise": (
        lambda: chain(
            *(conv(3, 6), nn.ReLU(), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.ReLU6()),
            *(nn.MaxPool2d(2), conv(6, 2)),
        ),
        *(IMAGE, "0 2"),
    ),
    "dropout": (lambda: chain(conv(3, 6), nn.Dropout(0.0), nn.ReLU(), conv(6, 2)), IMAGE, "0"),
}


@pytest.mark.parametrize("case", REMOVED)
def test_dead_units_go_with_all_they_are_tied_to(case: str) -> None:
    make, shape, names = REMOVED[case]
    model = seeded(make)
    if case == "depthwise":
        model[2].bias.data[:2] = 0  # pyright: ignore
    layers = assert_exact(model, shape).layers
    assert {n for n, layer in layers.items() if layer.outputs == (4, 6)} == set(names.split())
