"""The replay law: a search step that is recorded once and replayed is the step that Python runs, bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import randn, seeded
from replay import Recording
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.control import AbstractController, GradBalance, Lagrangian, Reading, State
from sparsecore.data import Batches, Dataset, Split
from sparsecore.engine import Engine, Way, feed_of
from sparsecore.gates import HardConcrete
from sparsecore.granularity import NM, Block, Channel
from sparsecore.objectives import task
from sparsecore.search import ConcreteSearch, JointSearch
from sparsecore.search.gated import AbstractGateSearch
from sparsecore.search.many_step import ManyStep
from sparsecore.search.steps import FusedStep, LayerwiseStep
from sparsecore.training import Recipe

EPOCHS = 2


def small_data() -> Dataset:
    images = (64 * randn(12, 1, 4, 4).abs()).clamp_max(255).to(torch.uint8)
    split = Split(images, torch.arange(12) % 4)
    return Dataset("small", split, split, 4, (1, 4, 4), (0.5,), (0.25,), flip_crop=True)


def linear() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    )


def convolutional() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
        )
    )


class Own(AbstractController):
    """A controller without a rule, which is asked in every step."""

    def target(self, density: float) -> float:
        return GradBalance().target(density)

    def init(self, device: torch.device) -> State:
        return GradBalance().init(device)

    def update(self, state: State, reading: Reading) -> tuple[Tensor, State]:
        return GradBalance().update(state, reading)


@dataclass(frozen=True)
class Case:
    search: AbstractGateSearch
    model: Callable[[], nn.Module] = linear
    members: tuple[tuple[float, int], ...] = ((0.3, 0),)
    augment: bool = False
    kind: type[FusedStep] = FusedStep


SGD = Recipe(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-3)
PLAIN_SGD = Recipe(optimizer="sgd", lr=0.05, momentum=0.0)
ADAM = Recipe(optimizer="adam", lr=1e-3, clip_norm=1.0, label_smoothing=0.1)
CTS = ConcreteSearch(epochs=EPOCHS)
JOINT = JointSearch(epochs=EPOCHS, ramp=0.7)
CASES = {
    "gains and teacher memory": Case(CTS),
    "neither": Case(replace(CTS, gain_lr=0, objective=task), augment=True),
    "ramp": Case(replace(CTS, start_density=0.6, ramp=0.8)),
    "lagrangian": Case(replace(CTS, control=Lagrangian())),
    "own controller": Case(replace(CTS, control=Own())),
    "blocks": Case(replace(CTS, granularity=Block(2, 3), gate=HardConcrete())),
    "channels": Case(replace(CTS, granularity=Channel()), convolutional),
    "2:4": Case(replace(CTS, granularity=NM(2, 4))),
    "convolution and BatchNorm": Case(replace(CTS, channels_last=True), convolutional, augment=True),
    "by layer": Case(CTS, kind=LayerwiseStep),
    "by layer, blocks": Case(
        replace(CTS, granularity=Block(16, 16), gate=HardConcrete()), kind=LayerwiseStep
    ),
    "by layer, ramp, channels": Case(
        replace(CTS, granularity=Channel(), start_density=0.6, ramp=0.8, gain_lr=0),
        convolutional, kind=LayerwiseStep,
    ),
    "many": Case(CTS, members=((0.3, 0), (0.1, 5)), kind=ManyStep),
    "many, no gains": Case(
        replace(CTS, gain_lr=0, objective=task), convolutional, ((0.3, 0), (0.1, 5)), kind=ManyStep
    ),
    "joint": Case(JOINT, augment=True),
    "joint, Adam, clipped": Case(replace(JOINT, recipe=ADAM), convolutional),
    "joint, momentum": Case(replace(JOINT, recipe=SGD, gain_lr=0.01), convolutional),
    "joint, no momentum": Case(replace(JOINT, recipe=PLAIN_SGD)),
    "joint, AdamW, blocks": Case(
        replace(
            JOINT, granularity=Block(2, 3), gate=HardConcrete(), recipe=Recipe(optimizer="adamw", lr=1e-3)
        )
    ),
}  # fmt: skip


def run(case: Case, *, graph: bool) -> tuple[list[dict[str, Tensor]], Engine]:
    """What every step leaves behind, with a rate that drops on the way."""
    search, model = case.search, sc.sparsify_(case.model())
    batches = Batches(small_data(), "train", 4, seed=1, augment=case.augment)
    seen = []
    with search._gated(model, sc.sparse_layers(model), 1 - case.members[0][0]) as gated:
        if case.kind is FusedStep:
            step = search._step(model, gated, case.members)
        else:
            step = case.kind(search, model, gated, case.members)
        step.schedule(EPOCHS * len(batches))
        engine = Engine(step, feed_of(batches, step.device), Way(graph=graph))
        for epoch in range(EPOCHS):
            order = batches.order(epoch)
            step.begin_epoch(None if order is None else len(order))
            step.clear()
            engine.begin(epoch)
            for i in range(len(batches)):
                if (epoch, i) == (1, 1):
                    step.drop_lr(0.1)
                engine()
                state = step.tensors() | {"total": step.total}
                seen.append({name: value.clone() for name, value in state.items()})
    return seen, engine


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_replay_is_the_step(case: Case, recordings: list[Recording]) -> None:
    """Bit for bit; no step touches the host; and graphs keep all that they read."""
    eager, _ = run(case, graph=False)
    assert not recordings
    replayed, engine = run(case, graph=True)
    assert isinstance(engine.step, FusedStep)
    assert len(recordings) == 1 + (engine.step.net.memory is not None)
    for i, (mine, right) in enumerate(zip(replayed, eager, strict=True)):
        assert mine.keys() == right.keys()
        for name in right:
            assert torch.equal(mine[name], right[name]), (i, name)
    assert [recording.touches for recording in recordings] == [[] for _ in recordings]
    graph = engine.captured
    del engine
    assert recordings[-1].lost() == 0
    del graph
