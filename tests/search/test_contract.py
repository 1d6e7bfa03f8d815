"""What every search owes, whatever it does: see `sparsecore.search.Search`.

Searches by rounds of training have more to keep than one checkpoint: test_rewinding and test_round_files.
"""

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, convolutional, equal, mlp, randn
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.control import FixedPenalty, Lagrangian
from sparsecore.granularity import NM, Block
from sparsecore.progress import Advance, Progress
from sparsecore.scores import random as random_score
from sparsecore.scores import snip, synflow
from sparsecore.search import Search, SearchError
from sparsecore.search.dynamic import SET, GradualMagnitude, RigL
from sparsecore.search.edge_popup import EdgePopup
from sparsecore.tickets import TicketError
from sparsecore.training import Recipe, evaluate

ADAM, SGD = Recipe(optimizer="adam", lr=1e-2), Recipe(lr=0.05, weight_decay=0.1)
SEARCHES: dict[str, Any] = {
    "joint": sc.JointSearch(epochs=4),
    "joint-sgd": sc.JointSearch(epochs=4, recipe=SGD),
    "cts": sc.ConcreteSearch(epochs=4),
    "strong": sc.StrongSearch(epochs=4),
    "continuous": sc.ContinuousSparsification(epochs=4),
    "continuous-lagrangian": sc.ContinuousSparsification(epochs=4, control=Lagrangian()),
    "continuous-fixed": sc.ContinuousSparsification(epochs=4, recipe=ADAM, control=FixedPenalty(1)),
    "edge-popup": EdgePopup(epochs=4),
    "iterative-snip": sc.Iterative(snip, rounds=4),
    "iterative-blocks": sc.Iterative(snip, rounds=4, granularity=Block(1, 2)),
    "synflow": sc.Iterative(synflow, rounds=4),
    "set": SET(ADAM, 4),
    "rigl": RigL(SGD, 4, interval=3),
    "gradual-finished": GradualMagnitude(ADAM, 4, updates=5),
    "gradual": GradualMagnitude(ADAM, 4, updates=5, rewind=True),
}
# Searches that must not take up the checkpoint of the one named.
OTHERS: dict[str, list[Search]] = {
    name: [replace(SEARCHES[name], **{field: value}) for field, value in fields.items()]
    for name, fields in {
        "joint": {"ramp": 0.5, "start_density": 0.4, "lr_drop": 0.5, "seed": 1, "recipe": SGD},
        "cts": {"lr": 0.2, "gain_lr": 0.0, "granularity": Block(2, 2), "lr_drop_at": 0.5},
        "strong": {"weights": "scaled"},
        "continuous": {"recipe": SGD, "final_temperature": 100.0},
        "edge-popup": {"weights": "scaled", "distribution": lambda shapes, p: {"1": 0.4, "5": 0.5}},
        "iterative-snip": {"rounds": 6, "granularity": Block(2, 2), "seed": 1},
        "rigl": {"drop": 0.2, "stop": 0.7, "seed": 1},
        "gradual": {"updates": 4, "rewind": False},
    }.items()
}
OTHERS["joint-sgd"] = [
    replace(SEARCHES["joint-sgd"], recipe=replace(SGD, **change))
    for change in ({"momentum": 0.5}, {"lr": 0.02}, {"weight_decay": 0.2}, {"clip_norm": 1.0})
]
OTHERS["rigl"].append(SET(SGD, 4))
TRAINED = ("set", "rigl", "gradual-finished", "gradual")
each_search = pytest.mark.parametrize("name", SEARCHES)


class Read(Blobs):
    """Data that count the batches read of them; the reader dies at one of them."""

    def __init__(self, dies_at: float = math.inf) -> None:
        super().__init__()
        self.dies_at, self.count = dies_at, 0

    def epoch(self, index: int) -> Iterator[Batch]:
        for batch in super().epoch(index):
            self.count += 1
            if self.count == self.dies_at:
                raise KeyboardInterrupt
            yield batch


class Untouched(Blobs):
    def epoch(self, index: int) -> Iterator[Batch]:
        raise AssertionError("the search has begun")


def network(seed: int = 0) -> nn.Module:
    return sc.sparsify_(convolutional(seed))


def accuracy(model: nn.Module) -> float:
    return evaluate(model, Blobs())


def facts(ticket: sc.Ticket) -> dict[str, Tensor]:
    """All that a ticket holds as tensors."""
    parts = {"mask": ticket.masks, "weight": ticket.weights, "score": ticket.scores or {}}
    return {f"{kind}/{name}": t for kind, of in parts.items() for name, t in of.items()}


@each_search
def test_it_depends_on_its_arguments_alone(name: str) -> None:
    search: Search = SEARCHES[name]
    first, second = (search(network(), Blobs(), sparsity=0.6) for _ in range(2))
    assert equal(facts(first), facts(second)) and first.meta == second.meta
    assert first.meta["sparsity"] == 0.6 and name.partition("-")[0] in first.meta["method"]


@each_search
def test_killed_at_any_batch_it_goes_on_to_the_same_ticket(name: str, tmp_path: Path) -> None:
    search, model, path = SEARCHES[name], network(), tmp_path / "search.safetensors"
    before, watched = copy.deepcopy(model.state_dict()), []

    def watch(net: nn.Module) -> float:
        watched.append(accuracy(net))
        return watched[-1]

    options, whole = {"sparsity": 0.6, "watch": watch}, Read()
    expected = search(model, whole, **options, checkpoint=path)
    expected.save(tmp_path / "ticket")
    once = watched.copy()
    for dies_at in {1, whole.count // 3, whole.count // 2, whole.count - 1, whole.count}:
        watched.clear()
        with pytest.raises(KeyboardInterrupt):
            search(model, Read(dies_at), **options, checkpoint=path)
        assert equal(before, model.state_dict())
        rest = Read()
        ticket = search(model, rest, **options, checkpoint=path)
        assert equal(facts(ticket), facts(expected)) and ticket.meta == expected.meta
        assert watched == once  # each epoch's network, and none twice
        assert dies_at < whole.count - 1 or rest.count < whole.count
        ticket.save(tmp_path / "ticket")
        assert [p.name for p in tmp_path.iterdir()] == ["ticket"]


class Counted(Progress):
    """Bars as [name, total, steps taken]."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.bars: list[list[Any]] = []

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        bar: list[Any] = [name, total, 0]
        self.bars.append(bar)

        class Counting(Advance):
            def __call__(self, steps: int = 1, **values: object) -> None:
                bar[2] += steps

        yield Counting(None, None)


@each_search
def test_progress_is_told_of_every_step_also_of_those_done_before(
    name: str, tmp_path: Path
) -> None:
    search, path = SEARCHES[name], tmp_path / "search.safetensors"
    search(network(), Blobs(), sparsity=0.6, progress=(whole := Counted()))
    steps = 4 if isinstance(search, sc.Iterative) else 4 * len(Blobs())
    assert whole.bars == [["train" if name in TRAINED else "search", steps, steps]]
    with pytest.raises(KeyboardInterrupt):
        search(
            network(), Read(dies_at=4 if name == "synflow" else 12), sparsity=0.6, checkpoint=path
        )
    assert path.exists()
    search(network(), Blobs(), sparsity=0.6, checkpoint=path, progress=(rest := Counted()))
    assert rest.bars == whole.bars


@each_search
def test_a_ticket_that_is_not_saved_is_there_again_at_once(name: str, tmp_path: Path) -> None:
    """A disk that is full in the end, or a kill there, costs no epoch: nothing is watched again."""
    search, model, watched = SEARCHES[name], network(), []
    options = {"sparsity": 0.6, "checkpoint": tmp_path / "search.safetensors"}

    def watch(net: nn.Module) -> float:
        watched.append(net)
        return 0.0

    expected = search(model, Blobs(), **options, watch=watch)
    assert watched
    with pytest.raises(TicketError, match="could not be written"):
        expected.save(tmp_path / "missing" / "ticket")
    watched.clear()
    ticket = search(model, Blobs(), **options, watch=watch)
    assert not watched
    assert equal(facts(ticket), facts(expected)) and ticket.meta == expected.meta
    ticket.shuffled(0).save(tmp_path / "control")
    replace(ticket, masks={n: ~m for n, m in ticket.masks.items()}).save(tmp_path / "control")
    assert options["checkpoint"].exists()  # of the ticket itself
    ticket.save(tmp_path / "ticket")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["control", "ticket"]
    with pytest.raises(KeyboardInterrupt):
        search(network(1), Read(dies_at=4 if name == "synflow" else 12), **options)
    left = options["checkpoint"].exists()
    ticket.save(tmp_path / "ticket")  # again: the checkpoint is another search's by now
    assert options["checkpoint"].exists() == left


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_search_is_refused(name: str, tmp_path: Path) -> None:
    search, path = SEARCHES[name], tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        search(network(), Read(dies_at=12), sparsity=0.6, checkpoint=path)
    kept = path.read_bytes()
    others = [(other, 0, Blobs(), 0.6) for other in OTHERS[name]]
    others += [(search, 1, Blobs(), 0.6), (search, 0, Blobs(batch=32), 0.6)]
    others += [(search, 0, Blobs(), 0.5)]
    for other, seed, data, sparsity in others:
        with pytest.raises(SearchError, match="belongs to another"):
            other(network(seed), data, sparsity=sparsity, checkpoint=path)
        assert path.read_bytes() == kept
    search(network(), Blobs(), sparsity=0.6, checkpoint=path)


@pytest.mark.parametrize("poisoned", [False, True])
@each_search
def test_the_model_stays_as_it_was(name: str, poisoned: bool) -> None:
    search, model = SEARCHES[name], network()
    model.get_submodule("2").eval()
    sc.sparse_layers(model)["5"].set_mask_(randn(4, 16) > 0)
    if name not in TRAINED:  # which refuse frozen weights
        model.requires_grad_(poisoned)
        model.get_parameter("5.bias").requires_grad_(not poisoned)
    grads = {p: torch.ones_like(p) for p in model.parameters()}
    for p, grad in grads.items():
        p.grad = grad
    before = copy.deepcopy(model.state_dict())
    memory = [(p, p.data_ptr(), p.requires_grad) for p in model.parameters()]
    kinds = [(type(m), m.training, getattr(m, "pattern", None)) for m in model.modules()]
    data = Blobs()
    if poisoned and name != "synflow":  # which looks at no data
        data.x[3] = float("nan")
        told = "epoch 1: the objective .* is not finite"
        if isinstance(search, sc.Iterative):
            told = "the loss is nan"
        elif name in TRAINED:
            told = "check the data"
        with pytest.raises(ValueError, match=told):
            search(model, data, sparsity=0.5)
    else:
        search(model, data, sparsity=0.5, watch=accuracy)
    assert [(type(m), m.training, getattr(m, "pattern", None)) for m in model.modules()] == kinds
    after = [(p, p.data_ptr(), p.requires_grad) for p in model.parameters()]
    assert all(
        a is b and rest == others for (a, *rest), (b, *others) in zip(memory, after, strict=True)
    )
    assert equal(before, model.state_dict())
    assert all(p.grad is grad and bool((grad == 1).all()) for p, grad in grads.items())


@pytest.mark.parametrize(
    "search", [*SEARCHES.values(), sc.OneShot(random_score)], ids=[*SEARCHES, "one-shot"]
)
def test_what_no_ticket_can_be_is_told_before_the_search(search: Any) -> None:
    for sparsity in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected 0 <= sparsity < 1"):
            search(network(), Untouched(), sparsity=sparsity)
    if not isinstance(search, sc.Iterative | sc.OneShot):  # which may keep all
        with pytest.raises(ValueError, match="expected 0 < sparsity < 1 for a search, got 0"):
            search(network(), Untouched(), sparsity=0)
    with pytest.raises(ValueError, match=r"1:4 allows at most"):
        replace(search, granularity=NM(1, 4))(network(), Untouched(), sparsity=0.5)
    with pytest.raises(ValueError, match="sparsify_"):
        search(mlp(), Untouched(), sparsity=0.5)


class Noisy(nn.Module):
    """A loss that draws from the process's generators, as mixing and noise in losses do."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        noise = torch.randn_like(output) * (random.random() + float(np.random.rand()))
        return F.cross_entropy(output + noise, target)


def generators() -> list:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        list(np.random.get_state()[1]),
        np.random.get_state()[2],
    ]


OF_THE_LOSS = [  # teachers' objectives have no use for it
    name for name, search in SEARCHES.items() if not getattr(getattr(search, "objective", None), "classes", False)
]  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_LOSS)
def test_a_loss_that_draws_leaves_generators_alone_and_resumes_exactly(
    name: str, tmp_path: Path
) -> None:
    search, state = SEARCHES[name], generators()
    options = {"sparsity": 0.6, "loss": sc.Loss(Noisy(), class_axis=1)}
    expected = search(network(), Blobs(), **options)
    assert generators() == state
    with pytest.raises(KeyboardInterrupt):
        dies_at = 4 if name == "synflow" else 12
        search(network(), Read(dies_at), **options, checkpoint=tmp_path / "c")
    assert generators() == state
    with seeded_elsewhere():
        found = search(network(), Blobs(), **options, checkpoint=tmp_path / "c")
    assert equal(facts(found), facts(expected))
    one_shot = sc.OneShot(snip)
    first = one_shot(network(), Blobs(), **options)
    with seeded_elsewhere():
        assert one_shot(network(), Blobs(), **options).hash == first.hash
    assert generators() == state


@contextmanager
def seeded_elsewhere() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
