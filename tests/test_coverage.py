"""What a ticket covers of a model, and groups of parameters under any plan."""

import copy

import pytest
import torch
from helpers import rand, randn, seeded
from torch import nn
from torch.nn.utils import prune

import sparsecore as sc


class Head(nn.Linear):
    def forward(self, input):
        return super().forward(input)


def net() -> nn.ModuleDict:
    return seeded(lambda: nn.ModuleDict({
        "rnn": nn.LSTM(4, 6), "conv": nn.Conv1d(3, 5, 2, bias=False), "emb": nn.Embedding(7, 3),
        "norm": nn.BatchNorm1d(5), "head": Head(6, 2), "att": nn.MultiheadAttention(4, 2), "act": nn.PReLU(),
    }))  # fmt: skip


def test_which_share_is_covered_and_why_the_rest_is_not() -> None:
    dense = net()
    model = sc.sparsify_(copy.deepcopy(dense), "!att.*")
    assert sc.coverage(dense).covered == 0
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.25)
    found = sc.coverage(model)
    assert found.parameters == sum(p.numel() for p in dense.parameters())
    assert found.covered == 24 * 4 + 24 * 6 + 30
    zeros = sum(int((la.weight == 0).sum()) for la in sc.sparse_layers(model).values())
    assert found.sparsity == zeros / found.covered
    assert found.model_sparsity == zeros / found.parameters
    assert found.dense == {
        "in biases": 48 + 2 + 12 + 4,
        "in matrices of MultiheadAttention that sparsify_ was not asked for": 48,
        "in embeddings, which sparsify_ takes when they are named": 21,
        "in NonDynamicallyQuantizableLinear layers that sparsify_ was not asked for": 16,
        "in Head, whose forward is its own; sparsify_ takes it when it is named": 12,
        "in normalisation": 10,
        "in PReLU, which has no sparse form": 1,
    }
    assert str(found).count("\n") == len(found.dense) and "of the whole model" in str(found)
    planned = sc.plan_(copy.deepcopy(model), "state")
    assert sc.coverage(planned).rows == found.rows


def test_shared_weights_count_once() -> None:
    model = seeded(lambda: nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Linear(4, 9)}))
    model["b"].weight = model["a"].weight
    found = sc.coverage(sc.sparsify_(model))
    assert (found.parameters, found.covered) == (36 + 9, 36)


@pytest.mark.parametrize("plan", ["mask", "state", "csr", "auto"])
def test_decay_is_the_same_under_every_plan(plan: str) -> None:
    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Linear(20, 16), nn.LayerNorm(16), nn.Linear(16, 5)))
    )
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.2)
    sc.plan_(model, plan)
    model[2].bias.requires_grad_(False)
    decaying, rest = sc.decay_groups(model, 0.5)
    assert decaying["weight_decay"] == 0.5 and rest["weight_decay"] == 0.0
    assert {id(p) for p in decaying["params"]} == {id(model[i].raw_weight) for i in (0, 2)}
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in (model[0].bias, *model[1].parameters())
    }
    optimizer = torch.optim.AdamW([decaying, rest], 0.1)
    x = randn(8, 20)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    norms = sum(layer.effective_weight.norm().item() for layer in sc.sparse_layers(model).values())
    expected = _NORMS.setdefault("norm", norms)
    assert abs(norms - expected) < 1e-4 * expected


_NORMS: dict[str, float] = {}


def pruned() -> nn.Sequential:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(1, 3, 2)))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.5)
    return model


def test_tickets_out_of_pruned_models_and_back() -> None:
    theirs, x = pruned(), randn(4, 1, 6)
    expected = theirs(x)
    ticket = sc.Ticket.from_prune(theirs)
    assert ticket.sparsity == 0.5 and ticket.weights["0.weight"].all()  # below the mask
    fresh = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(1, 3, 2)), 1)
    torch.testing.assert_close(ticket.apply_(sc.sparsify_(copy.deepcopy(fresh)))(x), expected)
    state = copy.deepcopy(theirs.state_dict())
    loaded = sc.sparsify_(copy.deepcopy(fresh))
    assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"
    torch.testing.assert_close(loaded(x), expected)
    assert (loaded[0].weight == 0).float().mean() == 0.5
    planned = sc.plan_(sc.sparsify_(copy.deepcopy(fresh)).requires_grad_(), "mask")
    for layer in sc.sparse_layers(planned).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.5)
    sc.plan_(planned, "state").load_state_dict(state)
    torch.testing.assert_close(planned(x), expected)
    back = ticket.prune_(copy.deepcopy(fresh))
    torch.testing.assert_close(back(x), expected)
    assert set(back.state_dict()) == set(state)
    for layer in (theirs[0], theirs[2]):
        prune.remove(layer, "weight")
    zeros = sc.Ticket.from_zeros(theirs)
    assert zeros.hash == ticket.hash and not zeros.weights["0.weight"][~zeros.masks["0"]].any()
    torch.testing.assert_close(zeros.apply_(sc.sparsify_(copy.deepcopy(fresh)))(x), expected)
    plain = sc.densify_(zeros.apply_(sc.sparsify_(copy.deepcopy(fresh)))).state_dict()
    torch.testing.assert_close(plain, dict(theirs.state_dict()))


def test_what_holds_no_masks_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3)))
    with pytest.raises(sc.TicketError, match="found no zero"):
        sc.Ticket.from_zeros(model)
    with pytest.raises(sc.TicketError, match="found none"):
        sc.Ticket.from_prune(model)
    prune.l1_unstructured(model[1], "bias", 0.5)
    with pytest.raises(sc.TicketError, match=r"got one over 1\.bias"):
        sc.Ticket.from_prune(model)
    ticket = sc.Ticket.from_prune(pruned())
    with pytest.raises(sc.TicketError, match="another model"):
        ticket.prune_(seeded(lambda: nn.Sequential(nn.Linear(6, 8))))
    with pytest.raises(sc.TicketError, match="got sparse layers"):
        ticket.prune_(sc.sparsify_(seeded(lambda: nn.Linear(6, 8))))
