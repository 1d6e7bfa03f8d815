"""Steps whose batches the device makes: the same batches, no host sync, and on a GPU one graph a step."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE

import sparsecore as sc
from sparsecore.control import AbstractController, GradBalance, Reading, State
from sparsecore.data import Batches, Dataset
from sparsecore.engine import Engine, Resident, Way, feed_of
from sparsecore.gates import HardConcrete
from sparsecore.granularity import Block, Channel, Granularity
from sparsecore.objectives import task
from sparsecore.recipes import build
from sparsecore.search import ConcreteSearch, JointSearch, StrongSearch
from sparsecore.search.gated import AbstractGateSearch
from sparsecore.training import Recipe

gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return sc.load("digits")


def model_for(digits: Dataset, name: str) -> torch.nn.Module:
    return sc.sparsify_(build(name, digits.shape, digits.classes)).to(DEVICE)


@pytest.mark.parametrize("augment", [False, True])
def test_a_resident_epoch_is_the_epoch(digits: Dataset, augment: bool) -> None:
    batches = Batches(digits, "train", 256, seed=3, augment=augment, device=DEVICE)
    resident = Resident(batches)
    for epoch in (0, 1):
        resident.begin(epoch)
        order = batches.plan(epoch)[0].to(DEVICE)
        for i, (x, y) in enumerate(batches.epoch(epoch)):
            assert resident.move_on() == (i < resident.full) and resident.size == len(y)
            (mine, labels), rows = resident.batch()
            assert all(map(torch.equal, resident.present(), (x, y)))
            assert torch.equal(mine, x) and torch.equal(labels, y)
            assert torch.equal(rows, order[i * 256 : i * 256 + len(y)])


def test_data_that_does_not_lie_there_is_fed_as_it_comes(digits: Dataset) -> None:
    """The same ticket from `data.Batches` and from batches of an unknown kind."""
    batches = Batches(digits, "train", 256, device=DEVICE)

    class Foreign:
        def __len__(self) -> int:
            return len(batches)

        def epoch(self, index: int):
            return batches.epoch(index)

        def order(self, index: int) -> torch.Tensor | None:
            return batches.order(index)

    search = ConcreteSearch(epochs=2)
    known, foreign = (
        search(model_for(digits, "lenet-300-100"), b, sparsity=0.9) for b in (batches, Foreign())
    )
    assert known.hash == foreign.hash


class Own(AbstractController):
    """A controller without a rule, which is asked in every step."""

    def target(self, density: float) -> float:
        return GradBalance().target(density)

    def init(self, device: torch.device) -> State:
        return GradBalance().init(device)

    def update(self, state: State, reading: Reading) -> tuple[torch.Tensor, State]:
        return GradBalance().update(state, reading)


SEARCHES = {
    "cts": ConcreteSearch(),
    "own controller": ConcreteSearch(control=Own()),
    "joint": JointSearch(epochs=2, recipe=Recipe(optimizer="adam", lr=1e-3, clip_norm=1.0)),
    "joint sgd": JointSearch(epochs=2, recipe=Recipe(lr=0.01, weight_decay=1e-4)),
    "strong": StrongSearch(),
}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("search", SEARCHES.values(), ids=list(SEARCHES))
@pytest.mark.parametrize("name", ["lenet-300-100", "resnet-20"])
def test_a_step_never_waits_for_the_device(
    digits: Dataset, name: str, search: AbstractGateSearch
) -> None:
    """The driver's own word; `test_replay` lists every touch of the host without a GPU."""
    model = model_for(digits, name)
    batches = Batches(digits, "train", 64, device=DEVICE)
    with search._gated(model, sc.sparse_layers(model), 0.9) as gated:
        step = search._step(model, gated, [(0.1, 0)])
        step.schedule(2 * len(batches))
        engine = Engine(step, feed_of(batches, step.device), Way())
        engine.begin(0)
        engine()  # allocates
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["lenet-300-100", "resnet-20"])
@pytest.mark.parametrize("lower", [False, True], ids=["fp32", "bf16-channels-last"])
@pytest.mark.parametrize("kind", ["cts", "joint", "joint sgd"])
def test_replaying_a_graph_is_running_the_step(
    digits: Dataset, name: str, kind: str, lower: bool
) -> None:
    batches = Batches(digits, "train", 256, device=DEVICE)
    search = replace(SEARCHES[kind], epochs=3)
    if lower:
        search = replace(search, dtype=torch.bfloat16, channels_last=True)
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        graph, again, eager = (
            replace(search, engine=e)(model_for(digits, name), batches, sparsity=0.9)
            for e in ("graph", "graph", "eager")
        )
    finally:
        torch.backends.cudnn.deterministic = before
    assert graph.hash == again.hash  # deterministic
    losses = graph.meta["objective_by_epoch"]
    assert losses == pytest.approx(eager.meta["objective_by_epoch"], rel=1e-2 if lower else 1e-4)
    same = torch.cat([(graph.masks[n] == eager.masks[n]).flatten() for n in graph.masks])
    assert same.double().mean() > 0.99


@pytest.mark.gpu
@gpu
def test_a_graph_can_hold_a_controller_of_ones_own_and_several_searches(digits: Dataset) -> None:
    batches = Batches(digits, "train", 256, device=DEVICE)
    search = ConcreteSearch(epochs=2, control=Own(), objective=task)
    graph, eager = (
        replace(search, engine=e)(model_for(digits, "lenet-300-100"), batches, sparsity=0.9)
        for e in ("graph", "eager")
    )
    assert graph.hash == eager.hash
    many, apart = (
        ConcreteSearch(epochs=2, engine=e).many(
            model_for(digits, "lenet-300-100"), batches, sparsities=[0.5, 0.9]
        )
        for e in ("graph", "eager")
    )
    assert [t.hash for t in many] == [t.hash for t in apart]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("granularity", [Block(16, 16), Channel()], ids=str)
def test_a_structured_search_that_skips_is_the_one_that_does_not(
    digits: Dataset, granularity: Granularity
) -> None:
    batches = Batches(digits, "train", 256, device=DEVICE)
    search = ConcreteSearch(epochs=3, gate=HardConcrete(), granularity=granularity)
    losses = [
        replace(search, engine=e)(model_for(digits, "lenet-300-100"), batches, sparsity=0.7)
        for e in ("graph", "eager")
    ]
    search = replace(search, layerwise=False)
    losses.append(search(model_for(digits, "lenet-300-100"), batches, sparsity=0.7))
    first, *others = (ticket.meta["objective_by_epoch"] for ticket in losses)
    for other in others:
        assert other == pytest.approx(first, rel=2e-2)
