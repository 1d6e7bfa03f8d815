"""`sparsecore analyze` as a user meets it: a table, a CSV file and a figure each."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest
from command_line import one_error

from sparsecore.analysed import labels_of
from sparsecore.cli import main
from sparsecore.tickets import Ticket

SEARCH = [
    "search", "--model", "lenet-300-100", "--model-option", "width=0.1", "--data", "digits", "--rewind-epochs",
    "1", "--epochs", "2", "--search-epochs", "2", "--search-batch", "256",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint ticket, watched, and one of rewinding with its rounds."""
    out = tmp_path_factory.mktemp("analyses")
    joint, ltr = out / "joint.safetensors", out / "ltr.safetensors"
    assert (
        main([*SEARCH, "--method", "joint", "--sparsity", "0.7", "--watch", "--out", str(joint)])
        == 0
    )
    rounds = ["--rounds", str(out / "rounds"), "--watch"]
    assert main([*SEARCH, "--method", "ltr", "--sparsity", "0.4", *rounds, "--out", str(ltr)]) == 0
    return out


def analysed(folder: Path, out: Path, *command: str) -> tuple[dict, list[dict[str, str]]]:
    """(JSON, CSV rows) of a command, after a look at its figures."""
    result = out / "r.json"
    assert main(["analyze", *command, "--out", str(out), "--json", str(result)]) == 0
    for picture in out.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    with (out / f"{command[0]}.csv").open() as file:
        return json.loads(result.read_text()), list(csv.DictReader(file))


def test_progress_layers_and_gates_of_a_search(folder: Path, tmp_path: Path) -> None:
    ticket = str(folder / "joint.safetensors")
    found, rows = analysed(folder, tmp_path, "progress", ticket)
    assert [r["epoch"] for r in rows] == ["1", "2"] and float(rows[1]["hard_accuracy"]) > 0
    assert 0 < float(rows[0]["sparsity 1"]) < 1
    found, rows = analysed(folder, tmp_path, "layers", ticket, str(folder / "ltr.safetensors"))
    assert len(rows) == 6 and {r["ticket"] for r in rows} == {"joint", "ltr"}
    loaded = Ticket.load(ticket)
    assert found["rows"][0]["sparsity"] == pytest.approx(loaded.layer_sparsities()["1"])
    found, rows = analysed(folder, tmp_path, "gates", ticket)
    for row in found["rows"]:
        assert row["gates"] == loaded.masks[row["layer"]].numel()
        assert row["closed"] + row["undecided"] + row["open"] == pytest.approx(1)
    assert {p.name for p in tmp_path.glob("*.png")} == {"progress.png", "layers.png", "gates.png"}


def test_tickets_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    for name in ("joint", "ltr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.safetensors").write_bytes(
            (folder / f"{name}.safetensors").read_bytes()
        )
    files = [str(tmp_path / name / "t.safetensors") for name in ("joint", "ltr")]
    found, rows = analysed(folder, tmp_path, "layers", *files, str(folder / "ltr.safetensors"))
    labels = ["joint/t.safetensors", "ltr/t.safetensors", "ltr"]
    assert list(dict.fromkeys(r["ticket"] for r in rows)) == labels and len(rows) == 9
    for label, path in zip(labels, [*files, folder / "ltr.safetensors"], strict=True):
        own = {r["layer"]: r["sparsity"] for r in found["rows"] if r["ticket"] == label}
        assert own == pytest.approx(Ticket.load(path).layer_sparsities())
    _, rows = analysed(folder, tmp_path, "layers", files[0], files[0])  # one ticket
    assert [r["ticket"] for r in rows] == ["t"] * 3


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/x.st", "b/y.st"], ["x", "y"]),
        (["x.st", "x.safetensors", "y"], ["x.st", "x.safetensors", "y"]),
        (["a/x.st", "b/x.st", "c/y"], ["a/x.st", "b/x.st", "y"]),
        (["a/x.st", "./a/../a/x.st"], ["x", "x"]),
        (["p/a/x", "q/a/x", "x.st"], ["p/a/x", "q/a/x", "x.st"]),
        (["/x", "/a/x", "/a/a/x"], ["/x", "/a/x", "a/a/x"]),
        (["x.st.st", "x.st", "a/x.st"], None),
        (["/x", "//x", "x"], None),
    ],
)
def test_labels_tell_files_apart(paths: list[str], labels: list[str] | None) -> None:
    found = labels_of([Path(path) for path in paths])
    assert list(found) == list(dict.fromkeys(map(Path, paths)))
    if labels is not None:
        assert list(found.values()) == list(
            dict(zip(map(Path, paths), labels, strict=True)).values()
        )
    assert len({*found.values()}) == len({os.path.abspath(path) for path in paths})  # noqa: PTH100


def test_rounds_have_angles_and_barriers(folder: Path, tmp_path: Path) -> None:
    found, rows = analysed(
        folder, tmp_path, "rounds", str(folder / "ltr.safetensors"), str(folder / "rounds"), "--points", "3"
    )  # fmt: skip
    assert len(rows) == 3 and rows[0]["barrier"] == "" and float(rows[1]["angle"]) > 0
    assert found["angles"][1][1] == 0 and found["angles"][0][2] == found["angles"][2][0]


def test_two_runs_of_a_ticket_and_the_path_between_them(folder: Path, tmp_path: Path) -> None:
    ticket = str(folder / "ltr.safetensors")
    saved = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(saved):
        assert main(["train", ticket, "--seed", str(seed), "--save", str(path)]) == 0
    found, rows = analysed(folder, tmp_path, "path", ticket, *map(str, saved), "--points", "4")
    assert len(rows) == 4 and found["barrier"] >= 0
    same, _ = analysed(
        folder, tmp_path, "path", ticket, str(saved[0]), str(saved[0]), "--points", "3"
    )
    assert same["barrier"] == 0 and same["stable"]
    found, rows = analysed(folder, tmp_path, "instability", ticket, "--points", "3")
    assert len(rows) == 3 and found["instability"] >= 0


def test_runs_and_rounds_of_another_ticket_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the ticket's masks they would be measured as what they are not."""
    other, small = tmp_path / "other.safetensors", tmp_path / "small.safetensors"
    random = [*SEARCH, "--method", "random", "--sparsity", "0.4", "--out"]
    assert main([*random, str(other), "--seed", "1"]) == 0
    wider = [text.replace("width=0.1", "width=0.2") for text in random]
    assert main([*wider, str(small)]) == 0
    run = tmp_path / "run"
    assert main(["train", str(folder / "ltr.safetensors"), "--save", str(run)]) == 0
    for ticket, said in (
        (other, "got weights where it has none in 1"),
        (small, "of this ticket, 1."),
    ):
        for command, what in (
            (["path", str(ticket), str(run), str(run)], said),
            (["rounds", str(ticket), str(folder / "rounds")], "expected the rounds that led to"),
        ):
            capsys.readouterr()
            assert main(["analyze", *command, "--out", str(tmp_path / "a")]) == 2
            error = capsys.readouterr().err
            assert what in error and error.count("error: ") == 1, error
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("command", "meta"),
    [
        ("gates", {"gate": "Concrete(speed=1)"}),
        ("gates", {"gate": "Concrete(tau=fast)"}),
        ("gates", {"gate": 7}),
        ("progress", {"progress": "none"}),
        ("progress", {"progress": [1, 2]}),
        ("sanity", {"search": "joint", "sparsity": None}),
    ],
)
def test_provenance_that_is_nonsense(
    command: str, meta: dict, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Ticket.load(folder / "joint.safetensors")
    changed = dataclasses.replace(found, meta=found.meta | meta)
    changed.save(tmp_path / "t")
    assert main(["analyze", command, str(tmp_path / "t"), "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("rewind", "train", "code", "said"),
    [
        (0.0, 0.4, 2, "error: epochs: expected a training that ends with a whole epoch"),
        (1.2, 0.2, 2, "error: epochs: expected a training that ends with a whole epoch"),
        (1.0, 5e-324, 0, "warning: instability: no step between the rewind point and the end"),
    ],
)
def test_instability_of_a_ticket_with_too_few_epochs(
    rewind: float, train: float, code: int, said: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = Ticket.load(folder / "joint.safetensors")
    setup = found.meta["setup"] | {"rewind_epochs": rewind, "train_epochs": train}
    dataclasses.replace(found, meta=found.meta | {"setup": setup}).save(tmp_path / "t")
    command = ["analyze", "instability", str(tmp_path / "t"), "--points", "2"]
    assert main([*command, "--out", str(tmp_path / "a")]) == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("method", ["gmp", "gradual", "rigl", "imp"])
def test_a_search_without_a_step_is_refused(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--rewind-epochs", "0", "--epochs", "1e-20", "--method", method]
    command = ["search", "--data", "digits", "--model-option", "width=0.1", *few]
    assert main([*command, "--sparsity", "0.9", "--out", str(tmp_path / "t")]) == 2
    assert "expected" in one_error(capsys) and not (tmp_path / "t").exists()


def test_a_rewind_point_by_instability(tmp_path: Path) -> None:
    options = [*SEARCH[1:9], "--epochs", "2", "--candidates", "0,0.5", "--points", "3"]
    found, rows = analysed(tmp_path, tmp_path, "rewind", *options)
    assert [float(r["rewind_epoch"]) for r in rows] == [0, 0.5] and "earliest" in found


def test_sanity_checks_of_a_ticket(folder: Path, tmp_path: Path) -> None:
    options = ["--checks", "shuffle,corrupt", "--seeds", "2"]
    found, rows = analysed(folder, tmp_path, "sanity", str(folder / "joint.safetensors"), *options)
    assert [r["check"] for r in rows] == ["shuffle", "corrupt"]
    assert all(0 <= row["p"] <= 1 and row["verdict"] for row in found["rows"])


def test_a_sweep_over_the_width_of_the_base(tmp_path: Path) -> None:
    options = [
        *SEARCH[1:3],
        *SEARCH[5:],
        "--widths",
        "0.1,0.2",
        "--method",
        "strong",
        "--sparsity",
        "0.5",
    ]
    found, rows = analysed(tmp_path, tmp_path, "width", *options)
    assert [row["width"] for row in found["rows"]] == [0.1, 0.2] and len(rows) == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["rounds", "{ltr}", "nowhere"], "found none"),
        (["gates", "{ltr}"], "a search by gates"),
        (["path", "{ltr}", "{ltr}", "nowhere"], "train --save"),
        (["sanity", "{ltr}", "--checks", "luck"], "shuffle, reinit, invert, corrupt"),
        (["layers", "nowhere"], "nothing there"),
        (["width", "--widths", "a"], "numbers with commas"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_bad_input_is_one_line(
    folder: Path,
    tmp_path: Path,
    command: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [c.format(ltr=folder / "ltr.safetensors") for c in command]
    assert main(["analyze", *filled, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
