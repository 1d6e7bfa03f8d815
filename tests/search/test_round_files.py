"""Rounds on disk: a search that dies anywhere and goes on; full disks, damaged and foreign files."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers import Blobs, mlp, seeded
from rewinds import RECIPE, SEARCH, Killed, Stops, batchnorm_net, same, small, under
from torch import nn

import sparsecore as sc
from sparsecore import safefile
from sparsecore.granularity import Block
from sparsecore.rounds import Round, RoundError, load_rounds, round_path
from sparsecore.search import SearchError, rewinding
from sparsecore.training import train


def tied(*args, **options):
    """Training after which all magnitudes tie, as those rounded to bfloat16 often do."""
    history = train(*args, **options)
    with torch.no_grad():
        for p in args[0].parameters():
            p.copy_(torch.where(p == 0, p, 0.25 * p.sign()))
    return history


@pytest.mark.parametrize("rewind", ["weights", "learning-rate"])
@pytest.mark.parametrize("noted", [True, False], ids=["noted", "older files"])
def test_rounds_from_files_keep_the_models_order_of_layers(
    noted: bool, rewind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal magnitudes go to the earlier layer, whose name need not be the first in the alphabet."""
    made = lambda: nn.Sequential(  # noqa: E731
        OrderedDict(z=nn.Linear(12, 8), relu=nn.ReLU(), m=nn.Linear(8, 8), a=nn.Linear(8, 4))
    )
    model = sc.sparsify_(seeded(made))
    monkeypatch.setattr(rewinding, "train", tied)
    search = replace(SEARCH, epochs=1, rewind=rewind, rate=0.3)
    expected = search(model, Blobs(), sparsity=0.6)
    kept = replace(search, rounds=tmp_path)
    kept(model, Blobs(), sparsity=0.4)  # the first rounds, which the next search reads
    if not noted:
        for path in tmp_path.iterdir():
            tensors, meta = safefile.read(path, kind="round")
            del meta["layers"]
            safefile.write(path, tensors, meta, kind="round")
    found = kept(model, Blobs(), sparsity=0.6)
    assert found.hash == expected.hash and same(found.weights, expected.weights)
    assert list(found.masks) == list(found.scores) == ["z", "m", "a"]
    if noted:
        assert all(list(r.masks) == ["z", "m", "a"] for r in load_rounds(tmp_path))


def dying(call: Callable, at: int, when: str) -> Callable:
    """`call`, which the process does not survive the `at`-th time."""
    calls = count()

    def counted(*args, **options):
        if str(args[0]).endswith("-lock"):
            return call(*args, **options)
        dies = next(calls) == at
        if dies and when == "before":
            raise Killed
        result = call(*args, **options)
        if dies:
            raise Killed
        return result

    return counted


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["write", "unlink", "train"])
@pytest.mark.parametrize(("keeps", "rewind"), [(False, "weights"), (True, "learning-rate")])
def test_killed_anywhere_it_goes_on_to_the_same_ticket(
    what: str, when: str, keeps: bool, rewind: str, tmp_path: Path
) -> None:
    model, blobs = batchnorm_net(), Blobs()
    search = replace(SEARCH, epochs=1.5, rewind=rewind)
    expected = search(model, blobs, sparsity=0.4)
    owner, name = {
        "write": (safefile, "write"), "unlink": (Path, "unlink"), "train": (rewinding, "train"),
    }[what]  # fmt: skip
    for at in count():
        folder, checkpoint = tmp_path / f"rounds-{at}", tmp_path / f"checkpoint-{at}"
        found, died = replace(search, rounds=folder if keeps else None), False
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, dying(getattr(owner, name), at, when))
                ticket = found(model, blobs, sparsity=0.4, checkpoint=checkpoint)
                ticket.save(tmp_path / "ticket")
        except Killed:
            died = True
            ticket = found(model, blobs, sparsity=0.4, checkpoint=checkpoint)
            ticket.save(tmp_path / "ticket")
        assert ticket.hash == expected.hash and same(ticket.weights, expected.weights)
        assert not checkpoint.exists()
        assert not keeps or len(load_rounds(folder)) == len(list(folder.iterdir())) == 3
        if not died:
            break
    # Three rounds, of which each writes two checkpoints and itself; and the ticket.
    assert at == {"write": 10, "unlink": 3 if keeps else 6, "train": 3}[what]


def test_killed_inside_a_round_it_takes_up_the_last_epoch(tmp_path: Path) -> None:
    model, checkpoint = small(), tmp_path / "deep" / "checkpoint"
    expected = SEARCH(model, Blobs(), sparsity=0.4)
    # A batch for each fingerprint, 8 a round: dies in the last epoch of the third of three
    with pytest.raises(Killed):
        SEARCH(model, Stops(1 + 9 + 9 + 7), sparsity=0.4, checkpoint=checkpoint)
    names = sorted(p.name for p in checkpoint.iterdir())
    assert names == [
        "round-0000.safetensors", "round-0001.safetensors", "training-0002.safetensors",
    ]  # fmt: skip
    left = Stops(2 + 4)  # the fingerprints, and the one epoch that is left
    assert SEARCH(model, left, sparsity=0.4, checkpoint=checkpoint).hash == expected.hash
    assert left.left == 0


@pytest.mark.parametrize(
    "other",
    [
        lambda s, m: (replace(s, recipe=replace(RECIPE, lr=0.02)), m, Blobs()),
        lambda s, m: (replace(s, rate=0.3), m, Blobs()),
        lambda s, m: (replace(s, seed=1), m, Blobs()),
        lambda s, m: (replace(s, epochs=3), m, Blobs()),
        lambda s, m: (replace(s, start_epoch=1), m, Blobs()),
        lambda s, m: (replace(s, rewind="learning-rate"), m, Blobs()),
        lambda s, m: (replace(s, granularity=Block(2, 2)), m, Blobs()),
        lambda s, m: (s, sc.sparsify_(mlp(seed=1)), Blobs()),
        lambda s, m: (s, m, Blobs(batch=32)),
    ],
    ids=["recipe", "rate", "seed", "epochs", "start", "rewind", "granularity", "weights", "data"],
)
def test_another_run_s_folder_is_refused(other: Callable, tmp_path: Path) -> None:
    folder, model = tmp_path / "rounds", small()
    search = replace(SEARCH, rounds=folder)
    search(model, Blobs(), sparsity=0.2)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    changed, model, blobs = other(search, model)
    with pytest.raises(SearchError, match="belongs to another run"):
        changed(model, blobs, sparsity=0.2)
    assert before == {p: p.read_bytes() for p in folder.iterdir()}


def test_another_run_s_unfinished_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        SEARCH(small(), Stops(2 + 6), sparsity=0.2, checkpoint=tmp_path)
    with pytest.raises(SearchError, match=r"round 0: .* belongs to another run"):
        replace(SEARCH, seed=1)(small(), Blobs(), sparsity=0.2, checkpoint=tmp_path)


def test_a_file_in_the_folder_s_place_is_refused_before_anything_begins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("something else")
    for search, options in (
        (SEARCH, {"checkpoint": path}),
        (replace(SEARCH, rounds=path), {}),
    ):
        with pytest.raises(SearchError, match="expected a folder"):
            search(small(), Stops(0), sparsity=0.4, **options)
    assert path.read_text() == "something else"


def test_a_full_disk_loses_no_finished_round(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint = small(), folder / "checkpoint"
    search = replace(SEARCH, rounds=folder)
    expected = SEARCH(model, Blobs(), sparsity=0.6)

    def full(path: Path, *args, **options) -> None:
        if "0002" in path.name:
            raise safefile.FileError(f"{path} could not be written: No space left on device")
        write(path, *args, **options)

    write = safefile.write
    monkeypatch.setattr(safefile, "write", full)
    for options in ({"checkpoint": checkpoint}, {}):
        with pytest.raises(SearchError, match=r"0002.* No space left .* make room"):
            search(model, Blobs(), sparsity=0.6, **options)
        assert [r.index for r in load_rounds(folder)] == [0, 1]
    monkeypatch.undo()
    # No round is trained again: three are left of five, and the search's fingerprint.
    assert search(model, Stops(1 + 3 * 8), sparsity=0.6).hash == expected.hash


def test_damaged_and_misplaced_rounds_are_told_with_the_mend(folder: Path) -> None:
    model, search = small(), replace(SEARCH, rounds=folder)
    expected = search(model, Blobs(), sparsity=0.6)
    paths = [round_path(folder, i) for i in range(5)]
    good = [p.read_bytes() for p in paths]

    def refused(match: str) -> None:
        with pytest.raises(SearchError, match=match):
            search(model, Blobs(), sparsity=0.6)

    for junk in (b"", b"junk", good[2][:-9], good[2][:-1] + bytes([good[2][-1] ^ 1])):
        paths[2].write_bytes(junk)
        refused(r"round-0002.* is no usable round .*; remove it and the rounds after it")
        with pytest.raises(RoundError, match=r"round-0002.* is no usable round"):
            load_rounds(folder)
    paths[2].unlink()
    refused(r"round-0002.* is missing among 4 rounds; put it back")
    with pytest.raises(RoundError, match=r"round-0002.* is missing"):
        load_rounds(folder)
    paths[2].write_bytes(good[3])
    refused(r"round-0002.* does not follow from the round before it")
    with pytest.raises(RoundError, match=r"round-0002.*: expected round 2 of .*, got round 3"):
        load_rounds(folder)
    paths[2].write_bytes(good[2])
    other = {n: m.flip(0) for n, m in Round.load(paths[2]).masks.items()}
    replace(Round.load(paths[2]), masks=other).save(paths[2])
    refused(r"round-0002.* does not follow from the round before it")
    for path in paths[2:]:
        path.unlink()
    paths[1].with_name(paths[1].name + "x7_h").write_bytes(b"half")  # a kill while writing
    assert search(model, Blobs(), sparsity=0.6).hash == expected.hash
    assert len(load_rounds(folder)) == 5


def test_a_damaged_training_is_told_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        SEARCH(small(), Stops(8), sparsity=0.4, checkpoint=tmp_path)
    path = tmp_path / "training-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SearchError, match=r"training-0000.*; make room, or remove a damaged file"):
        SEARCH(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path)
    path.unlink()
    ticket = SEARCH(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path)
    assert ticket.hash == SEARCH(small(), Blobs(), sparsity=0.4).hash


def test_removing_the_checkpoint_leaves_what_is_not_the_search_s(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    ticket = tmp_path.with_name(tmp_path.name + "-ticket")
    SEARCH(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path).save(ticket)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    # One folder for both: the rounds stay.
    search = replace(SEARCH, rounds=tmp_path)
    search(small(), Blobs(), sparsity=0.4, checkpoint=tmp_path).save(ticket)
    assert len(load_rounds(tmp_path)) == 3 and len(list(tmp_path.iterdir())) == 4


def test_rounds_round_trip(folder: Path) -> None:
    folder.mkdir()
    state = {"weight": torch.tensor([[1.5, -0.0, 3.0]]), "count": torch.tensor(7)}
    mask = torch.tensor([[True, False, True]])
    for accuracy in (None, 91.25):
        path = folder / "a round"
        given = Round(3, 0.5, {"": mask}, state, under({}, state), 2.5, accuracy, "run")
        given.save(path)
        found = Round.load(path)
        assert replace(found, masks={}, start={}, trained={}) == replace(
            given, masks={}, start={}, trained={}
        )
        assert torch.equal(found.masks[""], mask)
        assert same(found.start, state) and same(found.trained, state)
        assert torch.equal(found.weights()[""], state["weight"])
    with pytest.raises(RoundError, match="found none; a search keeps them"):
        load_rounds(folder)
    with pytest.raises(RoundError, match="found none"):
        load_rounds(folder / "nowhere")
    with pytest.raises(RoundError, match="found nothing there"):
        Round.load(folder / "nowhere")
    with pytest.raises(RoundError, match="could not be written"):
        given.save(folder / "nowhere" / "r")
    for index, run in enumerate(("one", "other")):
        replace(given, index=index, run=run).save(round_path(folder, index))
    with pytest.raises(RoundError, match="of the run one, got round 1 of other"):
        load_rounds(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"masks": {"a": torch.ones(2, 3, dtype=torch.bool)}},
        {"masks": {"": torch.ones(3, dtype=torch.bool)}},
        {"masks": {}},
        {"trained": {"weight": torch.zeros(2, 2)}},
        {"index": "1"},
        {"density": None},
        {"run": 5},
    ],
    ids=str,
)
def test_rounds_that_do_not_hang_together_are_refused(change: dict, tmp_path: Path) -> None:
    state = {"weight": torch.zeros(2, 3)}
    good = Round(0, 1.0, {"": torch.ones(2, 3).bool()}, state, state, 1.0, None, "run")
    replace(good, **change).save(tmp_path / "r")
    with pytest.raises(RoundError, match="no usable round"):
        Round.load(tmp_path / "r")


def test_a_repelled_search_killed_between_rounds_knows_the_earlier_optima(tmp_path: Path) -> None:
    search = replace(SEARCH, repel=2.0)
    expected = search(small(), Blobs(), sparsity=0.5)
    first = replace(search, rounds=tmp_path)
    first(small(), Blobs(), sparsity=0.2)  # one round, kept
    assert first(small(), Blobs(), sparsity=0.5).hash == expected.hash
