"""What a call is given that it cannot take: one line of a documented error, and the model as it was."""

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, convolutional, equal, mlp, randn
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
    for made in (torch.tensor([0.5, 0.75]), np.array([0.5, 0.75])):
        assert Recipe(milestones=made) == Recipe(milestones=(0.5, 0.75))  # type: ignore[arg-type]
    assert hash(sc.SET(Recipe(milestones=[0.5]), 2))  # type: ignore[arg-type]
    check_fields(Recipe())


def test_facts_that_no_file_holds_are_named(tmp_path: Path) -> None:
    found = SEARCHES["magnitude"](sc.sparsify_(mlp()), Blobs(), sparsity=0.5)
    with pytest.raises(
        sc.TicketError, match=r"facts that JSON holds, got another under 'provenance\.where'"
    ):
        replace(found, meta=found.meta | {"where": tmp_path}).save(tmp_path / "t")


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
