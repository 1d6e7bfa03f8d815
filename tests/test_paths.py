"""What a command would write over, or could not write, it says before any work, and leaves all files as they are."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sparsecore import cli, writing
from sparsecore.cli import main
from sparsecore.metrics_file import catch_up, lines_of
from sparsecore.paths import check_cache, check_paths
from sparsecore.tickets import Ticket

SEARCH = [
    "search", "--data", "digits", "--model-option", "width=0.05", "--method", "magnitude", "--sparsity", "0.5",
    "--engine", "eager",
]  # fmt: skip
QUICK = [*SEARCH, "--rewind-epochs", "0", "--epochs", "0.1"]


@pytest.fixture
def ticket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--out", "t"]) == 0
    return Path("t")


def contents(root: Path = Path()) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Each pair of a command's files under one name; the ticket is "t", weights "w", another name of it "link".
CLASHES = [
    [*QUICK, "--out", "t", "--json", "t"],
    [*QUICK, "--out", "t", "--json", "./x/../t"],
    [*QUICK, "--out", "link", "--json", "t"],
    [*QUICK, "--out", "new", "--json", "new"],
    [*QUICK, "--out", "new", "--json", "new.dense"],
    [*QUICK, "--out", "new", "--json", "new.part"],
    [*QUICK, "--out", "w", "--weights", "w"],
    [*QUICK, "--out", "new", "--json", "w", "--weights", "w"],
    ["info", "t", "--json", "t"],
    ["info", "link", "--json", "t"],
    ["plan", "t", "--json", "t"],
    ["plan", "t", "--plan-cache", "t"],
    ["plan", "t", "--plan-cache", "new", "--json", "new"],
    ["train", "t", "--save", "t"],
    ["train", "t", "--json", "t"],
    ["train", "t", "--metrics", "t"],
    ["train", "t", "--checkpoint", "t"],
    ["train", "t", "--plan-cache", "t"],
    ["train", "t", "--save", "new", "--json", "new"],
    ["train", "t", "--save", "new", "--checkpoint", "new"],
    ["train", "t", "--metrics", "new", "--checkpoint", "new"],
    ["train", "t", "--metrics", "new", "--plan-cache", "new"],
    ["compare", "--data", "digits", "--out", "c", "--json", "c/results.csv"],
    ["compare", "--data", "digits", "--out", "c", "--json", "c/setup.json"],
    ["compare", "--data", "digits", "--out", "c", "--json", "c/accuracy.png"],
    ["analyze", "layers", "t", "--out", "a", "--json", "t"],
    ["analyze", "layers", "t", "--out", "a", "--json", "a/layers.csv"],
    ["analyze", "path", "t", "w", "t", "--out", "a", "--json", "w"],
    ["analyze", "layers", "a/layers.csv", "--out", "a"],
    ["analyze", "path", "t", "w", "a/path.csv", "--out", "a"],
    ["compare", "--data", "digits", "--out", "c", "--json", "c/tickets/new"],
    ["compare", "--data", "digits", "--out", "c[1]", "--json", "c[1]/rewind-1-0.safetensors"],
    ["compare", "--data", "digits", "--out", "c", "--json", "c/rounds/ltr-0/round-0000.safetensors"],
    [*QUICK, "--method", "ltr", "--out", "new", "--rounds", "r", "--json", "r/round-0000.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("command", CLASHES, ids=" ".join)
def test_no_file_is_written_over_another(
    command: list[str], ticket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("link").hardlink_to("t")
    Path("w").write_bytes(b"weights")
    Path("x").mkdir()
    for name in ("a/layers.csv", "a/path.csv", "c/tickets/x", "c/rounds/ltr-0/x", "c[1]/x", "r/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("t", name)
    before = contents()
    capsys.readouterr()
    assert main(command) == 2
    told = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    assert len(told) == 1 and "expected a file of its own" in told[0], told
    assert contents() == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*QUICK, "--out", "x"], "expected the name of a file, got a folder"),
        ([*QUICK, "--out", "no/t"], "its folder does not exist; create"),
        ([*QUICK, "--out", "t/t"], "its folder does not exist; create"),
        ([*QUICK, "--out", "pipe"], "got a pipe or device"),
        ([*QUICK, "--out", "new", "--rounds", "t"], "expected the name of a folder, got the file"),
        (["train", "t", "--save", "/dev/null"], "got a pipe or device"),
        (["train", "t", "--metrics", "x/text"], "got something else in line 1"),
        (["train", "t", "--checkpoint", "x/text"], "expected a sparsecore checkpoint"),
        (["train", "t", "--plan-cache", "x/text"], "one of remembered plans"),
        (["train", "t", "--plan-cache", "x"], "got a folder"),
        (["train", "t", "--plan", "fast"], "plan: expected auto, mask"),
        (["compare", "--data", "digits", "--out", "t"], "expected the name of a folder, got"),
        (["compare", "--data", "digits", "--out", "t/c"], "expected the name of a folder, got"),
        (["compare", "--data", "folder:images", "--out", "images/runs"], "would be a class"),
        (["compare", "--data", "folder:images", "--out", "images/a/runs"], "would be a class"),
        ([*QUICK[:1], *QUICK[3:], "--data", "folder:images", "--out", "images/a/0.png"], "one of images"),
        (["analyze", "width", "--out", "t"], "expected the name of a folder, got the file"),
        (["analyze", "layers", "t", "--out", "lost"], "lost, a link that leads nowhere"),
        (["compare", "--data", "digits", "--out", "lost"], "lost, a link that leads nowhere"),
        (["compare", "--data", "digits", "--out", "lost/c"], "lost, a link that leads nowhere"),
        (["compare", "--data", "digits", "--out", "x"], "x/tickets, a link that leads nowhere"),
        ([*QUICK, "--out", "new", "--rounds", "lost"], "lost, a link that leads nowhere"),
        (["train", "t", "--plan-cache", "pipe"], "got a pipe or device"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_a_place_that_cannot_be_is_told_before_any_work(
    command: list[str], said: str, ticket: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Path("x").mkdir()
    Path("x/text").write_text("a\nb\n")
    os.mkfifo("pipe")
    Path("lost").symlink_to("no/where")
    Path("x/tickets").symlink_to("no/where")
    for label in "ab":
        (Path("images") / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 4)).save(f"images/{label}/{i}.png")

    def worked(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    for work in ("data_of", "rewind_point", "model_of"):
        monkeypatch.setattr(cli, work, worked)
    before = contents()
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert contents() == before


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission bits do not bind root, so the refusal is made."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sparsecore.paths.tempfile.TemporaryFile", denied)
    refused = pytest.raises(
        ValueError, match=r"folder that can be written, got .*Permission denied"
    )
    with refused:
        check_paths(written={"--json": tmp_path / "j"})
    with refused:
        check_paths(replaced={"--out": tmp_path / "t"})
    with refused:
        check_paths(folders={"--out": tmp_path / "new" / "runs"})


def test_a_ticket_in_a_folder_that_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--method", "ltr:rate=0.5", "--rounds", "r", "--out", "r/t"]) == 0
    assert Path("r/t").is_file()


def test_what_is_no_clash(tmp_path: Path) -> None:
    root, null = tmp_path / "images", Path("/dev/null")
    for split in ("train", "test"):
        (root / split / "a").mkdir(parents=True)
    out = root / "runs"  # beside the splits
    check_paths(
        {"the ticket": tmp_path / "t", "--weights": tmp_path / "t"},
        written={"--json": null, "--metrics": null, "the table": out / "results.csv"},
        replaced={"--out": tmp_path / "u"},
        folders={"--rounds": out},
        data=root,
    )
    lines_of(null)
    check_cache(tmp_path / "new" / "plans.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["images"] and not out.exists()


EDITED = ['{"epoch": 1}\r\n', '{"epoch": 1}\n\n \n', '\ufeff{"epoch": 1}\n', '{"epoch": 1}']


@pytest.mark.parametrize("text", ["", "\n" * 2, '{"epoch": 1}\n', '{"epoch": 1}\n{"epo', *EDITED])
def test_metrics_go_on(text: str, tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.write_bytes(text.encode())
    assert len(lines_of(file)) == ("1}" in text)
    catch_up(file, [{"epoch": 1}, {"epoch": 2}])
    assert [json.loads(x) for x in file.read_text().splitlines()] == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("content", [b"notes", b"[1]\n", b'{"a": 1}\n\n{"a": 2}\n', b"\xff\xfe\n"])
def test_what_are_no_metrics(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match="expected a new file or one JSON object a line"):
        lines_of(tmp_path / "m")


@pytest.mark.parametrize("option", ["--save", "--json"])
def test_a_disk_that_fills_up_while_training_costs_the_file_alone(
    option: str, ticket: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    Path("old").write_text("old")
    monkeypatch.setattr(writing.os, "fsync", full)
    monkeypatch.setattr(Path, "write_text", full)
    capsys.readouterr()
    assert main(["train", "t", "--engine", "eager", option, "old"]) == 2
    shown = capsys.readouterr()
    assert "% test accuracy" in shown.out
    errors = [x for x in shown.err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and "old could not be written: No space left" in errors[0]
    assert Path("old").read_text() == "old"
    assert Ticket.load(ticket).sparsity == pytest.approx(0.5, abs=1e-2)
