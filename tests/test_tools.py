"""Masks and matrices of other tools (`torch.nn.utils.prune`, weight_norm, weight drop): into tickets or refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import rand, randn, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sparsecore as sc

IDS = torch.arange(10)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc(self.emb(ids)))


def test_shared_weights_go_to_prune_and_zeros_and_back() -> None:
    model = sc.sparsify_(seeded(Tied))
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.5)
    masks = {n: la.pattern.mask for n, la in sc.sparse_layers(model).items()}
    ticket = sc.Ticket(masks, dict(seeded(Tied).state_dict()))
    ticket.apply_(model)
    theirs = seeded(Tied, 1)
    ticket.prune_(theirs)
    torch.testing.assert_close(theirs(IDS), model(IDS))
    for found in (
        sc.Ticket.from_prune(theirs),
        sc.Ticket.from_zeros(sc.densify_(copy.deepcopy(model))),
    ):
        assert list(found.masks) == ["emb", "fc"] and found.hash == ticket.hash
        torch.testing.assert_close(found.apply_(sc.sparsify_(seeded(Tied, 2)))(IDS), model(IDS))
    alone = seeded(Tied)
    prune.l1_unstructured(alone.head, "weight", 0.5)
    with pytest.raises(ValueError, match="one mask for the weight that emb, head share"):
        sc.Ticket.from_prune(alone)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.Sequential(nn.LSTM(8, 6)),
    ],
)
def test_matrices_of_wholes_go_to_prune_and_back(build: Callable) -> None:
    model = sc.sparsify_(seeded(build))
    masks = {n: rand(*la.weight_shape) < 0.5 for n, la in sc.sparse_layers(model).items()}
    ticket = sc.Ticket(masks, seeded(build).state_dict())
    theirs = seeded(build, 1)
    ticket.prune_(theirs)
    back = sc.Ticket.from_prune(theirs)
    assert back.hash == ticket.hash
    back.apply_(sc.sparsify_(seeded(build, 2)))


def dropped(lstm: nn.LSTM) -> nn.LSTM:
    """What weight drop does to an LSTM."""
    raw = lstm.weight_hh_l0
    del lstm._parameters["weight_hh_l0"]
    lstm.raw = raw
    lstm.weight_hh_l0 = raw * 1  # pyright: ignore
    return lstm


TOOLS: dict[str, Callable[[], nn.Module]] = {
    "prune": lambda: prune.l1_unstructured(nn.LSTM(8, 6), "weight_hh_l0", 0.5),
    "weight_norm": lambda: parametrizations.weight_norm(nn.LSTM(8, 6), "weight_hh_l0"),
    "drop": lambda: dropped(nn.LSTM(8, 6)),
    "attention": lambda: prune.l1_unstructured(nn.MultiheadAttention(8, 2), "in_proj_weight", 0.5),
    "cell": lambda: prune.l1_unstructured(nn.GRUCell(8, 6), "weight_hh", 0.5),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_matrices_that_another_tool_computes_are_refused(tool: str) -> None:
    model = nn.Sequential(seeded(TOOLS[tool]))
    kind = type(model[0])
    with pytest.raises(ValueError, match=r"sparsify_: (expected the matrices|no layer)"):
        sc.sparsify_(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize("tool", ["prune", "weight_norm"])
def test_tools_on_top_of_masked_matrices(tool: str) -> None:
    model = sc.sparsify_(seeded(lambda: nn.Sequential(nn.LSTM(8, 6))))
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.5)
    x = randn(3, 2, 8)
    expected = model(x)[0]
    if tool == "prune":
        prune.identity(model[0], "weight_hh_l0")
    else:
        parametrizations.weight_norm(model[0], "weight_hh_l0")
    torch.testing.assert_close(model(x)[0], expected)
    with pytest.raises(ValueError, match=r"another tool computes|to be a parameter"):
        sc.OneShot(sc.scores.magnitude)(model, [(x, torch.zeros(2).long())], sparsity=0.5)


@pytest.mark.parametrize("build", [lambda: nn.LSTM(8, 6), lambda: nn.MultiheadAttention(8, 2)])
def test_wholes_compile_and_refuse_symbols(build: Callable) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = build()

        def forward(self, x: Tensor) -> Tensor:
            return self.whole(*[x] * (3 if isinstance(self.whole, nn.MultiheadAttention) else 1))[0]

    model = sc.sparsify_(seeded(Net))
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.5)
    x = randn(3, 2, 8)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    with pytest.raises(TypeError, match=r"densify_\(copy.deepcopy\(model\)\)"):
        torch.fx.symbolic_trace(model)


def test_zeros_below_a_tools_mask_are_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"take Ticket\.from_prune"):
        sc.Ticket.from_zeros(model)
