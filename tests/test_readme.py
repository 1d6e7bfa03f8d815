"""The README runs as written: its Python example, and every command and flag it names."""

import re
import shlex
from pathlib import Path

from sparsecore.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_runs(monkeypatch) -> None:
    import torch

    names: dict = {}
    with torch.random.fork_rng(devices=[]):  # the example builds a model in torch's usual way
        torch.manual_seed(0)
        exec(blocks("python")[0], names)
    assert len(blocks("python")[0].strip().splitlines()) == 6  # an import, data, and four lines
    assert abs(names["ticket"].sparsity - 0.9) < 1e-4
    assert bool((names["model"][1].weight == 0).any())


def test_every_command_and_flag_exists(capsys) -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("sparsecore ")
    ]
    assert {c[1] for c in commands} >= {"search", "train", "info", "compare"}
    for command in commands:
        assert main([command[1], "--help"]) == 0
        shown = capsys.readouterr().out
        for flag in (word for word in command if word.startswith("--")):
            assert flag in shown, f"{command[1]} has no {flag}"
