"""A weight that several modules share: one mask, one score, counted once."""

import copy

import pytest
import torch
from helpers import rand, randn, seeded
from torch import nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.nn import SparseEmbedding

IDS = torch.arange(64) * 7 % 12
LABELS = torch.arange(64) % 12


class LanguageModel(nn.Module):
    """Embedding and head share a weight, before or after `sparsify_`."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.emb, self.mid = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.tie()

    def tie(self) -> None:
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.emb(ids)).relu())


class Data(list):
    def epoch(self, index: int):
        return iter(self)


DATA = Data([(IDS, LABELS)] * 3)


def model(tied: bool = True) -> LanguageModel:
    return sc.sparsify_(seeded(lambda: LanguageModel(tied)))  # pyright: ignore


def train(net: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(IDS), LABELS).backward()
        optimizer.step()


RECIPE = sc.Recipe(batch=64, epochs=2)
SEARCHES = [
    sc.OneShot(sc.scores.magnitude),
    sc.OneShot(sc.scores.snip),
    sc.Iterative(sc.scores.synflow, rounds=2),
    sc.ConcreteSearch(epochs=1),
    sc.JointSearch(epochs=1),
    sc.StrongSearch(epochs=1),
    sc.ContinuousSparsification(epochs=1),
    sc.EdgePopup(epochs=1),
    sc.Rewinding(RECIPE, epochs=1),
    sc.SET(RECIPE, 2),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
@pytest.mark.filterwarnings("ignore::sparsecore.SparsityWarning")
def test_every_search_finds_one_mask(search) -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    ticket = search(net, DATA, sparsity=0.5)
    assert list(ticket.masks) == ["emb", "mid"] and abs(ticket.sparsity - 0.5) < 0.02
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    ticket.apply_(net)
    assert isinstance(net.emb, SparseEmbedding) and net.emb.weight is net.head.weight
    train(net)
    mask = ticket.masks["emb"]
    assert not net.emb.weight[~mask].any() and net.emb.weight[mask].all()
    assert net.head.pattern is net.emb.pattern


@pytest.mark.parametrize("when", ["before", "after", "in a plan"])
def test_saved_loaded_and_densified_alike(when: str) -> None:
    def make() -> LanguageModel:
        net = model(when != "after")
        net.tie()  # an embedding that was not sparse by then sees the mask, for it sees the parameter
        return net

    net = make()
    first = "head" if when == "after" else "emb"
    ticket = sc.Ticket.from_scores(sc.scores.magnitude(net, [], 0), net, 0.5)
    ticket.apply_(net, IDS, plan="auto" if when == "in a plan" else "mask")
    assert sorted(sc.sparse_layers(net)) == sorted([first, "mid"])
    train(net)
    again = make()
    again.load_state_dict(net.state_dict())
    train(again, 1)
    train(net, 1)
    torch.testing.assert_close(again(IDS), net(IDS))
    plain = sc.densify_(copy.deepcopy(net))
    assert type(plain.emb) is nn.Embedding and plain.emb.weight is plain.head.weight
    torch.testing.assert_close(plain(IDS), net(IDS))
    dense = seeded(LanguageModel, 1).state_dict()  # loads under our mask, for both
    net.load_state_dict(dense, strict=False)
    net(IDS)
    assert not net.emb.weight[~ticket.masks[first]].any()


def test_plans_leave_it_masked_or_refuse() -> None:
    net = model()
    for layer in sc.sparse_layers(net).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.3)
    with pytest.raises(ValueError, match=r"one shared by emb\.weight, head\.weight"):
        sc.plan_(net, "state")
    rows = {row.name: row.choice for row in sc.report(sc.plan_(net, "auto", IDS))}
    assert rows["emb"].formats is None and "head.weight as well" in rows["emb"].reason


def test_two_masks_for_one_weight_are_refused_and_parted_weights_part() -> None:
    net = model(False)
    for layer in (net.emb, net.head):
        layer = sc.sparsify_(net, [nn.Embedding, nn.Linear]) and layer
    net.emb.set_mask_(rand(12, 8) < 0.5)
    net.head.set_mask_(rand(12, 8, seed=1) < 0.5)
    net.tie()
    with pytest.raises(ValueError, match="share, got different ones"):
        sc.scores.magnitude(net, [], 0)
    net = model()
    net.emb.set_mask_(rand(12, 8) < 0.5)
    net.head.weight = nn.Parameter(randn(12, 8))
    assert list(sc.scores.magnitude(net, [], 0)) == ["emb", "mid", "head"]
    assert net.head.pattern is not net.emb.pattern
    assert torch.equal(net.head.pattern.mask, net.emb.pattern.mask)


class Elsewhere(LanguageModel):
    """The embedding's weight is read by code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = self.head.weight
        del self.emb

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.table[ids]).relu())


def test_a_weight_that_is_read_elsewhere_is_masked_there_and_refuses_gates() -> None:
    net = sc.sparsify_(seeded(Elsewhere))
    with pytest.raises(ValueError, match="got it in table too"):
        sc.ConcreteSearch(epochs=1)(net, DATA, sparsity=0.5)
    ticket = sc.OneShot(sc.scores.snip)(net, DATA, sparsity=0.5)
    ticket.apply_(net)
    train(net)
    assert not net.table[~ticket.masks["head"]].any() and net.table is net.head.weight
    torch.testing.assert_close(sc.densify_(copy.deepcopy(net))(IDS), net(IDS))


def test_synflow_has_nothing_to_say_of_an_embedding_by_itself() -> None:
    net = sc.sparsify_(seeded(lambda: LanguageModel(False)), ["emb", "mid"])
    with pytest.raises(ValueError, match="got the embedding 'emb'"):
        sc.scores.synflow(net, DATA, 0)
    assert set(sc.scores.synflow(model(), DATA, 0)) == {"emb", "mid"}
