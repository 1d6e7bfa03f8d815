"""The README runs as written: its Python example, and every command and flag it names."""

import re
import shlex
from pathlib import Path

import pytest

from bench.__main__ import main as bench
from sparsecore.cli import main
from sparsecore.methods import METHODS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_examples_run() -> None:
    import torch

    names: dict = {}
    with torch.random.fork_rng(devices=[]):  # the examples build models in torch's usual way
        torch.manual_seed(0)
        for block in blocks("python"):
            exec(block, names)
    assert len(blocks("python")[0].strip().splitlines()) == 6  # an import, data, and four lines
    assert abs(names["ticket"].sparsity - 0.9) < 1e-4
    assert bool((names["model"][1].weight == 0).any())
    assert names["y"].shape == (32, 128)


def test_the_benchmark_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"python (?:-m )?bench (\w+)([^`\n#]*)", README)
    assert {command for command, _ in found} == {
        "run", "table", "plot", "tickets", "static", "host", "gpu",
    }  # fmt: skip
    for command, rest in found:
        with pytest.raises(SystemExit, match="0"):
            bench([command, "--help"])
        shown = capsys.readouterr().out
        for flag in (word for word in rest.split() if word.startswith("--")):
            assert flag in shown, f"bench {command} has no {flag}"


def test_every_command_and_flag_exists(capsys) -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("sparsecore ")
    ]
    assert {c[1] for c in commands} >= {"search", "train", "info", "compare"}
    for command in commands:
        path = command[1 : 3 if command[1] == "analyze" else 2]
        assert main([*path, "--help"]) == 0
        shown = capsys.readouterr().out
        for flag in (word for word in command if word.startswith("--")):
            assert flag in shown, f"{command[1]} has no {flag}"


def test_every_method_is_told() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| `[^|]+\|", README, re.M)
    told = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert set(METHODS) <= told
