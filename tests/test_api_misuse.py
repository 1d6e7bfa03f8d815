"""What a call is given that it cannot take: one line of a documented error, and the model as it was."""

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, convolutional, equal, mlp, rand, randn, seeded
from test_threads import ADAM, SEARCHES, dropping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparsecore as sc
from sparsecore.gates import Concrete, Gaussian, HardConcrete
from sparsecore.granularity import NM, Block
from sparsecore.kinds import KindError, check_fields, checked
from sparsecore.patterns import Gated, Masked, Planned
from sparsecore.scores import magnitude
from sparsecore.training import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
BLOBS = Blobs(count=128)
X, Y = BLOBS.x, BLOBS.y
NOTHING = torch.empty(0, 12), torch.empty(0, dtype=torch.int64)
READERS = [name for name in SEARCHES if name not in ("random", "magnitude")]
SHAPES = ("grasp", "synflow")  # these read the first batch alone, of which synflow looks at shapes


def batches(change: Callable[..., Any] = lambda x, y: (x, y), at: int | None = None) -> list[Any]:
    """Four batches, of which one or all are changed."""
    parts = zip(X.split(32), Y.split(32), strict=True)
    return [change(x, y) if at in (None, i) else (x, y) for i, (x, y) in enumerate(parts)]


class Epochs:
    """What says to be longer than it is, or dies."""

    def __init__(self, held: list[Any], length: int, error: Exception | None = None) -> None:
        self.held, self.length, self.error = held, length, error

    def __len__(self) -> int:
        return self.length

    def epoch(self, index: int) -> Iterator[Any]:
        yield from self.held
        if self.error is not None:
            raise self.error


def used_up() -> Callable[[], Any]:
    held = [batches()]
    return lambda: iter(held.pop() if held else [])


NO_DATA: dict[str, Callable[[], Any]] = {
    "an empty list": list,
    "an empty loader": lambda: DataLoader(TensorDataset(X[:0], Y[:0]), 8),
    "less than a batch": lambda: DataLoader(TensorDataset(X[:3], Y[:3]), 8, drop_last=True),
    "an epoch of nothing": lambda: Epochs([], 4),
    "batches of nothing": lambda: [NOTHING] * 3,
    "epochs of batches of nothing": lambda: Epochs([NOTHING] * 3, 3),
    "a function that is used up": used_up,
    "a generator without a length": lambda: (batch for batch in batches()),
}
TOO_LITTLE: dict[str, Callable[[], Any]] = {
    "an epoch shorter than it says": lambda: Epochs(batches(), 9),
    "labels that are left out": lambda: batches(lambda x, y: (x, torch.full_like(y, -100))),
    "one batch of nothing": lambda: batches(lambda x, y: NOTHING, at=2),
    "NaN later": lambda: batches(lambda x, y: (x * float("nan"), y), at=2),
    "infinity later": lambda: batches(lambda x, y: (x + float("inf"), y), at=2),
    "labels out of range later": lambda: batches(lambda x, y: (x, y + 99), at=2),
    "labels below 0 later": lambda: batches(lambda x, y: (x, y - 2), at=2),
    "other shapes later": lambda: batches(lambda x, y: (x[:, :5], y), at=2),
    "another dtype later": lambda: batches(lambda x, y: (x.double(), y), at=2),
    "other counts later": lambda: batches(lambda x, y: (x[:5], y), at=2),
    "None later": lambda: batches(lambda x, y: None, at=2),
    "a disk that is gone": lambda: Epochs(batches()[:2], 4, ValueError("the disk is gone")),
}
# What a search does not look at cannot be wrong: targets under an objective of outputs alone.
UNLABELLED = ("labels that are left out", "labels out of range later", "labels below 0 later")


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """All that a search has to give back."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    layers = sc.sparse_layers(model).values()
    return (
        [m.training for m in model.modules()],
        [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()],
        [id(layer.pattern) for layer in layers],
        hooks,
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def refused(search: Any, data: Any, path: Path | None = None, **options: Any) -> str:
    """What a search says, in a line, and leaves of the model and of files."""
    model = sc.sparsify_(convolutional())
    model[2].eval()
    before, values = state_of(model), tensors_of(model)
    with pytest.raises(ValueError) as found:
        search(model, data, sparsity=0.5, checkpoint=path, **options)
    assert state_of(model) == before and equal(tensors_of(model), values)
    assert torch.backends.mha.get_fastpath_enabled()
    said = str(found.value)
    assert said and "\n" not in said
    assert path is None or not [p for p in path.parent.rglob("*") if p.suffix == ".safetensors"]
    return said


@pytest.mark.parametrize("name", READERS)
def test_no_ticket_from_no_data(name: str, tmp_path: Path) -> None:
    for what, make in NO_DATA.items():
        said = refused(SEARCHES[name], make())
        assert "\n" not in said, what
        if "generator" not in what:
            refused(SEARCHES[name], make(), tmp_path / "run")


@pytest.mark.parametrize("name", [n for n in READERS if n not in SHAPES])
def test_no_ticket_from_data_that_fail_later(name: str) -> None:
    for what, make in TOO_LITTLE.items():
        if name == "cts" and what in UNLABELLED:
            continue
        if "snip" in name and what == "a disk that is gone":
            continue
        refused(SEARCHES[name], make())


def test_scores_of_the_first_batch_look_at_it() -> None:
    for name in SHAPES:
        refused(SEARCHES[name], batches(lambda x, y: (x[:, :5], y)))
    for label in (-100, 99):
        wrong = [(x, torch.full_like(y, label)) for x, y in batches()]
        refused(SEARCHES["grasp"], wrong)
    refused(SEARCHES["grasp"], batches(lambda x, y: (x * float("nan"), y)))


def test_a_stream_shorter_than_its_epoch() -> None:
    for name in ("snip", "iterative-snip", "ltr", "cts"):
        refused(SEARCHES[name], iter(batches()), steps_per_epoch=40)


def test_a_batch_whose_labels_are_left_out_counts_nothing_among_others() -> None:
    model = sc.sparsify_(mlp())
    out = batches(lambda x, y: (x, torch.full_like(y, -100)), at=2)
    ticket = SEARCHES["snip"](model, out, sparsity=0.5)
    assert ticket.hash == SEARCHES["snip"](model, out[:2] + out[3:], sparsity=0.5).hash


HOSTILE = [
    None, -1, 1.5, 10**400, float("nan"), float("inf"), "x", b"x", [1], {"a": 1}, object(), torch.empty(0),
    torch.ones(3), nn.ReLU(), lambda *a: None, 1j, Recipe, range(3), iter([]),
]  # fmt: skip


def ticket() -> sc.Ticket:
    return sc.OneShot(magnitude)(sc.sparsify_(mlp()), [], sparsity=0.5)


@functools.cache
def calls() -> dict[str, Callable[[Any], Any]]:
    """Public calls, by what of theirs is hostile."""
    t, x, few = ticket(), randn(4, 12), Blobs(count=16, batch=8)
    masked = lambda: t.apply_(sc.sparsify_(mlp()))  # noqa: E731
    once, step = Recipe(epochs=1, lr=0.01), next(few.epoch(0))
    layer = lambda: next(iter(sc.sparse_layers(sc.sparsify_(mlp())).values()))  # noqa: E731
    optimizer = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731

    def stepped(value: Any, place: int) -> None:
        model = sc.sparsify_(mlp())
        given: list[Any] = [model, "cross-entropy", optimizer(model), step]
        given[place] = value
        sc.TrainStep(*given)(*step)

    found: dict[str, Any] = {
        "apply_ model": t.apply_,
        "apply_ plan": lambda v: t.apply_(sc.sparsify_(mlp()), plan=v),
        "apply_ example": lambda v: t.apply_(sc.sparsify_(mlp()), v, plan="state"),
        "plan_ model": sc.plan_,
        "plan_ plan": lambda v: sc.plan_(masked(), v),
        "remask_ masks": lambda v: sc.remask_(masked(), v),
        "remask_ mask": lambda v: sc.remask_(masked(), {"0": v}),
        "remask_ optimizer": lambda v: sc.remask_(masked(), t.masks, v),
        "compact model": lambda v: sc.compact(v, x),
        "compact example": lambda v: sc.compact(masked(), v),
        "evaluate model": lambda v: sc.evaluate(v, few),
        "evaluate batches": lambda v: sc.evaluate(mlp(), v),
        "evaluate metric": lambda v: sc.evaluate(mlp(), few, v),
        "train model": lambda v: sc.train(v, few, None, once),
        "train batches": lambda v: sc.train(mlp(), v, None, once),
        "train recipe": lambda v: sc.train(mlp(), few, None, v),
        "sparsify_": sc.sparsify_,
        "densify_": sc.densify_,
        "sparse_layers": sc.sparse_layers,
        "coverage": sc.coverage,
        "report": sc.report,
        "decay_groups": lambda v: sc.decay_groups(v, 0.1),
        "recompute_statistics_": lambda v: sc.recompute_statistics_(v, few),
        "load": sc.load,
        "Ticket.from_zeros": sc.Ticket.from_zeros,
        "Ticket.from_prune": sc.Ticket.from_prune,
        "Ticket.prune_": t.prune_,
        "Ticket.shuffled": t.shuffled,
        "Ticket.reinitialised": t.reinitialised,
        "set_mask_": lambda v: layer().set_mask_(v),
        "Masked": Masked,
        "Planned": lambda v: Planned(v),  # pyright: ignore
        "Gated": lambda v: Gated((24, 12), Concrete(), density=v),  # type: ignore[arg-type]
        "graphed": lambda v: sc.graphed(v, x),
    }
    found |= {f"TrainStep {i}": lambda v, i=i: stepped(v, i) for i in range(4)}
    named = inspect.signature(sc.train).parameters.values()
    for key in (p.name for p in named if p.kind is p.KEYWORD_ONLY):
        if key not in ("metrics", "checkpoint", "facts", "repeats"):
            found[f"train {key}"] = lambda v, k=key: sc.train(mlp(), few, None, once, **{k: v})
    for key in ("masks", "weights", "meta", "scores"):
        found[f"Ticket {key}"] = lambda v, k=key: sc.Ticket(
            **{"masks": t.masks, "weights": t.weights, k: v}
        ).apply_(sc.sparsify_(mlp()))
    for key in ("scores", "model", "sparsity", "granularity", "densities"):
        found[f"from_scores {key}"] = lambda v, k=key: sc.Ticket.from_scores(
            **{"scores": t.scores, "model": sc.sparsify_(mlp()), "sparsity": 0.5, k: v}
        )
    for kind, given in {
        sc.OneShot: {"score": magnitude}, sc.Iterative: {}, sc.Rewinding: {"recipe": ADAM, "epochs": 1},
        sc.SET: {"recipe": ADAM, "epochs": 1}, sc.RigL: {"recipe": ADAM, "epochs": 1}, sc.EdgePopup: {},
        sc.GradualMagnitude: {"recipe": ADAM, "epochs": 1}, sc.ContinuousSparsification: {}, sc.JointSearch: {},
        sc.ConcreteSearch: {}, sc.StrongSearch: {}, Recipe: {}, Block: {"h": 2, "w": 2}, NM: {"n": 2, "m": 4},
        Concrete: {}, HardConcrete: {}, Gaussian: {}, sc.Loss: {},
    }.items():  # fmt: skip
        for field in fields(kind):
            found[f"{kind.__name__} {field.name}"] = lambda v, k=kind, g=given, f=field.name: k(
                **(g | {f: v})
            )
    return found


@pytest.mark.parametrize("name", calls())
def test_a_call_takes_what_it_is_given_or_says_in_a_line_why_not(name: str) -> None:
    call = calls()[name]
    for value in HOSTILE:
        try:
            call(value)
        except (ValueError, TypeError) as error:
            assert str(error).strip(), (name, value)
            assert not isinstance(error, UnicodeError), (name, value)


@pytest.mark.parametrize("name", ["snip", "ltr", "cts", "edge-popup"])
def test_a_search_says_in_a_line_what_it_cannot_take(name: str, tmp_path: Path) -> None:
    search, few = SEARCHES[name], Blobs(count=16, batch=8)
    for value in HOSTILE:
        for key in ("sparsity", "progress", "loss", "steps_per_epoch", "watch"):
            with warnings.catch_warnings(), pytest.MonkeyPatch.context() as here:
                here.chdir(tmp_path)
                try:
                    search(sc.sparsify_(mlp()), few, **{"sparsity": 0.5, key: value})
                except (ValueError, TypeError) as error:
                    assert str(error).strip(), (name, key, value)
        with pytest.raises((ValueError, TypeError)):
            search(value, few, sparsity=0.5)


def test_kinds_are_what_annotations_say() -> None:
    @checked
    def call(number: float, whole: int = 1, path: Path | None = None, *rest: int) -> Any:
        return number, whole, path, rest

    assert call(np.float32(0.5), np.int64(3), "a")[1:3] == (3, Path("a"))  # type: ignore[arg-type]
    assert call(1, 2, None, "rest")[3] == ("rest",)  # type: ignore[arg-type]
    assert call(torch.tensor(0.5), torch.tensor(3), Path("b"))  # type: ignore[arg-type]
    for bad in (("a",), (0.5, 1.5), (0.5, 1, b"x"), (torch.ones(2),), (1j,)):
        with pytest.raises(KindError, match=r"call \w+: expected .*, got "):
            call(*bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64 bits"):
        call(10**400)
    with pytest.raises(TypeError, match="missing"):
        call()  # type: ignore[call-arg]
    with pytest.raises(KindError, match=r"masks\['0'\]: expected Tensor, got a int"):
        sc.remask_(sc.sparsify_(mlp()), {"0": 3})  # type: ignore[dict-item]


def test_a_wrong_kind_is_said_before_anything_is_changed() -> None:
    model, found = sc.sparsify_(mlp()), ticket()
    before = tensors_of(model)
    wrong = {name: mask.float() for name, mask in found.masks.items()}
    with pytest.raises((ValueError, TypeError)):
        sc.Ticket(wrong, {k: v + 1 for k, v in found.weights.items()}).apply_(model)
    assert equal(tensors_of(model), before)


def test_lists_in_frozen_values() -> None:
    assert hash(Recipe(milestones=[0.5])) == hash(Recipe(milestones=(0.5,)))  # type: ignore[arg-type]
    assert Recipe(milestones=[0.5]) == Recipe(milestones=(0.5,))  # type: ignore[arg-type]
    assert hash(sc.SET(Recipe(milestones=[0.5]), 2))  # type: ignore[arg-type]
    check_fields(Recipe())


# --- Modes of autograd -------------------------------------------------------------------------------


def assert_trains(model: nn.Module, x: Tensor | None = None) -> None:
    """Nothing of a model was made in inference mode, and it learns, copies and saves."""
    x = randn(8, 12) if x is None else x
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert not t.is_inference(), name
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    with torch.random.fork_rng(devices=[]):  # of dropout
        model(x).sum().backward()
        optimizer.step()
        other = copy.deepcopy(model)
        other.load_state_dict(model.state_dict())
        other(x).sum().backward()


modes = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])


@modes
@pytest.mark.parametrize("plan", ["mask", "state", "csr"])
def test_what_is_applied_and_planned_in_a_mode_trains(
    mode: Any, plan: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))
    found, model = ticket(), sc.sparsify_(mlp())
    others = {name: ~mask for name, mask in found.masks.items()}
    for change in (
        lambda: found.apply_(model, plan=plan),
        lambda: sc.remask_(model, others),
        lambda: sc.plan_(model, "mask"),
        lambda: sc.plan_(model, plan),
        lambda: sc.plan_(model, "mask"),
        lambda: sc.densify_(model),
        lambda: sc.sparsify_(model),
        lambda: found.shuffled(0).apply_(model),
    ):
        with mode():
            change()
        assert_trains(model)


@modes
def test_an_example_made_in_a_mode(
    mode: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))
    model, found = sc.sparsify_(mlp()), ticket()
    with mode():
        found.apply_(model, randn(8, 12), plan="auto")
    assert_trains(model)


@modes
def test_layers_made_and_changed_in_a_mode_train(mode: Any) -> None:
    model: Any = sc.sparsify_(mlp())
    masks = [rand(*layer.weight_shape) < 0.5 for layer in sc.sparse_layers(model).values()]
    for change in ("set_mask_", "plan_", "remask_", "unplan_"):
        with mode():
            for layer, mask in zip(sc.sparse_layers(model).values(), masks, strict=True):
                getattr(layer, change)(*([mask] if "mask_" in change else []))
        assert_trains(model)
    with mode():
        small = sc.compact(model, randn(2, 12))
        dense, model[0].pattern = model[0].to_dense(), Masked(masks[0].clone())
        model[2].pattern = Gated(model[2].weight_shape, Concrete(), density=0.5)  # pyright: ignore
    assert_trains(small.model)
    assert_trains(model)
    assert not dense.weight.is_inference()
    whole = seeded(lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)))
    with mode():
        sc.sparsify_(whole)
    assert not any(t.is_inference() for t in (*whole.parameters(), *whole.buffers()))


@modes
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_in_a_mode_finds_the_same_ticket(mode: Any, name: str) -> None:
    search, model = SEARCHES[name], dropping()
    with mode():
        made = [(x.clone(), y.clone()) for x, y in batches()]
        found = search(model, made, sparsity=0.5)
    assert found.hash == search(dropping(), batches(), sparsity=0.5).hash
    assert found.hash == search(dropping(), made, sparsity=0.5).hash
    assert_trains(model)
    assert_trains(found.apply_(dropping()))


@modes
def test_training_in_a_mode(mode: Any) -> None:
    model: Any = dropping()
    alone: Any = dropping()
    with mode():
        sc.train(model, Blobs(), Blobs(), Recipe(lr=0.05, epochs=1))
        sc.evaluate(model, Blobs())
        sc.recompute_statistics_(model, Blobs())
    sc.train(alone, Blobs(), Blobs(), Recipe(lr=0.05, epochs=1))
    assert torch.equal(model[0].weight, alone[0].weight)
    assert_trains(model)


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        dense, model = mlp(), mlp()
    for call in (
        lambda: sc.sparsify_(dense),
        lambda: sc.train(model, Blobs(), None, Recipe(epochs=1)),
    ):
        with pytest.raises(ValueError, match=r"made under torch\.inference_mode\(\)"):
            call()


@pytest.mark.parametrize("name", SEARCHES)
def test_models_without_values_or_with_complex_ones(name: str) -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        SEARCHES[name](sc.sparsify_(mlp().to("meta")), batches(), sparsity=0.5)

    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 8, dtype=torch.complex64), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.to(torch.complex64)).abs())

    model = sc.sparsify_(seeded(Waves))
    before = tensors_of(model)
    try:
        SEARCHES[name](model, batches(), sparsity=0.5)
    except ValueError as error:
        assert "complex" in str(error)
    assert equal(tensors_of(model), before)


# --- Copies ------------------------------------------------------------------------------------------


def test_tickets_copied_and_changed_afterwards() -> None:
    found = SEARCHES["cts"](dropping(), batches(), sparsity=0.5)
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.hash == found.hash and other.meta == found.meta and other != found
        assert hash(other)
    for plan in ("mask", "state", "csr"):
        mine = copy.deepcopy(found)
        model = mine.apply_(dropping(), plan=plan).eval()
        before, y = tensors_of(model), model(randn(4, 12))
        for tensors in (mine.masks, mine.weights):
            for t in tensors.values():
                t.zero_()
        mine.meta["granularity"] = "channel"
        assert equal(tensors_of(model), before) and torch.equal(model(randn(4, 12)), y)


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_are_values(name: str) -> None:
    search = SEARCHES[name]
    for other in (copy.copy(search), copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
        assert other == search and hash(other) == hash(search)
