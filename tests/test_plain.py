"""Pipes and devices where files are read: one line at once, wherever a path comes from."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import DIGITS, one_error

from sparsecore.cells import FIELDS, read_rows
from sparsecore.cli import main
from sparsecore.compare import Comparison
from sparsecore.paths import check_cache
from sparsecore.plain import read_plain, require_plain
from sparsecore.planner import Cache
from sparsecore.recipes import recipe_for
from sparsecore.setups import Setup
from sparsecore.writing import FileError

SETUP = Setup("lenet-300-100", "digits", recipe_for("lenet-300-100"))


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def at_once(call: Callable[[], object]) -> object:
    """What it returns or raises; waiting fails."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(call())
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert found, "it waits"
    return found[0]


@pytest.mark.parametrize("read", [read_plain, require_plain])
def test_plain_files_alone(read: Callable[[Path], object], fifo: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(fifo)
    expected = {
        fifo: "a pipe or device",
        tmp_path / "linked": "a pipe or device",
        Path("/dev/zero"): "a pipe or device",
        tmp_path: "a folder",
        tmp_path / "none": "No such file",
    }
    for path, got in expected.items():
        error = at_once(lambda path=path: read(path))
        assert isinstance(error, FileError) and str(path) in str(error) and got in str(error)
    (tmp_path / "file").write_bytes(b"a\r\n")
    (tmp_path / "to").symlink_to(tmp_path / "file")
    assert read(tmp_path / "to") in (b"a\r\n", None)


@pytest.mark.parametrize("name", ["results.csv", "setup.json"])
def test_a_pipe_in_the_folder_of_a_comparison(name: str, fifo: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    fifo.rename(tmp_path / "c" / name)
    error = at_once(lambda: Comparison(tmp_path / "c", SETUP))
    assert isinstance(error, FileError) and f"{name}: expected a file" in str(error)


def test_a_cache_of_plans_that_is_no_file_holds_nothing(fifo: Path) -> None:
    for path in (fifo, Path("/dev/zero")):
        cache = Cache(path)
        assert cache.entries == {} and cache.get("key", lambda: 1, int) == 1


@pytest.mark.parametrize(
    "words",
    [["plan", "t", "--plan-cache", "P"], ["train", "t", "--plan", "auto", "--plan-cache", "P"],
     ["analyze", "path", "t", "P", "P"]],
)  # fmt: skip
@pytest.mark.parametrize("place", ["fifo", "/dev/zero"])
def test_commands_that_read_a_pipe(
    words: list[str], place: str, fifo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(fifo.parent)
    assert main([*DIGITS, "--method", "magnitude", "--rewind-epochs", "0", "--epochs", "0.1"]) == 0
    capsys.readouterr()
    assert at_once(lambda: main([place if word == "P" else word for word in words])) == 2
    assert f"{place}: expected a file, got a pipe or device" in one_error(capsys)


def test_nothing_is_remembered_in_the_null_device() -> None:
    check_cache(Path(os.devnull), {})


ROWS = ["dense,0,0,90.00,10,0.0,1.0,cpu,2", "snip:score=loss,0.9,-1,80.50,1,2.5,1.0,cpu,2"]
TEXT = "\n".join([",".join(FIELDS), *ROWS, ""])


@pytest.mark.parametrize(
    "edited",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: "\ufeff" + text,
        lambda text: text + "\n\r\n\n",
        lambda text: text + "  \n" + "," * (len(FIELDS) - 1) + "\n",
        lambda text: "\n".join('"' + x.replace(",", '","') + '"' for x in text.splitlines()) + "\n",
        lambda text: "\ufeff" + text.replace("\n", "\r\n") + "\r\n",
    ],
)
def test_rows_that_an_editor_has_saved_are_the_same(
    edited: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(TEXT.encode())
    (tmp_path / "b").write_bytes(edited(TEXT).encode())
    found = read_rows(tmp_path / "a")
    assert len(found) == 2 and read_rows(tmp_path / "b") == found


@pytest.mark.parametrize("other", [TEXT.replace(",", ";").encode(), TEXT.encode("utf-16"), b"{}\n"])
def test_what_are_no_rows_is_not_to_be_removed(other: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(other)
    with pytest.raises(FileError, match=r"commas between the columns method, .* save it so again"):
        read_rows(tmp_path / "a")
