"""What a step must be to become a CUDA graph: the replay law on right and wrong ones, plans and gated blocks."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import DEVICE, randn, seeded
from replay import Recording
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.capture import Captured
from sparsecore.kernels import HARD_CONCRETE, GateSpec, Unit
from sparsecore.kernels.gated import blocks as gated_blocks
from sparsecore.recipe import Recipe, optimizer_for


class Toy:
    """A step that is right: all that changes stays where it is."""

    def __init__(self) -> None:
        self.x = torch.tensor([1.0, 2.0])
        self.count = 0
        self.late: list[Tensor] = []
        self.sum = self.x.clone()

    def __call__(self) -> None:
        self.x.copy_(2 * self.x + 1)


class TableFilledAfterwards(Toy):
    """Its places are allocated in the capture and written from outside: the graph's memory is not its own."""

    def __call__(self) -> None:
        table = torch.zeros(2, dtype=torch.int64)
        if Recording.present is None:
            table.copy_(torch.tensor([1, 0]))
        else:
            self.late.append(table)
        self.x.copy_(self.x.index_select(0, table) + 1)


class CountsInPython(Toy):
    def __call__(self) -> None:
        self.count += 1
        self.x.add_(self.count)


class ReadsAValue(Toy):
    def __call__(self) -> None:
        self.x.mul_(1 + float(self.x.sum()))


class ReadsAList(Toy):
    def __call__(self) -> None:
        self.x.mul_(1 + self.x.tolist()[0])


class MakesATensor(Toy):
    def __call__(self) -> None:
        self.x.add_(torch.tensor([1.0, 2.0]))


class TakesFromNumPy(Toy):
    def __call__(self) -> None:
        self.count += 1
        self.x.add_(torch.from_numpy(self.x.numpy() * self.count))


class KeepsANewTensor(Toy):
    """The next step reads what this one has allocated."""

    def __call__(self) -> None:
        self.sum = self.sum + self.x
        self.x.copy_(self.sum)


def four_steps(toy: Toy, graph: bool) -> list[Tensor]:
    step: Callable[[], None] = toy
    if graph:
        count, x = toy.count, toy.x
        step = Captured(toy, [x])
        toy.count = count
        for table in toy.late:
            table.copy_(torch.tensor([1, 0]))
    seen = []
    for _ in range(4):
        step()
        seen.append(toy.x.clone())
    return seen


HOST = {ReadsAValue, ReadsAList, MakesATensor, TakesFromNumPy}


@pytest.mark.parametrize(
    "kind", [Toy, TableFilledAfterwards, CountsInPython, KeepsANewTensor, *sorted(HOST, key=str)]
)
def test_the_law_tells_a_right_step_from_wrong_ones(
    kind: type[Toy],
    recordings: list[Recording],
) -> None:
    eager = torch.stack(four_steps(kind(), graph=False))
    try:
        holds = torch.equal(torch.stack(four_steps(kind(), graph=True)), eager)
    except IndexError:  # a place that poisoned memory names
        holds = False
    (recording,) = recordings
    assert holds == (kind is Toy)
    assert bool(recording.touches) == (kind in HOST)


def test_a_graph_keeps_what_it_reads(recordings: list[Recording]) -> None:
    def step(toy: Toy) -> None:
        toy.x.add_(toy.sum)

    kept = Captured(partial(step, Toy()))
    assert recordings.pop().lost() == 0
    Captured(partial(step, Toy()))
    assert recordings.pop().lost() == 2  # as above, without a graph that lives on
    del kept


def test_what_is_tried_out_leaves_no_trace(recordings: list[Recording]) -> None:
    toy = Toy()
    Captured(toy, [toy.x])
    assert toy.x.tolist() == [1, 2]


# --- Training steps under each plan -----------------------------------------------------------------


class Training:
    """A step as a user would write it, in place of a GPU's."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        self.optimizer = optimizer_for(list(model.parameters()), recipe)
        device = next(model.parameters()).device
        self.x, self.y = randn(6, 32).to(device), torch.arange(6, device=device) % 4
        self()
        self.start = [t.clone() for t in self.state()]

    def state(self) -> list[Tensor]:
        slots = [v for s in self.optimizer.state.values() for v in s.values()]
        return [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, slots)]

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()


RECIPES = {
    "sgd": Recipe(optimizer="sgd", lr=0.1, momentum=0.0),
    "momentum": Recipe(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": Recipe(optimizer="adam", lr=1e-2),
    "adamw": Recipe(optimizer="adamw", lr=1e-2, weight_decay=0.1),
}


def masked() -> nn.Module:
    model = sc.sparsify_(
        seeded(
            lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4))
        )
    )
    layers = sc.sparse_layers(model)
    kept = torch.zeros(32, 32, dtype=torch.bool)
    kept[:16, :16] = kept[16:, 16:] = True
    layers["0"].set_mask_(kept)
    layers["3"].set_mask_(randn(4, 32) > 0)
    return model


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("plan", ["mask", "state", "compact", "block:16x16"])  # csr: no GPU's
def test_a_training_step_under_a_plan_replays(
    plan: str,
    recipe: Recipe,
    recordings: list[Recording],
) -> None:
    steps = [Training(sc.plan_(masked(), plan), recipe) for _ in range(2)]
    graph = Captured(steps[1], steps[1].state())
    for t, start in zip(steps[1].state(), steps[0].start, strict=True):
        assert torch.equal(t, start)
    for _ in range(3):
        steps[0]()
        graph()
        for mine, right in zip(steps[1].state(), steps[0].state(), strict=True):
            assert torch.equal(mine, right)
    assert recordings[0].touches == []
    del steps
    assert recordings[0].lost() == 0


# --- Gated blocks, whose lists of open ones a replay makes anew -------------------------------------


@pytest.mark.parametrize("unit", [Unit(16, 16), Unit(1, 0)], ids=["block", "channel"])
def test_launches_over_open_blocks_replay(
    unit: Unit,
    recordings: list[Recording],
) -> None:
    weight, x, dy = randn(32, 48, seed=1), randn(5, 48, seed=2), randn(5, 32, seed=3)
    gate = [float(v) for v in GateSpec(HARD_CONCRETE, 2 / 3, -0.1, 1.1)]

    class Draws:
        def __init__(self) -> None:
            self.logits = randn(2, 3) - 1 if unit.w else randn(32, 1) - 1
            self.step, self.seed = torch.tensor([0]), torch.tensor([7])
            self.y, self.dx = torch.zeros(5, 32), torch.zeros(5, 48)

        def __call__(self) -> None:
            self.step += 1
            given = (weight, self.logits, None, None, self.seed, self.step)
            rest = (3, gate, list(unit), [1, 1, 0, 0, 1, 1])
            self.y.copy_(gated_blocks.launch_forward(x, *given, *rest))
            found = gated_blocks.launch_backward(
                dy, x, weight, self.logits, None, self.seed, self.step, *rest, True, True
            )
            self.dx.copy_(found[0])
            self.logits.sub_(0.1 * found[2])

        def state(self) -> list[Tensor]:
            return [self.step, self.logits, self.y, self.dx]

    eager, captured = Draws(), Draws()
    graph = Captured(captured, captured.state())
    opened = []
    for _ in range(4):
        eager()
        graph()
        for mine, right in zip(captured.state(), eager.state(), strict=True):
            assert torch.equal(mine, right)
        opened.append((int((eager.y != 0).sum()), int((eager.dx != 0).sum())))
    assert len({*opened}) > 1  # another draw each time
    assert recordings[0].touches == []


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("plan", ["mask", "state", "compact", "block:16x16"])
def test_a_captured_training_step_is_the_step(plan: str) -> None:
    models = [sc.plan_(masked().to(DEVICE), plan) for _ in range(2)]
    steps = [Training(model, RECIPES["momentum"]) for model in models]
    graph = Captured(steps[1], steps[1].state())
    for _ in range(3):
        steps[0]()
        graph()
        for mine, right in zip(steps[1].state(), steps[0].state(), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)
