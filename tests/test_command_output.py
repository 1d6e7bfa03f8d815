"""What every command prints is lines: what of ours has several is not one with escapes in it."""

from pathlib import Path

import pytest
import typer

from sparsecore import cli_compare
from sparsecore.cli import app, main

SMALL = [
    "--data", "digits", "--model-option", "width=0.05", "--train-samples", "200", "--rewind-epochs", "1",
]  # fmt: skip
SETUP = [*SMALL, "--epochs", "1", "--search-epochs", "1", "--search-batch", "64"]
EAGER = ["--engine", "eager"]
COMMANDS = [
    ["train", "t", *EAGER],
    ["train", "t", "--plan", "auto", "--plan-cache", "p", *EAGER],
    ["plan", "t", "--plan-cache", "p", *EAGER],
    ["plan", "t", "--plan", "state", *EAGER],
    ["info", "t"],
    ["compare", *SETUP, "--methods", "magnitude", "--sparsities", "0.9", "--seeds", "1", "--out", "c", *EAGER],
    ["demo", "--out", "d"],
    ["analyze", "sanity", "t", "--seeds", "1", "--checks", "shuffle", "--out", "a"],
    ["analyze", "progress", "t", "--out", "a"],
    ["analyze", "layers", "t", "--out", "a"],
    ["analyze", "gates", "t", "--out", "a"],
    ["analyze", "instability", "t", "--points", "2", "--out", "a"],
    ["analyze", "path", "t", "w", "w", "--points", "2", "--out", "a"],
    ["analyze", "rewind", *SETUP, "--candidates", "0", "--points", "2", "--out", "a"],
    ["analyze", "rounds", "l", "r", "--points", "2", "--out", "a"],
    ["analyze", "width", "--data", "digits", "--train-samples", "200", "--rewind-epochs", "1", "--epochs", "1",
     "--method", "magnitude", "--widths", "0.05", "--out", "a"],
]  # fmt: skip


def names(command: object, name: str = "") -> set[str]:
    inner = getattr(command, "commands", None)
    if inner is None:
        return {name}
    return {n for key, child in inner.items() for n in names(child, f"{name} {key}".strip())}


def test_no_command_prints_escapes_for_its_own_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_compare, "report", lambda *args: None)  # a demo's takes a minute
    monkeypatch.setattr(cli_compare.torch, "set_num_threads", lambda n: None)
    cts = ["search", *SETUP, *EAGER, "--method", "cts", "--watch", "--sparsity", "0.97", "--out", "t"]  # fmt: skip
    ltr = ["search", *SETUP, *EAGER, "--method", "ltr", "--sparsity", "0.4", "--rounds", "r", "--out", "l"]  # fmt: skip
    made = [cts, ltr, ["train", "t", *EAGER, "--save", "w"]]
    run = {" ".join(c[:2]) if c[0] == "analyze" else c[0] for c in [*made, *COMMANDS]}
    assert run == names(typer.main.get_command(app))
    for command in [*made, *COMMANDS]:
        assert main(command) == 0, command
        said = capsys.readouterr()
        assert "\\" not in said.out + said.err, command
        if command[:2] == ["plan", "t"] and "state" not in command:
            first, second, *_ = said.out.splitlines()
            assert first.split() == ["layer", "inputs", "outputs", "weights", "live"]
            assert second.split()[0] == "1"
