"""Threads: a model is one thread's at a time; different models are searched side by side, to the tickets that they have
alone; what belongs to the process is as it was.
"""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, convolutional, equal, mlp, randn, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sparsecore as sc
from sparsecore import process
from sparsecore.claims import claimed
from sparsecore.process import Shared, Turn, between_steps, drawing
from sparsecore.scores import grasp, magnitude, snip, synflow
from sparsecore.scores import random as random_score
from sparsecore.training import Recipe

ADAM = Recipe(optimizer="adam", lr=1e-2)
SEARCHES: dict[str, Any] = {
    "random": sc.OneShot(random_score),
    "magnitude": sc.OneShot(magnitude),
    "snip": sc.OneShot(snip),
    "grasp": sc.OneShot(grasp),
    "synflow": sc.Iterative(synflow, rounds=3),
    "iterative-snip": sc.Iterative(snip, rounds=3),
    "ltr": sc.Rewinding(ADAM, 2, start_epoch=1, rate=0.5),
    "set": sc.SET(ADAM, 3),
    "rigl": sc.RigL(ADAM, 3, interval=2),
    "gradual": sc.GradualMagnitude(ADAM, 3, updates=4),
    "edge-popup": sc.EdgePopup(epochs=2),
    "continuous": sc.ContinuousSparsification(epochs=2),
    "joint": sc.JointSearch(epochs=2),
    "cts": sc.ConcreteSearch(epochs=2),
    "strong": sc.StrongSearch(epochs=2),
}
each_search = pytest.mark.parametrize("name", SEARCHES)


class Noisy(Dataset):
    """Augmented by all three of the process's generators."""

    def __init__(self) -> None:
        self.blobs = Blobs(count=48)

    def __len__(self) -> int:
        return len(self.blobs.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(12) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return self.blobs.x[i] + noise, self.blobs.y[i]


def loader() -> DataLoader:
    return DataLoader(Noisy(), 16, shuffle=True)


def in_threads(*runs: Callable[[], Any]) -> list[Any]:
    """What each gives, or raises, begun together."""
    found: list[Any] = [None] * len(runs)
    begin = Barrier(len(runs))

    def one(i: int) -> None:
        begin.wait()
        try:
            found[i] = runs[i]()
        except Exception as error:
            found[i] = error

    threads = [Thread(target=one, args=[i]) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "threads wait for each other"
    return found


def states() -> tuple[Any, ...]:
    """The process's generators, and its switches."""
    drawn: Any = np.random.get_state()
    _, keys, *rest = drawn
    switches = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    numbers = (
        torch.get_rng_state().tolist(),
        random.getstate(),
        keys.tolist(),
        *rest,
        warnings.filters[:],
    )
    return (*numbers, *switches, torch.get_default_dtype(), torch.is_grad_enabled())


def dropping(seed: int = 0) -> nn.Module:
    """A network whose training draws."""
    return sc.sparsify_(
        seeded(
            lambda: nn.Sequential(
                nn.Linear(12, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
            ),
            seed,
        )
    )


class Held:
    """Blobs whose first epoch waits in its middle, so that others meet a search under way."""

    def __init__(self) -> None:
        self.blobs, self.begun, self.go = Blobs(), Event(), Event()

    def __len__(self) -> int:
        return len(self.blobs)

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(self.blobs.epoch(index)):
            if i == 1:
                self.begun.set()
                assert self.go.wait(60)
            yield batch


def while_searched(search: Any, model: nn.Module, second: Callable[[], Any]) -> tuple[Any, Any]:
    """What a search gives, and what `second` does in the middle of it."""
    held, found = Held(), []
    thread = Thread(target=lambda: found.append(search(model, held, sparsity=0.5)))
    thread.start()
    try:
        assert held.begun.wait(60)
        other = second()
    except Exception as error:
        other = error
    finally:
        held.go.set()
        thread.join(60)
    return found[0], other


@pytest.mark.filterwarnings("ignore::sparsecore.SparsityWarning")
@pytest.mark.parametrize("name", [n for n in SEARCHES if n not in ("random", "magnitude")])
def test_a_model_that_is_searched_is_refused_and_the_search_ends_as_if_alone(name: str) -> None:
    search = SEARCHES[name]
    if name in ("grasp", "synflow"):  # which read one batch
        search = sc.OneShot(snip)
    alone = search(dropping(), Blobs(), sparsity=0.5)
    ticket = sc.OneShot(magnitude)(dropping(), [], sparsity=0.5)
    model: Any = dropping()
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    refused = {
        "search": lambda: sc.OneShot(snip)(model, Blobs(), sparsity=0.5),
        "train": lambda: sc.train(model, Blobs(), None, ADAM),
        "evaluate": lambda: sc.evaluate(model, Blobs()),
        "apply_": lambda: ticket.apply_(model),
        "plan_": lambda: sc.plan_(model, "mask"),
        "remask_": lambda: sc.remask_(model, ticket.masks),
        "sparsify_": lambda: sc.sparsify_(model),
        "densify_": lambda: sc.densify_(model),
        "part": lambda: sc.sparsify_(nn.Sequential(model[0])),
        "shared": lambda: sc.densify_(nn.Sequential(nn.Flatten(), model[2])),
    }

    def all_of_them() -> dict[str, Any]:
        said = {}
        for what, call in refused.items():
            try:
                call()
                said[what] = "nothing"
            except ValueError as error:
                said[what] = str(error)
        return said

    found, said = while_searched(search, model, all_of_them)
    for what, text in said.items():
        assert text.startswith("model: expected one that no other thread works with"), (what, text)
    assert found.hash == alone.hash and equal(dict(found.weights), dict(alone.weights))
    after = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    assert equal(before, after)
    sc.evaluate(ticket.apply_(model), Blobs())  # which is free again


def test_two_searches_of_one_model_at_once() -> None:
    model = dropping()
    found = in_threads(*[lambda: SEARCHES["cts"](model, Blobs(), sparsity=0.5)] * 2)
    refused = [f for f in found if isinstance(f, ValueError)]
    tickets = [f for f in found if isinstance(f, sc.Ticket)]
    assert len(refused) + len(tickets) == 2 and tickets


def test_what_a_search_does_within_itself_goes_on() -> None:
    model, seen = dropping(), []

    def watch(net: nn.Module) -> float:
        seen.append(sc.evaluate(net, Blobs()))
        sc.OneShot(snip)(sc.sparsify_(mlp()), Blobs(), sparsity=0.5)
        return seen[-1]

    SEARCHES["cts"](model, Blobs(), sparsity=0.5, watch=watch)
    SEARCHES["ltr"](model, Blobs(), sparsity=0.5, watch=watch)
    assert seen
    with claimed(model, "this"), claimed(model, "that"):
        pass
    assert not [0 for text in in_threads(lambda: sc.evaluate(model, Blobs())) if not text]


def test_an_error_gives_the_model_back() -> None:
    model = dropping()
    with pytest.raises(ValueError):
        SEARCHES["cts"](model, [], sparsity=0.5)
    (found,) = in_threads(lambda: sc.evaluate(model, Blobs()))
    assert isinstance(found, float)


def test_evaluations_side_by_side_of_what_is_in_evaluation_mode() -> None:
    model = dropping().eval()
    expected = sc.evaluate(model, Blobs())
    assert in_threads(*[lambda: sc.evaluate(model, Blobs())] * 3) == [expected] * 3


@pytest.mark.filterwarnings("ignore::sparsecore.SparsityWarning")
@each_search
def test_different_models_side_by_side_give_the_tickets_that_they_give_alone(name: str) -> None:
    """With dropout, and data that draw from all of the process's generators."""
    search = SEARCHES[name]
    models = [dropping(seed) for seed in (1, 2)]
    runs = [lambda m=m: search(m, loader(), sparsity=0.5, loss="cross-entropy") for m in models]
    before = states()
    alone = [run() for run in runs]
    assert states() == before
    for found, expected in zip(in_threads(*runs), alone, strict=True):
        if isinstance(found, Exception):
            raise found
        assert found.hash == expected.hash
        assert equal(dict(found.weights), dict(expected.weights))
    assert states() == before


@pytest.mark.filterwarnings("ignore::sparsecore.SparsityWarning")
def test_many_at_once() -> None:
    names = ["ltr", "joint", "set", "snip", "continuous", "grasp"]
    models = {n: dropping(i) for i, n in enumerate(names)}
    runs = [lambda n=n, m=m: SEARCHES[n](m, loader(), sparsity=0.5) for n, m in models.items()]
    alone, before = [run().hash for run in runs], states()
    assert [found.hash for found in in_threads(*runs)] == alone
    assert states() == before


def test_models_by_name_beside_a_training_that_draws() -> None:
    from sparsecore.recipes import build

    first, second = dropping(), dropping()

    def trained(model: nn.Module = first) -> Tensor:
        sc.train(model, Blobs(), None, Recipe(lr=0.05, epochs=2))
        return model.state_dict()["0.weight"]

    def built() -> list[Tensor]:
        models = (build("lenet-300-100", (1, 4, 4), 3, seed=i) for i in range(20))
        return [next(m.parameters()).detach() for m in models]

    alone = trained(), built()
    found = in_threads(lambda: trained(second), built)
    assert torch.equal(found[0], alone[0])
    assert all(map(torch.equal, found[1], alone[1]))


def test_turns_are_fair_and_taken_between_steps() -> None:
    seen: list[int] = []

    def steps(me: int, alone: bool = True) -> Tensor:
        drawn = []
        with process.seeded(me):
            while not (alone or seen or drawing.wanted):
                time.sleep(0.001)
            for _ in range(20):
                seen.append(me)
                drawn.append(torch.rand(1))
                between_steps()
        return torch.cat(drawn)

    before = torch.get_rng_state()
    alone = [steps(1), steps(2)]
    seen.clear()
    assert all(
        map(torch.equal, in_threads(lambda: steps(1, False), lambda: steps(2, False)), alone)
    )
    assert all(a != b for a, b in pairwise(seen))  # not one after the other
    assert torch.equal(before, torch.get_rng_state())


def test_who_does_not_draw_takes_nobodys_turn_away() -> None:
    """As the steps of a search do that draws nothing itself, beside a training that does and one that waits."""

    def waits() -> None:
        with process.seeded(4):
            pass

    with process.seeded(3):
        expected = torch.rand(2)
    with process.seeded(3):
        waiting = Thread(target=waits)
        waiting.start()
        while not drawing.wanted:
            time.sleep(0.001)
        beside = Thread(target=between_steps)
        beside.start()
        beside.join()
        assert drawing.mine and torch.equal(torch.rand(2), expected)
    waiting.join()


def test_no_turn_is_given_away_from_within_another() -> None:
    with process.seeded(3):
        expected = torch.rand(2)
    begun = Event()

    def other() -> None:
        begun.set()
        with process.seeded(4):
            torch.rand(1)

    thread = Thread(target=other)
    with process.seeded(3), drawing:
        thread.start()
        assert begun.wait(60)
        while not drawing.wanted:
            time.sleep(0.001)
        between_steps()
        assert drawing.wanted
        found = torch.rand(2)
    thread.join(60)
    assert torch.equal(found, expected)


def test_an_interrupt_while_waiting_leaves_the_turn_to_others() -> None:
    turn = Turn()

    class Interrupted(Exception):
        pass

    def interrupted() -> None:
        def wait_for(*_: Any) -> None:
            raise Interrupted

        turn._changed.wait_for = wait_for  # type: ignore[method-assign]
        try:
            with turn:
                pass
        finally:
            del turn._changed.wait_for  # type: ignore[attr-defined]

    with turn:
        (error,) = in_threads(interrupted)
        assert isinstance(error, Interrupted)
    assert not turn.wanted
    assert in_threads(lambda: turn.__enter__() or turn.__exit__() or "mine") == ["mine"]


def test_a_shared_switch_is_put_back_by_the_last() -> None:
    thrown: list[str] = []

    class Throw:
        def __enter__(self) -> None:
            thrown.append("on")

        def __exit__(self, *error: object) -> None:
            thrown.append("off")

    switch = Shared(Throw)
    first, second = switch(), switch()
    first.__enter__()
    assert in_threads(lambda: second.__enter__() or "in") == ["in"]
    first.__exit__(None, None, None)
    assert thrown == ["on"]
    second.__exit__(None, None, None)
    assert thrown == ["on", "off"]


def test_a_model_shares_nothing_with_its_copy() -> None:
    model, other = sc.sparsify_(convolutional()), sc.sparsify_(convolutional())
    _, found = while_searched(
        SEARCHES["cts"], model, lambda: SEARCHES["cts"](other, Blobs(), sparsity=0.5)
    )
    assert isinstance(found, sc.Ticket)
    with torch.no_grad():
        assert other(randn(4, 12)).isfinite().all()
