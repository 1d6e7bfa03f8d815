"""What a ticket names is not fetched, and not looked for where its user has not pointed: files are of strangers."""

import copy
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
from command_line import DIGITS, images, one_error
from data_files import mnist
from hostile.mutations import of_json

from sparsecore import data, experiment, memory, named_data, safefile
from sparsecore.cli import main
from sparsecore.provenance import setup_of, with_data, with_weights
from sparsecore.tickets import Ticket, TicketError

READ = {"open", "os.listdir", "os.scandir", "os.walk", "os.chdir"}
FETCHED = {
    "socket.connect", "socket.getaddrinfo", "urllib.Request", "subprocess.Popen", "os.system", "os.exec",
    "os.posix_spawn",
}  # fmt: skip
_seen: list[tuple[str, str]] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _seen is not None and event in READ | FETCHED:
        _seen.append(
            (
                event,
                os.fsdecode(args[0])
                if args and isinstance(args[0], str | bytes | os.PathLike)
                else "",
            )
        )


sys.addaudithook(_note)  # Python has none to remove them


@pytest.fixture
def seen() -> Iterator[list[tuple[str, str]]]:
    """What the process has opened, listed, asked and started since."""
    global _seen
    _seen = []
    yield _seen
    _seen = None


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket with gates and with notes of its search."""
    out = tmp_path_factory.mktemp("found") / "t"
    options = [
        "--method",
        "cts",
        "--search-epochs",
        "1",
        "--rewind-epochs",
        "0",
        "--epochs",
        "1",
        "--watch",
    ]
    assert main([*DIGITS[:-1], str(out), *options, "--train-samples", "100"]) == 0
    return out


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default data folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "sparsecore"


def naming(found: Path, out: Path, **named: Any) -> str:
    """The same ticket, which says otherwise of its setup."""
    tensors, meta = safefile.read(found, kind="ticket")
    meta["provenance"]["setup"] |= named
    safefile.write(out, tensors, meta, kind="ticket")
    return str(out)


def commands(ticket: str) -> list[list[str]]:
    return [
        ["train", ticket, "--epochs", "0", "--engine", "eager"],
        ["plan", ticket, "--plan", "mask"],
        ["analyze", "path", ticket, "a", "b"],
        ["analyze", "instability", ticket],
        ["analyze", "rounds", ticket, "rounds"],
        ["analyze", "sanity", ticket],
    ]


@pytest.mark.parametrize("name", sorted(named_data.NAMED))
def test_data_that_a_ticket_names_is_not_fetched(
    name: str,
    found: Path,
    home: Path,
    seen: list[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    ticket = naming(found, Path("t"), data=name)
    Path("empty").mkdir()
    for command in commands(ticket):
        for there in ([], ["--data-dir", "empty"]):
            assert main([*command, *there]) == 2
            told = one_error(capsys)
            assert f"found on {name}" in told and f"--data {name}" in told
    assert not [event for event, _ in seen if event in FETCHED] and not home.exists()


@pytest.mark.parametrize("place", ["/", ".", "~", "pictures", "../", "//proc"])
def test_folders_that_a_ticket_names_are_not_looked_at(
    place: str,
    found: Path,
    home: Path,
    seen: list[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images(Path("pictures"))
    ticket = naming(found, Path("t"), data=f"folder:{place}")
    seen.clear()
    for command in commands(ticket):
        assert main(command) == 2
        told = one_error(capsys)
        assert f"found on folder:{place}" in told and "--data folder:PATH" in told
    own = {Path(place).expanduser().resolve(), Path("pictures").resolve()}
    looked = {Path(path).resolve() for event, path in seen if event.startswith("os.") and path}
    assert not own & looked
    assert not [path for _, path in seen if path.endswith(".png")]


def test_data_is_used_where_it_lies(
    found: Path, home: Path, seen: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the default folder and in the given one; a user's own word fetches it."""
    small = ["--method", "magnitude", "--rewind-epochs", "0", "--recipe", "batch=10"]
    mnist(home)
    assert main([*DIGITS, *small, "--data", "mnist"]) == 0
    assert "next    sparsecore train t\n" in capsys.readouterr().out
    for command in (["train", "t", "--epochs", "0"], ["plan", "t", "--plan", "mask"]):
        assert main(command) == 0
    home.rename("elsewhere")
    assert main(["train", "t", "--epochs", "0"]) == 2
    assert str(home) in one_error(capsys)
    assert main(["train", "t", "--epochs", "0", "--data-dir", "elsewhere"]) == 0
    assert not [event for event, _ in seen if event in FETCHED]


def test_data_that_a_user_names_is_fetched(
    found: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(
        data, "read_named", lambda name, root, *, download: asked.append((name, download)) or 1 / 0
    )
    ticket = naming(found, Path("t"), data="mnist")
    for command in commands(ticket)[:3]:
        with pytest.raises(ZeroDivisionError):
            main([*command, "--data", "mnist"])
    assert asked == [("mnist", True)] * 3


SMALL = ["--method=magnitude", "--rewind-epochs=0", "--recipe=batch=4", "--epochs=1"]


@pytest.mark.parametrize(
    "folder", ["pictures", "two words", "it's $HOME", "a\x1b[2Jb", "\udcff\n", "-x"]
)
def test_the_next_command_works(
    folder: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bash, whatever the folder and the ticket are called."""
    out = folder.replace("\udcff", "") + ".t"  # safetensors opens no file of another name than text
    images(Path(folder))
    assert main([*DIGITS[:-2], *SMALL, "--data", f"folder:{folder}", f"--out={out}"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("next"))
    assert line.isprintable()
    words = line.removeprefix("next").strip()
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True
    ).stdout
    program, *argv = [os.fsdecode(word) for word in said.split(b"\0")[:-1]]
    assert program == "sparsecore" and argv[2:] == ["--data", f"folder:{folder}"]
    assert main([*argv, "--epochs", "0"]) == 0


def test_the_next_command_is_plain_where_it_can_be(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(Path("pictures"))
    assert main([*DIGITS, *SMALL, "--data", "folder:pictures"]) == 0
    assert (
        f"next    {shlex.join(['sparsecore', 'train', 't', '--data', 'folder:pictures'])}\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("weights", ["DEFAULT", "/etc/passwd", "w"])
def test_start_weights_that_a_ticket_names_are_not_read(
    weights: str,
    found: Path,
    home: Path,
    seen: list[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    ticket = naming(found, Path("t"), weights=weights)
    Path("w").write_bytes(b"")
    seen.clear()
    assert main(["analyze", "sanity", ticket]) == 2
    told = one_error(capsys)
    assert f"began from {weights}" in told and "--weights FILE" in told
    assert main(["train", ticket, "--epochs", "0"]) == 0  # which needs none
    assert not [x for x in seen if x[0] in FETCHED or x[1].endswith(weights)]
    setup = setup_of(Ticket.load(ticket))
    assert with_weights(setup, "mine").weights == "mine"


def test_a_setup_is_what_was_saved(found: Path) -> None:
    """Of a ticket in memory and of its file."""
    loaded = Ticket.load(found)
    setup = setup_of(loaded)
    assert asdict(setup)["recipe"]["milestones"] == (0.7,) and type(setup.rewind_epochs) is float
    loaded.meta["setup"] = asdict(setup)
    assert setup_of(loaded) == setup and with_data(setup, None, None) == setup


BAD: list[dict[str, Any]] = [
    {"model": 3}, {"model": None}, {"data": ["digits"]}, {"data": {}}, {"recipe": []}, {"recipe": None},
    {"rewind_epochs": "2"}, {"rewind_epochs": True}, {"train_epochs": None}, {"train_epochs": -1},
    {"search_batch": 0}, {"search_batch": 1.5}, {"search_batch": 10**400}, {"search_lr": "x"},
    {"search_lr": 10**400}, {"granularity": 4}, {"granularity": "block:0x0"}, {"train_samples": 0.5},
    {"sparse_layers": 3}, {"sparse_layers": [1]}, {"sparse_layers": {"a": 1}}, {"weights": 7}, {"drop_last": 1},
    {"image_size": "8"}, {"model_options": []}, {"model_options": {"width": {}}}, {"unknown": 1}, {"objective": []},
    {"control": 3}, {"channels_last": "yes"}, {"tau": []},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_a_ticket_says_is_of_the_right_kind(
    bad: dict[str, Any], found: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticket = naming(found, Path("t"), **bad)
    assert main(["train", ticket, "--epochs", "0"]) == 2
    one_error(capsys)


@pytest.mark.parametrize("key", ["model", "data", "recipe"])
def test_what_a_ticket_does_not_say(key: str, found: Path) -> None:
    loaded = Ticket.load(found)
    del loaded.meta["setup"][key]
    with pytest.raises(TicketError, match=f"no {key}"):
        setup_of(loaded)


@pytest.mark.parametrize("seed", range(16))
def test_facts_of_any_kind_end_in_one_line(
    seed: int,
    found: Path,
    home: Path,
    seen: list[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = Random(seed)
    tensors, meta = safefile.read(found, kind="ticket")
    whole = copy.deepcopy(meta["provenance"])
    if seed % 2:
        meta["provenance"] = of_json(whole, rng)
    else:
        meta["provenance"]["setup"] = of_json(whole["setup"], rng)
    try:
        safefile.write(Path("t"), tensors, meta, kind="ticket")
    except safefile.FileError:
        return
    rest = ["train", "t", "--epochs", "0", "--engine", "eager"], ["plan", "t", "--plan", "mask"]
    analyses = [["analyze", what, "t"] for what in ("gates", "progress", "layers")]
    for command in (
        rest[seed % 2],
        ["info", "t"],
        analyses[seed % 3],
        ["analyze", "path", "t", "a", "b"],
    ):
        if main(command) != 0:
            one_error(capsys)
    assert not [event for event, _ in seen if event in FETCHED]


def test_a_model_far_larger_than_its_ticket_is_not_built(
    found: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images(Path("pictures"), size=224, count=2)
    ticket = naming(
        found, Path("t"), model="torchvision:vit_h_14", model_options={}, train_samples=None
    )
    monkeypatch.setattr(experiment, "build", lambda *_, **__: 1 / 0)
    # Enough for its weights, not for a step of it, which is not what is wrong.
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 4 << 30)
    assert main(["train", ticket, "--data", "folder:pictures", "--epochs", "0"]) == 2
    assert "the ticket is for another model: it has 0 MiB of weights" in one_error(capsys)


def test_a_ticket_of_a_comparison_names_nothing_either(
    found: Path, home: Path, seen: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    setup = setup_of(Ticket.load(found))
    Path("runs/tickets").mkdir(parents=True)
    naming(found, Path("runs/tickets/magnitude-0.5-0.safetensors"), data="mnist", weights="DEFAULT")
    compared = [
        "--methods",
        "magnitude",
        "--sparsities",
        "0.5",
        "--seeds",
        "1",
        "--out",
        "runs",
        "--rewind-epochs",
        "0",
    ]
    options = [
        "--data",
        "digits",
        "--epochs",
        "0.1",
        "--engine",
        "eager",
        "--model-option",
        "width=0.05",
    ]
    code = main(["compare", *options, *compared])
    assert code in (0, 2) and not [event for event, _ in seen if event in FETCHED]
    assert setup.weights is None and experiment.setup_of is setup_of
