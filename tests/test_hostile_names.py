"""Names of layers, files, data and methods are text: a terminal shows them, and obeys none."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DIGITS, images, one_error
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sparsecore import figures
from sparsecore.cli import main
from sparsecore.console import console, show
from sparsecore.describe import layers_of, provenance_of
from sparsecore.printable import MOST, Screen, one_line, printable, shell_word, tell
from sparsecore.progress import Progress
from sparsecore.tickets import Ticket

# Markup, escape sequences of both kinds, what moves the cursor, turns the direction, has no width, is no text.
NAMES = [
    "[/foo]", "a[b]c", "[red]", "[link=file:x]y[/link]", "[[", "\\[", ":smile:", "$\\frac{$", "$x$", "_", "%s%n{0}",
    "\x1b]0;title\x07", "\x1b[2J\x1b[1;1H", "\x9b2J", "\x9d0;t\x9c", "\x1bc", "a\rb", "a\nerror: b", "a\r\nb", "\t",
    "\x00", "\x7f", "\x08\x08\x08", "\x0b\x0c\x1c\x85\u2028\u2029", "\u202egnp.exe", "\u2066x\u2069", "\u200f",
    "\u200b", "\ufeff", "\udcff", "\ud800", "\U000e0041", "\uffff", "名前", "é", "👩\u200d🔬", "x" * 10_000,
]  # fmt: skip
OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
STYLES = re.compile("\x1b\\[[0-9;]*m")  # which rich itself writes on a terminal


def harmless(text: str) -> bool:
    return not OBEYED.search(text)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_is_one_line_without_orders(name: str) -> None:
    shown = printable(name)
    assert harmless(shown) and "\n" not in shown and len(shown) <= 11 * MOST
    assert printable(shown) == shown  # what is shown is shown as it is
    shown.encode()
    assert harmless(one_line(name)) and "\n" not in one_line(name)
    if name.isprintable() and len(name) <= MOST:
        assert shown == name


def test_characters_are_escapes_that_can_be_read() -> None:
    assert printable("\x1b[2J\x9b\r\n\t\u202e\udcff\ud800") == r"\x1b[2J\x9b\r\n\t\u202e\xff\ud800"
    assert printable("[red]:smile: a  b") == "[red]:smile: a  b"
    assert printable("é 名前 👩\u200d🔬 ×") == "é 名前 👩\u200d🔬 ×"
    assert printable("ab" * MOST) == f"{'ab' * (MOST // 4)} … {'ab' * (MOST // 4)}"
    assert one_line(" of a library\n  in two  lines\r\n") == "of a library in two  lines"


@pytest.mark.parametrize("name", [n for n in NAMES if "\x00" not in n and "\ud800" not in n])
def test_words_of_a_shell(name: str) -> None:
    if any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in name):
        return
    word = shell_word(name)
    assert harmless(word) and "\n" not in word
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert os.fsdecode(said.stdout) == name


MADE: list[Callable[[str], Any]] = [
    lambda name: name,
    lambda name: Text(name),
    lambda name: Panel(name),
    lambda name: table(name),
    lambda name: [name],
    lambda name: {name: name},
]


def table(name: str) -> Table:
    made = Table(title=name, caption=name)
    made.add_column(name)
    made.add_row(name)
    made.add_row(Text(name, overflow="ellipsis"))
    return made


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_screen_shows_whatever_it_is_given(
    make: Callable[[str], Any], encoding: str, terminal: bool
) -> None:
    for name in NAMES:
        screen = Screen()
        stream = io.BytesIO()
        screen.file = io.TextIOWrapper(stream, encoding=encoding)
        screen._force_terminal = terminal
        screen.print(make(name))
        screen.line(f"a {name}")
        screen.file.flush()
        said = STYLES.sub("", stream.getvalue().decode(encoding))
        assert screen.failure is None and harmless(said)
        if encoding == "utf-8" and name.isprintable() and len(name) < 20:
            assert name in said and f"a {name}\n" in said


def test_lines_are_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    show(["x " * 300, "a[b]c"])
    assert capsys.readouterr().out.splitlines() == ["x " * 300, "a[b]c"]


@pytest.mark.parametrize("name", NAMES)
def test_bars(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with Progress() as progress, progress.task(name, total=2) as advance:
        advance(cell=name)
        advance.describe(**{name: name})
        progress.tell("plan", name)
    said = capsys.readouterr().err
    moves = re.compile("\x1b\\[(\\?25[lh]|[0-9;]*[mKA])|\r")  # rich's own, over its own lines
    assert harmless(moves.sub("", said))
    if name.isprintable() and len(name) < 20:
        assert name in moves.sub("", said)


@pytest.mark.parametrize("name", NAMES)
def test_messages(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tell(f"error: {name}")
    said = capsys.readouterr().err
    assert harmless(said) and said.count("\n") == 1


def renamed(ticket: Ticket, name: str) -> Ticket:
    """The ticket with a name in all places that a file names things."""
    names = {old: f"{name}{i}" for i, old in enumerate(ticket.masks)}
    told = ("method", "search", "objective", "control", "gate", "torch", "data")
    facts: dict[str, Any] = {key: name for key in told} | {"dense": {name: 3}}  # noqa: C420
    facts["setup"] = ticket.meta["setup"] | {
        "model": name,
        "data": name,
        "recipe": {"optimizer": name},
    }
    records = [{"epoch": 1, "sparsity": 0.5, name: 1.0, "layers": {name: 0.5}}]
    return replace(
        ticket,
        masks={names[old]: mask for old, mask in ticket.masks.items()},
        scores={names[old]: score for old, score in (ticket.scores or {}).items()} or None,
        meta=ticket.meta | facts | {"parameters": 10**6, "progress": records},
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Ticket:
    out = tmp_path_factory.mktemp("found") / "t"
    assert main([*DIGITS[:-1], str(out), "--method", "magnitude", "--rewind-epochs", "0"]) == 0
    return Ticket.load(out)


@pytest.mark.parametrize("name", NAMES)
def test_tables_about_tickets(name: str, found: Ticket, capsys: pytest.CaptureFixture[str]) -> None:
    ticket = renamed(found, name)
    console.print(layers_of(ticket, name)[0])
    console.print(provenance_of(ticket))
    said = capsys.readouterr().out
    assert harmless(said)
    if name.isprintable() and len(name) < 12:
        assert f" {name}0 " in said and f"method {name}" in said


@pytest.mark.parametrize("name", [n for n in NAMES if n.isprintable() and len(n) < 100])
def test_commands_about_tickets(
    name: str, found: Ticket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = name.replace("/", "-")
    renamed(found, name).save(file)
    assert main(["info", f"./{file}", "--json", "j"]) == 0
    assert json.loads(Path("j").read_text())["layers"][0]["layer"] == f"{name}0"
    for analysis in ("layers", "progress"):
        assert main(["analyze", analysis, f"./{file}", "--out", f"{file} o"]) == 0
    said = capsys.readouterr()
    assert harmless(said.out) and f"wrote  {file} o/layers.png\n" in said.out
    assert main(["train", f"./{file}"]) == 2  # its model is none
    assert harmless(one_error(capsys))


@pytest.mark.parametrize("name", [n for n in NAMES if "\x00" not in n and len(n) < 100])
def test_options_and_paths(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is not there or not known is told in a line that is harmless, and that markup does not change."""
    monkeypatch.chdir(tmp_path)
    whole = name.isprintable() and "\\" not in name  # click shows a backslash as two
    for shown, command in (
        (whole, ["info", f"./{name}"]),
        (whole, ["train", f"./{name}"]),
        (whole, ["search", "--out", "t", "--model", f"m{name}"]),
        (whole, ["search", "--out", "t", "--data", f"d{name}"]),
        (whole, ["search", "--out", "t", "--data", f"folder:{name}x"]),
        (False, ["search", "--out", "t", "--method", f"m{name}"]),
        (False, ["search", "--out", "t", "--sparsity", f"s{name}"]),
        (False, ["search", "--out", "t", "--recipe", f"{name}=1"]),
        (whole, ["search", "--out", f"./no/{name}x", "--data", "digits"]),
        (whole, [f"c{name}"]),
        (whole, ["analyze", f"c{name}"]),
        (False, ["info", "t", f"--{name}"]),
    ):
        assert main(command) == 2
        told = one_error(capsys)
        assert harmless(told) and (not shown or name in told), command


@pytest.mark.filterwarnings("error")
def test_pictures(tmp_path: Path) -> None:
    layers = {name: dict.fromkeys(NAMES, 0.5) for name in NAMES[:8]}
    assert figures.draw_layers(tmp_path / "l.png", layers, "$\\frac{$").stat().st_size
    gates = {name: torch.tensor([0.0, 1.0]) for name in NAMES[::9]}
    assert figures.draw_gates(tmp_path / "g.png", gates, title=NAMES[-1]).stat().st_size
    long = {NAMES[-1]: {NAMES[-1]: 0.5}}
    assert figures.draw_layers(tmp_path / "x.png", long, NAMES[-1]).stat().st_size


def test_tables_in_files(tmp_path: Path) -> None:
    rows = [{name: name for name in NAMES}]
    figures.write_csv(tmp_path / "r.csv", rows)
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == [printable(name, len(name)) for name in NAMES] == list(row.values())
    assert row["a[b]c"] == "a[b]c" and row[r"a\nerror: b"] == r"a\nerror: b"


def test_a_name_in_a_picture_is_no_formula() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([1], label=figures.shown("_a$b$"))
    (text,) = axes.legend().get_texts()
    assert text._preprocess_math(text.get_text()) == (" _a$b$", False)  # type: ignore[attr-defined]


# --- Streams ----------------------------------------------------------------------------------------

RUN = """
import json, sys
from sparsecore.cli import main
codes = [main(command) for command in json.loads(sys.argv[1])]
with open("codes", "w") as file:
    json.dump(codes, file)
"""


def run(
    commands: list[list[str]], out: Any, err: Any
) -> tuple[subprocess.CompletedProcess[bytes], list[int]]:
    """Commands in turn in a process whose output goes there: its end, and their exit codes."""
    program = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(program, check=False, timeout=300, stdout=out, stderr=err)
    return done, json.loads(Path("codes").read_text())


@pytest.fixture(scope="module")
def file(found: Ticket, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("file") / "[t]é×.t"
    found.save(path)
    return str(path)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_letters(
    encoding: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["info", file]) == 0 and main(["info", f"{file}名"]) == 2
    assert main(["search", "--help"]) == 0
    for stream, said in (
        (out, " 15x" if encoding == "ascii" else " 15×"),
        (err, r"\u540d: expected a"),
    ):
        stream.flush()
        assert said in stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_nobody_reads(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `| head -1`: files are written all the same, and nothing is told to nobody."""
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        commands = [["info", file, "--json", "j"], ["info", file], ["info", "none"]]
        done, codes = run(commands, writer, subprocess.PIPE)
    finally:
        os.close(writer)
    assert done.returncode == 0 and codes == [0, 0, 2] and json.loads(Path("j").read_text())
    assert done.stderr.decode().splitlines() == [
        "error: none: expected a ticket file, found nothing there"
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_is_lost_is_told(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("/dev/full").open("wb") as full:
        done, codes = run([["info", file, "--json", "j"]], full, subprocess.PIPE)
    (told,) = done.stderr.decode().splitlines()
    assert (
        done.returncode == 0
        and codes == [2]
        and told.startswith("error: standard output could not be written")
    )
    assert json.loads(Path("j").read_text())


def test_a_lost_stream_is_forgotten_by_the_next_command(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert main(["info", file]) == 2
    assert "standard output could not be written" in one_error(capsys)
    assert main(["info", file]) == 0 and "mask hash" in capsys.readouterr().out


def test_warnings_are_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("p"))
    (Path("p") / "a" / "n.[red]\x1b[2J\x9b").write_text("x")
    assert main(["search", "--data", "folder:p", "--out", "t", "--model", "\x1b[2J"]) == 2
    harmless(one_error(capsys))
    small = ["--model-option", "width=0.05", "--recipe", "batch=4", "--method", "magnitude"]
    assert main(["search", "--data", "folder:p", "--out", "t", "--rewind-epochs", "0", *small]) == 0
    told = capsys.readouterr().err
    assert harmless(told) and r".[red]\x1b[2j\x9b" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["--version"]) == 0
