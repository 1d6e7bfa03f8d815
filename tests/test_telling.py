"""What a search and `apply_` tell of a ticket, once each, and what the command line makes of it."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Blobs, generator, mlp, seeded
from torch import nn

import sparsecore as sc
from sparsecore import telling
from sparsecore.cli import main
from sparsecore.gates import HardConcrete
from sparsecore.scores import magnitude, random, snip
from sparsecore.search import Search, SearchError
from sparsecore.tickets import Ticket, dense_state


def told(call) -> list[str]:
    """The SparsityWarnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, sc.SparsityWarning)]


def uneven() -> nn.Module:
    """A network whose last layer has far smaller weights than its first."""
    model = sc.sparsify_(mlp())
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    return model


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.used(x).relu())


ADAM = sc.Recipe(optimizer="adam", lr=1e-2)
SEARCHES: dict[str, Search] = {
    "snip": sc.OneShot(snip),
    "grasp": sc.OneShot(sc.scores.grasp),
    "synflow": sc.Iterative(rounds=2),
    "iterative-snip": sc.Iterative(snip, rounds=2),
    "cts": sc.ConcreteSearch(epochs=2),
    "joint": sc.JointSearch(epochs=2),
    "strong": sc.StrongSearch(epochs=2),
    "continuous": sc.ContinuousSparsification(epochs=2),
    "edge-popup": sc.EdgePopup(epochs=1),
    "edge-popup without momentum": sc.EdgePopup(epochs=1, momentum=0),
    "rewinding": sc.Rewinding(ADAM, 1, rate=0.5),
    "learning rate": sc.Rewinding(sc.Recipe(lr=0.01), 1, rate=0.5, rewind="learning-rate"),
    "set": sc.SET(ADAM, 2),
    "rigl": sc.RigL(ADAM, 2, interval=2),
    "gradual": sc.GradualMagnitude(ADAM, 2, updates=3),
    "gradual, rewound": sc.GradualMagnitude(ADAM, 2, updates=3, rewind=True),
}


def test_an_empty_layer_is_told_by_the_search_or_else_by_the_first_application(
    tmp_path: Path,
) -> None:
    model = uneven()
    search = lambda: sc.OneShot(magnitude)(model, Blobs(), sparsity=0.5)  # noqa: E731
    (text,) = (t for t in told(search) if "keeps nothing" in t)
    assert text.startswith("layer '2' keeps nothing: the output is the bias alone")
    ticket = search()
    assert not told(lambda: ticket.apply_(model))
    # Another ticket is another event, though it be equal.
    ticket.save(tmp_path / "ticket")
    for other in (replace(ticket), Ticket.load(tmp_path / "ticket")):
        assert any("layer '2' keeps nothing" in t for t in told(lambda t=other: t.apply_(model)))
        assert not told(lambda t=other: t.apply_(model))
    ticket, frozen = search(), sc.sparsify_(mlp())
    frozen[0].raw_weight.requires_grad_(False)
    (text,) = told(lambda: ticket.apply_(frozen))  # which its search could not know
    assert "'0' is frozen" in text


@pytest.mark.parametrize("name", ["joint", "rewinding", "edge-popup", "gradual", "snip"])
def test_what_a_search_has_told_is_not_told_again(name: str) -> None:
    search = SEARCHES[name]
    tickets = []
    model = uneven()
    assert told(lambda: tickets.append(search(model, Blobs(), sparsity=0.95)))
    assert not told(lambda: tickets[0].apply_(model))


def test_where_the_warning_points() -> None:
    model = uneven()
    with pytest.warns(sc.SparsityWarning) as caught:
        ticket = sc.OneShot(magnitude)(model, Blobs(), sparsity=0.5)
        ticket.apply_(model)
    assert {w.filename for w in caught} == {__file__}


def test_units_cut_off() -> None:
    model = sc.sparsify_(mlp())
    masks = {
        n: torch.ones(layer.weight_shape, dtype=torch.bool)
        for n, layer in sc.sparse_layers(model).items()
    }
    ticket = Ticket(masks, dense_state(model))
    assert not told(lambda: ticket.apply_(model))
    masks["0"][3:5] = False
    (text,) = told(lambda: Ticket(masks, dense_state(model)).apply_(model))
    assert text.startswith("units cut off: 2 of 24 of '0' keep no weight")


class Conv1D(nn.Module):
    """Hugging Face's, which is known by its name: a linear layer with its weight as [inputs, outputs]."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = (
            nn.Parameter(torch.ones(nx, nf)),
            nn.Parameter(torch.zeros(nf)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class OfAKind(nn.ConvTranspose2d):
    """A subclass of a user's."""


IMAGE, SERIES, VOLUME = (torch.randn(1, 4, *[3] * d, generator=generator(d)) for d in (2, 1, 3))
OUTPUTS = {
    "linear": (lambda: nn.Linear(4, 6), IMAGE),
    "conv": (lambda: nn.Conv2d(4, 6, 3), IMAGE),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), SERIES),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3), IMAGE),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), VOLUME),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGE),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), IMAGE),
    "subclass": (lambda: OfAKind(4, 6, 3, groups=2), IMAGE),
    "conv1d of hugging face": (lambda: Conv1D(6, 4), torch.ones(2, 4)),
    "embedding": (lambda: nn.Embedding(4, 6), torch.arange(4)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_unit_cut_off_is_one_that_gives_its_bias_alone(name: str) -> None:
    """Whatever a slice of the mask is called: what is told is what the layer computes."""
    build, x = OUTPUTS[name]
    if name == "linear":
        x = x.movedim(1, -1)
    model = sc.sparsify_(nn.Sequential(seeded(build)), ["0"])
    shape, start = sc.sparse_layers(model)["0"].weight_shape, dense_state(model)
    axis = -1 if name in ("linear", "conv1d of hugging face", "embedding") else 1
    for dimension in (0, 1):
        for index in range(shape[dimension]):
            mask = torch.ones(shape, dtype=torch.bool)
            mask.select(dimension, index)[:] = False
            if not mask.any():
                continue
            found = told(lambda m=mask: Ticket({"0": m}, start).apply_(model))
            with torch.no_grad():
                units = model(x).movedim(axis, 0).flatten(1)
            bias = getattr(model[0], "bias", torch.zeros(len(units)))
            dead = int((units == bias[:, None]).all(1).sum())
            expected = [f"units cut off: {dead} of {len(units)} of '0' keep no weight"] * bool(dead)
            assert [text[: text.index(" and give")] for text in found] == expected


def test_units_of_a_weight_that_is_shared_are_those_of_each_layer() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)))
    model[1].weight = model[0].weight
    sc.sparsify_(model)
    (name,) = sc.sparse_layers(model)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[2] = False
    (text,) = told(lambda: Ticket({name: mask}, dense_state(model)).apply_(model))
    assert text.startswith("units cut off: 1 of 5 of '1' keep no weight")


def test_frozen_layers_that_a_ticket_prunes() -> None:
    model = sc.sparsify_(mlp())
    model[0].raw_weight.requires_grad_(False)
    ticket = sc.OneShot(random)(model, Blobs(), sparsity=0.3)
    (text,) = told(lambda: replace(ticket).apply_(model))
    assert text.startswith("layer '0' is frozen (requires_grad=False) and pruned")
    assert any(
        "'0' is frozen" in t for t in told(lambda: sc.OneShot(random)(model, Blobs(), sparsity=0.3))
    )
    finished = replace(ticket, meta=ticket.meta | {"finished": True})
    assert not told(lambda: finished.apply_(model))  # is not to be trained
    model.requires_grad_(False)
    assert not told(lambda: replace(ticket).apply_(model))  # a network for evaluation


@pytest.mark.parametrize("name", SEARCHES)
def test_layers_that_the_forward_never_calls(name: str) -> None:
    model = sc.sparsify_(seeded(Unused))
    found = told(lambda: SEARCHES[name](model, Blobs(), sparsity=0.5))
    assert len([t for t in found if t.startswith("layer 'spare' took no part in the search")]) == 1
    assert not any("'used'" in t or "'head'" in t for t in found if "took no part" in t)


class Sometimes(Unused):
    """A layer that is left out of every second forward, and one whose weights are alike."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.used(x).relu()
        self.calls += 1
        return self.head(self.spare(h) if self.calls % 2 else h)


@pytest.mark.parametrize("name", ["iterative-snip", "rewinding", "rigl", "edge-popup"])
def test_layers_that_are_called_at_all_take_part(name: str) -> None:
    model = sc.sparsify_(seeded(Sometimes))
    with torch.no_grad():
        model.head.weight.fill_(0.1)
    found = told(lambda: SEARCHES[name](model, Blobs(), sparsity=0.5))
    assert not any("took no part" in t for t in found)


class HeldElsewhere(nn.Module):
    """Calls its layers from a list, as they were before `sparsify_`."""

    def __init__(self, through: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.through = nn.Linear(12, 8), nn.Linear(8, 4), through
        self.layers = [self.a, self.b]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (self.a, self.b) if self.through else self.layers
        return b(a(x).relu())


@pytest.mark.parametrize("name", SEARCHES)
def test_forwards_around_the_sparse_layers_are_refused(name: str) -> None:
    model = sc.sparsify_(seeded(HeldElsewhere))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SearchError, match=r"in place of a, b.*nn\.ModuleList"):
        SEARCHES[name](model, Blobs(), sparsity=0.5)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *model.layers))


def test_a_list_that_the_forward_does_not_use_is_no_matter() -> None:
    model = sc.sparsify_(seeded(lambda: HeldElsewhere(through=True)))
    assert sc.OneShot(snip)(model, iter(Blobs().epoch(0)), sparsity=0.5, steps_per_epoch=4)


def ended(natural: float, asked: float) -> str | None:
    """What is told of a ticket whose gates ended so."""
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[: round(1000 * (1 - asked))] = True
    ticket = Ticket({"a": mask}, {"a.weight": torch.zeros(1000)}, {"natural_sparsity": natural})
    return telling.short_search(ticket)


@pytest.mark.parametrize(
    ("natural", "asked"),
    [(0.01, 0.5), (0.999, 0.5), (0.8, 0.5), (0.7, 0.9), (0.96, 0.9), (0.1, 0.4), (1.0, 0.9)],
)
def test_gates_that_ended_far_from_the_sparsity_are_told_of(natural: float, asked: float) -> None:
    text = ended(natural, asked)
    assert text is not None
    assert ("cuts what they still used" in text) == (natural < asked)


@pytest.mark.parametrize(
    ("natural", "asked"), [(0.5, 0.5), (0.4, 0.5), (0.7, 0.5), (0.85, 0.9), (0.94, 0.9), (0.3, 0.5)]
)
def test_gates_that_ended_near_it_are_not(natural: float, asked: float) -> None:
    assert ended(natural, asked) is None


def test_gates_that_ended_far_from_the_sparsity() -> None:
    search = sc.JointSearch(epochs=1, gate=HardConcrete(), lr=1e-4)
    model = sc.sparsify_(mlp())
    with pytest.warns(telling.ShortSearchWarning, match="the gates ended") as caught:
        search(model, Blobs(), sparsity=0.9)
    assert len([w for w in caught if w.category is telling.ShortSearchWarning]) == 1


def test_searches_within_searches_tell_once() -> None:
    """Rounds apply tickets, and a search for a penalty searches."""
    recipe = sc.Recipe(optimizer="adam", lr=1e-2)
    model = uneven()
    found = told(lambda: sc.Rewinding(recipe, epochs=1, rate=0.5)(model, Blobs(), sparsity=0.75))
    assert len([t for t in found if "nothing" in t]) <= 1
    assert len(found) == len(set(found))


def test_a_process_group_of_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    recipe = sc.Recipe(optimizer="adam", lr=1e-2)
    searches: list[Search] = [
        sc.OneShot(snip), sc.Iterative(), sc.ConcreteSearch(), sc.JointSearch(), sc.StrongSearch(), sc.EdgePopup(),
        sc.ContinuousSparsification(), sc.Rewinding(recipe, 1), sc.SET(recipe, 1), sc.RigL(recipe, 1),
        sc.GradualMagnitude(recipe, 1),
    ]  # fmt: skip
    model = sc.sparsify_(mlp())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for search in searches:
        with pytest.raises(
            SearchError, match="expected one process, got a process group of 2 ranks"
        ):
            search(model, Blobs(), sparsity=0.5)
    with pytest.raises(SearchError, match="2 ranks"):
        sc.ConcreteSearch().many(model, Blobs(), sparsities=[0.5, 0.6])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert sc.OneShot(snip)(model, Blobs(), sparsity=0.5)


def test_reprs_fit_a_line() -> None:
    model = sc.sparsify_(mlp())
    ticket = sc.OneShot(magnitude)(model, Blobs(), sparsity=0.5)
    assert repr(ticket) == "Ticket(magnitude: 192 of 384 weights in 2 layers, 50 % removed, weight)"
    assert len(repr(Ticket(ticket.masks, ticket.weights, {"method": ["odd"]}))) < 120


def test_the_command_line_has_a_line_each_and_info_fits_a_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "T.safetensors")
    command = [
        "search",
        "--model",
        "resnet-20",
        "--data",
        "digits",
        "--method",
        "snip",
        "--rewind-epochs",
        "0",
    ]
    assert main([*command, "--sparsity", "0.995", "--out", out]) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert (
        len(lines) == len(set(lines)) == 2 and "keep nothing" in lines[0] and "cut off" in lines[1]
    )
    assert "keep nothing" not in shown.out and "SparsityWarning" not in shown.err
    assert main(["info", out, "--json", str(tmp_path / "i.json")]) == 0
    shown = capsys.readouterr().out
    assert (
        len(shown.splitlines()) <= 45
        and "more" in shown
        and "keep nothing" in " ".join(shown.split())
    )
    assert (tmp_path / "i.json").read_text().count('"live_rows"') == 20
