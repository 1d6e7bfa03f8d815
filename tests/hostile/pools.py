"""What arguments of the Python API may be instead of what they should be."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsecore as sc
from sparsecore import granularity
from sparsecore.scores import magnitude
from sparsecore.tickets import dense_state

from .mutations import NUMBERS, TEXTS
from .task import Points, drawn, network

X, Y = Points().x[:16], Points().y[:16]
NAN = X.clone().fill_(math.nan)


class Raw:
    """An object of nobody's."""

    def __repr__(self) -> str:
        return "Raw()"


OTHER = [
    None,
    True,
    "",
    "x",
    b"x",
    [],
    {},
    (),
    Raw(),
    3,
    0.5,
    print,
    torch.zeros(0),
    torch.zeros(3),
    Raw,
]
NUMBER = [n for n in NUMBERS if not isinstance(n, int) or abs(n) not in (2**31, 7, 255)]
NUMBER = [*NUMBER, math.nan, math.inf, -math.inf, torch.tensor(0.5), np.float32(0.5), np.int64(3)]


def planned() -> nn.Module:
    model = sc.OneShot(magnitude)(network(), Points(), sparsity=0.5).apply_(network())
    return sc.plan_(model, "state")


def with_values(value: float) -> nn.Module:
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(value)
    return model


def frozen_layer() -> nn.Module:
    model = network()
    next(model.parameters()).requires_grad_(False)
    return model


# Each is called for a new value: what a call does to one must not reach the next.
MODELS: list[Callable[[], Any]] = [
    lambda: nn.Linear(6, 4), nn.Sequential, lambda: nn.ReLU(), lambda: network().requires_grad_(False), frozen_layer,
    lambda: network().double(), lambda: network().half(), lambda: network().to("meta"), lambda: with_values(math.nan),
    lambda: with_values(math.inf), lambda: with_values(0.0), lambda: with_values(1e38), planned,
    lambda: network(True),
    lambda: sc.sparsify_(nn.Linear(5, 4)), lambda: sc.sparsify_(nn.Linear(6, 1)), lambda: sc.sparsify_(nn.Conv2d(3,
    4, 3)),
    lambda: sc.sparsify_(nn.Linear(6, 4, bias=False)), lambda: nn.ModuleList([network()]), lambda: network().eval(),
    lambda: sc.sparsify_(nn.Sequential(nn.Linear(6, 4), nn.Softmax(1))), lambda: network().state_dict(),
    lambda: network,
]  # fmt: skip


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield X, Y


BATCHES: list[Callable[[], Any]] = [
    list, lambda: [()], lambda: [(X,)], lambda: [X], lambda: [(X, Y)], lambda: [(X[:1], Y[:1])], lambda: [(X[:0],
    Y[:0])],
    lambda: [(NAN, Y)], lambda: [(X * math.inf, Y)], lambda: [(X, Y + 100)], lambda: [(X, Y - 1)], lambda: [(X,
    Y.float())],
    lambda: [(X, Y.bool())], lambda: [(X.long(), Y)], lambda: [(X.double(), Y)], lambda: [(X[:, :3], Y)],
    lambda: [(X, Y[:3])],
    lambda: [(X, Y[:, None])], lambda: [(X.numpy(), Y.numpy())], lambda: [(X, None)], lambda: [(None, Y)],
    lambda: [{"x": X}],
    lambda: [(X, Y), (X[:, :2], Y)], lambda: [(X, Y), None], lambda: [(X, Y), (NAN, Y)], lambda: iter([(X, Y)]),
    lambda: iter([]),
    endless, lambda: DataLoader(TensorDataset(X, Y), 4), lambda: DataLoader(TensorDataset(X[:1], Y[:1]), 4),
    lambda: DataLoader(TensorDataset(X[:0], Y[:0]), 4), lambda: DataLoader(list[Any](), 4)  # pyright: ignore
   , lambda: TensorDataset(X, Y),
    lambda: (X, Y),
    lambda: X, lambda: [("ab", "cd")], lambda: [(X.to("meta"), Y)], lambda: [(X.to_sparse(), Y)], lambda: [(X * 1e38,
    Y)],
    lambda: [(X[..., None], Y)], lambda: [(X + 1j, Y)], lambda: lambda: iter([(X, Y)]), lambda: lambda: None,
    lambda: list,
    lambda: [(X.clone().requires_grad_(), Y)], lambda: [(X, F_ONE_HOT)], lambda: [(X, Y.to(torch.uint8))],
]  # fmt: skip
F_ONE_HOT = nn.functional.one_hot(Y, 4)

LOSSES = [
    "mse", "bce", "lm", "cross-entropy", "none", "", nn.CrossEntropyLoss, nn.CrossEntropyLoss(reduction="none"),
    nn.MSELoss(),
    lambda output, target: output.sum() * math.nan, lambda output, target: 3.0, lambda output, target: None,
    lambda output: output.sum(), lambda output, target: output, lambda output, target: output.detach().sum(),
    lambda model, batch: model(batch[0]).sum(), lambda model, batch: batch, *OTHER,
]  # fmt: skip
PATHS = [
    "c",
    Path("c"),
    Path("missing/c"),
    Path(),
    Path("folder"),
    "/dev/null",
    "a\x00b",
    "x" * 300,
    *OTHER,
]
PLANS = [
    "mask",
    "auto",
    "csr",
    "state",
    "compact",
    "block",
    "block:16x16",
    "block:0x0",
    "block:3x3",
    *TEXTS[-12:],
    *OTHER,
]
FILTERS = [
    "0",
    "!0",
    "*",
    "nothing",
    "[",
    ["0", "!2"],
    nn.Linear,
    int,
    lambda n, m: True,
    lambda n, m: None,
    lambda: 3,
    *OTHER,
]
GRANULARITIES = [
    granularity.Block(2, 2), granularity.Block(3, 5), granularity.Block(100, 100), granularity.NM(2, 4),
    granularity.NM(1, 3),
    granularity.Channel(), granularity.Weight(), "block:2x2", "2:4", *OTHER,
]  # fmt: skip
INPUTS = [X, X[:1], X[:0], NAN, X.double(), X[:, :3], X.long(), X.numpy(), X.to("meta"), *OTHER]


def states() -> list[Any]:
    own = dense_state(network())
    key = next(iter(own))
    odd: list[Any] = [v.clone() for v in (X, NAN)] + [
        None,
        own[key].T,
        own[key][:0],
        own[key] + 1j,
        own[key].bool(),
        "x",
    ]
    return [
        own, {}, dict(list(own.items())[:-1]), own | {"more": X}, {k.upper(): v for k, v in own.items()},
        *({**own, key: value} for value in odd), own | {key: own[key] * math.nan}, network(), *OTHER,
    ]  # fmt: skip


def masks() -> list[Any]:
    own = {n: drawn(*m.weight_shape, seed=1) > 0 for n, m in sc.sparse_layers(network()).items()}
    key = next(iter(own))
    odd = [
        own[key].float(),
        own[key].T,
        own[key][:0],
        own[key].long(),
        None,
        own[key].tolist(),
        own[key].to("meta"),
    ]
    odd += [
        torch.ones(()).bool(),
        own[key].numpy(),
        own[key] & False,
        own[key] | True,
        own[key].to_sparse(),
    ]
    return [
        own, {}, {key: own[key]}, own | {"more": own[key]}, *({**own, key: value} for value in odd),
        list(own.values()),
        {3: own[key]}, *OTHER,
    ]  # fmt: skip
