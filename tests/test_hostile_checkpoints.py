"""A checkpoint with a right digest and wrong contents: one line, before native code or a model sees any of it."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Blobs, equal, mlp
from torch import Tensor

import sparsecore as sc
from sparsecore import checkpoints, safefile
from sparsecore.checkpoints import pack_optimizer, unpack_optimizer
from sparsecore.recipe import Recipe, optimizer_for
from sparsecore.scores import magnitude, synflow
from sparsecore.search import SearchError
from sparsecore.search.continuous import ContinuousSparsification
from sparsecore.search.edge_popup import EdgePopup
from sparsecore.search.joint import JointSearch
from sparsecore.training import train
from sparsecore.writing import FileError

Tensors, Meta = dict[str, Tensor], dict[str, Any]
RECIPES = {
    "sgd": Recipe(lr=0.1, momentum=0.9, epochs=2, batch=64),
    "adam": Recipe(optimizer="adam", lr=1e-3, epochs=2, batch=64),
    "adamw": Recipe(optimizer="adamw", lr=1e-3, epochs=2, batch=64, ema=0.9),
}
FIRST = {"sgd": "momentum_buffer", "adam": "exp_avg", "adamw": "exp_avg_sq"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensors, Meta]]:
    """A checkpoint after one epoch, by optimiser."""
    found = {}
    for name, recipe in RECIPES.items():
        path = tmp_path_factory.mktemp("checkpoints") / name
        train(mlp(), Blobs(), Blobs(), recipe, stop_epoch=1, total_epochs=2, checkpoint=path)
        found[name] = safefile.read(path, kind="checkpoint")
    return found


def with_slot(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Meta, str], None]:
    def spoil(tensors: Tensors, meta: Meta, slot: str) -> None:
        key = f"optimizer/0/{slot}"
        tensors[key] = change(tensors[key])

    return spoil


def with_model(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Meta, str], None]:
    def spoil(tensors: Tensors, meta: Meta, slot: str) -> None:
        key = next(k for k in tensors if k.startswith("model/"))
        tensors[key] = change(tensors[key])

    return spoil


def with_meta(**changes: Any) -> Callable[[Tensors, Meta, str], None]:
    return lambda tensors, meta, slot: meta.update(copy.deepcopy(changes))


def with_record(**changes: Any) -> Callable[[Tensors, Meta, str], None]:
    return lambda tensors, meta, slot: meta["epochs"][0].update(changes)


SPOILT: dict[str, Callable[[Tensors, Meta, str], Any]] = {
    "slot of another shape": with_slot(lambda t: t[:1]),
    "slot of no dimension": with_slot(lambda t: t.sum()),
    "huge slot": with_slot(lambda t: t.repeat(3, 3)),
    "slot of another dtype": with_slot(lambda t: t.double()),
    "slot of integers": with_slot(lambda t: t.to(torch.int32)),
    "slot of nan": with_slot(lambda t: t * math.nan),
    "slot of another parameter": lambda t, m, s: t.update(
        {f"optimizer/99/{s}": torch.zeros(2)}
    ),
    "slot of another optimiser": lambda t, m, s: t.update({"optimizer/0/square_avg": torch.ones(2)}),
    "slot of no number": lambda t, m, s: t.update({f"optimizer/x/{s}": torch.zeros(2)}),
    "weight of another shape": with_model(lambda t: t[:-1]),
    "weight of another dtype": with_model(lambda t: t.half()),
    "weight of inf": with_model(lambda t: t / 0),
    "no weight": lambda t, m, s: t.pop(next(k for k in t if k.startswith("model/"))),
    "one weight more": lambda t, m, s: t.update({"model/more": torch.zeros(1)}),
    "snapshot of no model": lambda t, m, s: t.update({"snapshot/1/x": torch.zeros(1)}),
    "snapshot of no epoch": lambda t, m, s: t.update({"snapshot/x/y": torch.zeros(1)}),
    "no epochs": with_meta(epochs=[]),
    "epochs of another kind": with_meta(epochs={"0": 1}),
    "seconds of nan": with_meta(seconds={"float": "nan"}),
    "seconds of text": with_meta(seconds="1"),
    "seconds below 0": with_meta(seconds=-1),
    "a scaler of text": with_meta(scaler="x"),
    "an engine of a list": with_meta(engine=["graph"]),
    "an unknown engine": with_meta(engine="warp"),
    "no run": lambda t, m, s: m.pop("run"),
    "a run of a number": with_meta(run=1),
    "an epoch of text": with_record(epoch="1"),
    "an epoch before the start": with_record(epoch=-1),
    "an accuracy beyond 100": with_record(accuracy=101),
    "a loss of a list": with_record(loss=[1]),
    "an epoch beyond numbers": with_record(epoch=10**30),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("what", SPOILT)
def test_a_training_goes_on_from_its_own_checkpoint_alone(
    what: str, optimizer: str, saved: dict[str, tuple[Tensors, Meta]], tmp_path: Path
) -> None:
    tensors, meta = dict(saved[optimizer][0]), copy.deepcopy(saved[optimizer][1])
    SPOILT[what](tensors, meta, FIRST[optimizer])
    path = tmp_path / "c"
    safefile.write(path, tensors, meta, kind="checkpoint")
    before, model = path.read_bytes(), mlp()
    with pytest.raises(ValueError, match=r"expected|belongs|epoch"):
        train(model, Blobs(), Blobs(), RECIPES[optimizer], checkpoint=path, total_epochs=2)
    assert path.read_bytes() == before and equal(model.state_dict(), mlp().state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("optimizer", RECIPES)
def test_the_checkpoints_themselves_go_on(
    optimizer: str, saved: dict[str, tuple[Tensors, Meta]], tmp_path: Path
) -> None:
    safefile.write(tmp_path / "c", *saved[optimizer], kind="checkpoint")
    resumed, whole, recipe = mlp(), mlp(), RECIPES[optimizer]
    train(resumed, Blobs(), Blobs(), recipe, checkpoint=tmp_path / "c", total_epochs=2)
    train(whole, Blobs(), Blobs(), recipe, total_epochs=2)
    assert equal(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("steps", [-1, 0.5, 2**25, math.inf, math.nan])
def test_a_number_of_steps_is_one(steps: float) -> None:
    model = mlp()
    optimizer = optimizer_for([*model.parameters()], RECIPES["adam"])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    good = pack_optimizer(optimizer)
    unpack_optimizer(optimizer, good)
    with pytest.raises(FileError, match="optimizer/1/step: expected"):
        unpack_optimizer(optimizer, good | {"optimizer/1/step": torch.tensor(steps)})
    with pytest.raises(FileError, match=r"optimizer/0/exp_avg_sq: expected numbers from 0 on"):
        unpack_optimizer(optimizer, good | {"optimizer/0/exp_avg_sq": -torch.ones(24, 12)})
    with pytest.raises(FileError, match=r"optimizer/0/exp_avg: expected a tensor, got none"):
        unpack_optimizer(optimizer, {k: v for k, v in good.items() if k != "optimizer/0/exp_avg"})


def test_momentum_of_some_parameters_alone_is_that_of_a_beginning() -> None:
    """What fused SGD would take for a crash."""
    model = mlp()
    optimizer = optimizer_for([*model.parameters()], RECIPES["sgd"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    good = pack_optimizer(optimizer)
    unpack_optimizer(optimizer, {k: v for k, v in good.items() if not k.startswith("optimizer/1")})
    optimizer.step()
    buffers = [slots["momentum_buffer"] for slots in optimizer.state.values()]
    assert {round(float(b.mean()), 5) for b in buffers} == {1.0, 1.9}


@pytest.mark.parametrize(
    "search",
    [
        sc.ConcreteSearch(epochs=2),
        JointSearch(epochs=2),
        ContinuousSparsification(epochs=2),
        EdgePopup(epochs=2),
        sc.Iterative(synflow, rounds=3),
    ],
    ids=lambda s: type(s).__name__,
)
def test_every_tensor_and_fact_of_a_search_is_looked_at(search: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "c", sc.sparsify_(mlp())
    before = copy.deepcopy(model.state_dict())
    search(model, Blobs(), sparsity=0.5, checkpoint=path)
    tensors, meta = safefile.read(path, kind="checkpoint")
    spoilt: list[tuple[Tensors, Meta]] = []
    for name, value in tensors.items():
        others = [torch.zeros(value.numel() + 1), value.to(torch.complex64)]
        spoilt += [(tensors | {name: other}, meta) for other in others]
        if name != "teacher" and not name.endswith("momentum_buffer"):  # which may begin anew
            spoilt.append(({k: v for k, v in tensors.items() if k != name}, meta))
        if value.is_floating_point() and value.numel():
            spoilt.append((tensors | {name: torch.full_like(value, math.nan)}, meta))
    spoilt.append((tensors | {"more": torch.zeros(2)}, meta))
    for key in meta:
        spoilt += [(tensors, meta | {key: wrong}) for wrong in (None, [], -1, [{}])]
        spoilt.append((tensors, {k: v for k, v in meta.items() if k != key}))
    for wrong in (meta["records"] * 2, [{}] * len(meta["records"]), meta["records"][::-1]):
        spoilt.append((tensors, meta | {"records": wrong}))
    for wrong_tensors, wrong_meta in spoilt:
        safefile.write(path, wrong_tensors, wrong_meta, kind="checkpoint")
        kept = path.read_bytes()
        with pytest.raises((FileError, SearchError)):
            search(model, Blobs(), sparsity=0.5, checkpoint=path)
        assert path.read_bytes() == kept
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_numbers_that_blow_up_are_told_before_anything_is_written(tmp_path: Path) -> None:
    """Each of them is one that a float32 may be."""
    path, model, search = tmp_path / "c", sc.sparsify_(mlp()), sc.ConcreteSearch(epochs=3)

    def dying(net: Any) -> float:
        if path.exists():
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        search(model, Blobs(), sparsity=0.5, checkpoint=path, watch=dying)
    tensors, meta = safefile.read(path, kind="checkpoint")
    huge = {"m/0": torch.full_like(tensors["m/0"], 3e38), "v/0": torch.zeros_like(tensors["v/0"])}
    safefile.write(path, tensors | huge, meta, kind="checkpoint")
    kept = path.read_bytes()
    with pytest.raises(SearchError, match="finite"):
        search(model, Blobs(), sparsity=0.5, checkpoint=path)
    assert path.read_bytes() == kept


def test_deep_and_huge_facts_are_refused(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    safefile.write(tmp_path / "c", {}, {"run": deep}, kind="checkpoint")
    with pytest.raises(FileError, match="do not match"):
        checkpoints.read(tmp_path / "c")
    with pytest.raises(FileError, match="plain text"):
        safefile.write(tmp_path / "d", {"a\x1b[2Jb": torch.zeros(1)}, {}, kind="ticket")
    assert not (tmp_path / "d").exists()


def test_a_ticket_brings_numbers_of_the_models_kind() -> None:
    model = sc.sparsify_(mlp())
    ticket = sc.OneShot(magnitude)(model, Blobs(), sparsity=0.5)
    key, weight = next(iter(ticket.weights.items()))
    before = copy.deepcopy(model.state_dict())
    for wrong in (weight * math.nan, weight.to(torch.complex64), weight.to(torch.int32)):
        with pytest.raises(sc.TicketError, match=f"weight {key}: expected"):
            replace(ticket, weights={**ticket.weights, key: wrong}).apply_(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    replace(ticket, weights={**ticket.weights, key: weight.double()}).apply_(model)
