"""What the command line prints: warnings in lines of its own, names as they are, a command to go on with."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DIGITS, images

from sparsecore import experiment
from sparsecore.cli import main
from sparsecore.recipes import recipe_for
from sparsecore.setups import Setup, unused_options

OUT = ["--out", "t"]


def test_warnings_are_one_line_each_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images(Path("pictures"))
    Path("pictures/a/notes.txt").write_text("x")
    build = experiment.build

    def noisy(*args: Any, **options: Any) -> torch.nn.Module:
        for _ in range(2):
            warnings.warn(
                "of a library\nin two lines (Triggered internally at /a/b.cpp:3.)", stacklevel=1
            )
        return build(*args, **options)

    monkeypatch.setattr(experiment, "build", noisy)
    options = [
        "--model-option",
        "width=0.05",
        "--recipe",
        "batch=4",
        "--method",
        "snip",
        "--tau",
        "0.5",
    ]
    command = [
        "search",
        "--data",
        "folder:pictures",
        *options,
        "--rewind-epochs",
        "0",
        "--epochs",
        "1",
    ]
    assert main([*command, "--engine", "eager", "--sparsity", "0.5", *OUT]) == 0
    told = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in told) and len({*told}) == len(told)
    assert (
        "warning: of a library in two lines" in told and "warning: not used by snip: --tau" in told
    )
    assert any("left out what is no image" in line for line in told)
    assert not any(".py" in line for line in told)


def test_options_that_a_method_does_not_use() -> None:
    given = {
        "tau": 0.5,
        "search_lr": 0.2,
        "control": "band",
        "objective": "task",
        "search_epochs": 3,
    }
    setup = Setup("lenet-300-100", "digits", recipe_for("lenet-300-100"), **given)
    assert unused_options(setup, "cts") == []
    assert set(unused_options(setup, "snip")) == {*given}
    assert set(unused_options(setup, "edge-popup")) == {*given} - {"search_epochs"}


def test_names_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("[red]a$b$ [") / "pictures"
    images(folder)
    out = Path("[bold]t :smile: [")
    model = [
        "--model-option",
        "width=0.05",
        "--recipe",
        "batch=4",
        "--rewind-epochs",
        "0",
        "--epochs",
        "0.5",
    ]
    common = ["--data", f"folder:{folder}", *model, "--engine", "eager"]
    assert main(["search", *common, "--method", "magnitude", "--out", str(out)]) == 0
    assert f"ticket  {out}\nnext    sparsecore train '{out}'" in capsys.readouterr().out
    assert main(["info", str(out)]) == 0
    compared = ["--methods", "magnitude", "--sparsities", "0.5", "--seeds", "1", "--out", "runs"]
    assert main(["compare", *common, *compared]) == 0
    assert main(["analyze", "layers", str(out), "--out", "[/b]a"]) == 0


def test_the_printed_command_names_where_the_data_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*DIGITS, "--method", "magnitude", "--rewind-epochs", "0", "--data-dir", "some where"]
    assert main(command) == 0
    assert "next    sparsecore train t --data-dir 'some where'" in capsys.readouterr().out


def test_a_fraction_of_an_epoch_that_is_no_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--method", "magnitude", "--train-samples", "100", "--recipe", "batch=50"]
    for rewind, told in (("0.2", True), ("0.5", False)):
        assert main([*DIGITS, *few, "--rewind-epochs", rewind]) == 0
        said = f"rewind epochs: {rewind} of an epoch of 2 batches is no step"
        assert (said in capsys.readouterr().err) is told
    for epochs, told in (("0.5", False), ("0.1", True), ("1e-20", True), ("4.94066e-324", True)):
        assert main(["train", "t", "--engine", "eager", "--epochs", epochs]) == 0
        assert (f"epochs: {epochs} of an epoch of 2" in capsys.readouterr().err) is told
