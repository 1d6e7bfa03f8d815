"""A comparison that dies anywhere, on a full disk, or on data that end early: no finished cell is lost."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Blobs, mlp

import sparsecore as sc
from sparsecore import cells, compare, data, experiment, safefile, unsaved, writing
from sparsecore.batches import DataEnded
from sparsecore.compare import Comparison
from sparsecore.experiment import Setup
from sparsecore.recipes import recipe_for
from sparsecore.search import (
    ContinuousSparsification,
    EdgePopup,
    GradualMagnitude,
    JointSearch,
    Rewinding,
    SearchError,
)
from sparsecore.training import Recipe
from sparsecore.writing import FileError

METHODS = [
    "joint:epochs=2",
    "ltr:rate=0.4",
    "synflow:rounds=3",
    "edge-popup:epochs=1",
    "joint:epochs=2+shuffle",
]
SETUP = Setup(
    "lenet-300-100", "digits", recipe_for("lenet-300-100"), {"width": 0.05}, rewind_epochs=1,
    train_epochs=2, train_samples=400,
)  # fmt: skip


def run(folder: Path, seeds: int = 1) -> dict[str, tuple[str, str]]:
    """Accuracy and kept weights of each cell."""
    comparison = Comparison(folder, SETUP)
    dataset = experiment.data_of(SETUP)
    comparison.run(dataset, METHODS, [0.5], range(seeds), torch.device("cpu"))
    return {key: (row["accuracy"], row["kept_weights"]) for key, row in comparison.rows.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return run(tmp_path_factory.mktemp("whole"))


def failing(call: Callable, at: int, error: BaseException) -> Callable:
    """`call` that fails once, at its call number `at`."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise error
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14, 20, 27, 33])
def test_killed_anywhere_it_goes_on_to_the_same_rows(
    at: int, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = data.Batches.epoch
    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "epoch", failing(epoch, at, KeyboardInterrupt()))
        patch.setattr(data.Batches, "plan", failing(data.Batches.plan, at, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert run(tmp_path) == expected


def test_killed_once_a_ticket_is_written_its_checkpoint_goes_with_the_next_run(
    expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            unsaved.Unsaved, "saved", failing(unsaved.Unsaved.saved, 1, KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert list(tmp_path.glob("tickets/*.checkpoint"))
    assert run(tmp_path) == expected
    assert not list(tmp_path.glob("tickets/*.checkpoint"))


@pytest.mark.parametrize("at", [1, 3, 4, 8, 12])
def test_a_full_disk_loses_nothing_that_was_finished(
    at: int, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = safefile.FileError("the file could not be written: No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(safefile, "write", failing(safefile.write, at, full))
        with pytest.raises(ValueError, match="No space left"):
            run(tmp_path)
        done = dict(Comparison(tmp_path, SETUP).rows)
    assert run(tmp_path) == expected
    assert all(Comparison(tmp_path, SETUP).rows[key] == row for key, row in done.items())


def test_a_disk_that_fills_up_in_the_middle_of_a_row(
    expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Comparison._append

    def half(self: Comparison, row: dict[str, str]) -> None:
        append(self, row)
        if row["method"] == "ltr:rate=0.4":
            path = self.folder / "results.csv"
            path.write_text(path.read_text()[:-9])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_append", half)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)
    assert run(tmp_path) == expected


class Short(Blobs):
    """Data that end after two of four batches."""

    def epoch(self, index: int):
        batches = super().epoch(index)
        return (next(batches) for _ in range(2))


@pytest.mark.parametrize(
    "search",
    [
        sc.ConcreteSearch(),
        JointSearch(),
        EdgePopup(epochs=1),
        ContinuousSparsification(),
        Rewinding(Recipe(), epochs=1),
        GradualMagnitude(Recipe(), epochs=1),
    ],
    ids=lambda s: type(s).__name__,
)
def test_data_that_end_early_are_told(search) -> None:
    model = sc.sparsify_(mlp())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((DataEnded, SearchError), match=r"expected 4 batches.*ended after 2"):
        search(model, Short(), sparsity=0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_older_folder_goes_on(tmp_path: Path, expected: dict) -> None:
    run(tmp_path)
    path = tmp_path / "setup.json"
    known = json.loads(path.read_text())
    del known["search_lr"]  # a field that its version did not have
    path.write_text(json.dumps(known))
    assert run(tmp_path) == expected
    path.write_text(json.dumps(known | {"search_batch": 64}))
    with pytest.raises(ValueError, match=r"another setup \(different: search_batch"):
        run(tmp_path)


@pytest.mark.parametrize("name", ["setup.json", "results.csv"])
def test_small_files_are_whole_or_not_there(
    name: str, tmp_path: Path, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = writing.put

    def full(path: Path, data: bytes) -> None:
        def fails(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if path.name == name:
                patch.setattr(writing.os, "fsync", fails)
            put(path, data)

    with monkeypatch.context() as patch:
        for module in (compare, cells):
            patch.setattr(module, "put", full)
        with pytest.raises(FileError, match=f"{name} could not be written: No space left"):
            run(tmp_path)
    assert not (tmp_path / name).exists()
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]
    assert run(tmp_path) == expected


def test_one_process_at_a_time_goes_on_with_a_folder(tmp_path: Path, expected: dict) -> None:
    script = (
        "import sys; from pathlib import Path; from sparsecore.locks import held\n"
        "with held(Path(sys.argv[1])):\n    print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, tmp_path / "results.csv"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None and other.stdout is not None
    other.stdout.readline()
    with pytest.raises(FileError, match=f"results.csv: in use by process {other.pid} on"):
        run(tmp_path)
    other.stdin.close()
    other.wait()
    assert run(tmp_path) == expected


@pytest.mark.parametrize(
    "row",
    [
        "snip,0.9,0,nan,1,1,1,cpu,2",
        "snip,0.9,0,101,1,1,1,cpu,2",
        "snip,1.5,0,90,1,1,1,cpu,2",
        "snip,0.9,0.5,90,1,1,1,cpu,2",
        "snip,0.9,0,90,-1,1,1,cpu,2",
        "snip,0.9,0,90,1,inf,1,cpu,2",
        "snip,0.9,0,90",
        "snip,0.9,0,90,1,1,1,cpu,2,more",
        ",,,90,,,,,",
        "x" * 200_000,
        "\ufffd\0",
    ],
    ids=range(11),
)
def test_rows_of_others_are_refused(row: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(",".join(cells.FIELDS) + "\n" + row + "\n")
    before = path.read_bytes()
    with pytest.raises(FileError, match="row of a comparison in line 2"):
        Comparison(tmp_path, SETUP)
    assert path.read_bytes() == before


def without(folder: Path, method: str) -> None:
    """As if killed before its rows."""
    rows = folder / "results.csv"
    rows.write_text("".join(x for x in rows.read_text().splitlines(True) if method not in x))


def test_a_ticket_of_another_search_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = next(p for p in (tmp_path / "tickets").iterdir() if p.name.startswith("synflow"))
    ticket = sc.Ticket.load(path)
    without(tmp_path, "synflow")
    other = ticket.meta["setup"] | {"model": "lenet-300-100", "search_batch": 17}
    differing = [{"seed": 1}, {"sparsity": 0.9}, {"data_digest": "0" * 64}]
    for meta in ({"setup": other}, {"search": "random"}, {"search_seconds": "1"}, *differing):
        replace(ticket, meta=ticket.meta | meta).save(path)
        with pytest.raises(FileError, match="expected"):
            run(tmp_path)
    ticket.save(path)
    run(tmp_path)


@pytest.mark.parametrize(
    "facts", [{}, {"seed": 1}, {"epochs": 2}, {"data_digest": "0" * 64}, {"setup": {}}]
)
def test_a_rewind_point_of_another_run_is_refused(facts: dict, tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "rewind-1-0.safetensors"
    tensors, meta = safefile.read(path, kind="weights")
    without(tmp_path, "dense")
    safefile.write(path, tensors, meta | facts if facts else {}, kind="weights")
    with pytest.raises(
        FileError,
        match="expected the rewind point of this comparison and seed 0, got another; remove",
    ):
        run(tmp_path)
    path.unlink()
    run(tmp_path)


def test_a_method_that_no_file_could_be_called_by_is_told_before_all_others(tmp_path: Path) -> None:
    comparison = Comparison(tmp_path, SETUP)
    method = "ltr:rate=0.4" + "0" * 200
    with pytest.raises(
        ValueError, match=r"methods: expected at most 180 bytes.*got 212 for ltr:rate=0\.400"
    ):
        comparison.run(
            experiment.data_of(SETUP), ["random", method], [0.5], [0], torch.device("cpu")
        )
    assert not comparison.rows and not [*tmp_path.glob("rewind-*")]


def test_a_folder_that_another_setup_has_taken_by_then_is_refused(tmp_path: Path) -> None:
    """Both began when there was none."""
    dataset, device = experiment.data_of(SETUP), torch.device("cpu")
    first, second = (
        Comparison(tmp_path, SETUP),
        Comparison(tmp_path, replace(SETUP, search_batch=64)),
    )
    first.run(dataset, ["random"], [0.5], [0], device)
    before = (tmp_path / "setup.json").read_bytes()
    with pytest.raises(ValueError, match=r"another setup \(different: search_batch"):
        second.run(dataset, ["random"], [0.5], [0], device)
    assert (tmp_path / "setup.json").read_bytes() == before
