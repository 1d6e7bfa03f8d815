"""Processes that begin with closed standard streams, as under a daemon: nothing else comes in their places."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DIGITS

from sparsecore import descriptors
from sparsecore.cli import main

SCRIPT = """
import importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("descriptors", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.open_closed()
with open(sys.argv[2], "w") as file:  # after all of them
    print("lost", flush=True)
    print("lost", file=sys.stderr, flush=True)
    os.write(1, b"lost"), os.write(2, b"lost")
    told = [os.fstat(n).st_rdev for n in range(3)], [os.get_inheritable(n) for n in range(3)]
    json.dump([file.fileno(), sys.stdin.read(), *told], file)
"""


def closing(closed: tuple[int, ...]) -> str:
    return " ".join(f"{n}{'<' if n == 0 else '>'}&-" for n in closed)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2), ()])
def test_closed_ones_lead_nowhere(closed: tuple[int, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-E", "-c", SCRIPT, descriptors.__file__, str(tmp_path / "o")]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closing(closed)}', "sh", *command],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert ("lost" in done.stdout, "lost" in done.stderr) == (1 not in closed, 2 not in closed)
    descriptor, read, devices, inherited = json.loads((tmp_path / "o").read_text())
    nowhere = Path(os.devnull).stat().st_rdev
    assert descriptor > 2 and read == "" and inherited == [True] * 3
    assert all(devices[n] == nowhere for n in closed)


@pytest.mark.slow
def test_a_command_with_all_of_them_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*DIGITS, "--method", "magnitude", "--rewind-epochs", "0", "--epochs", "1"]) == 0
    command = [
        sys.executable,
        *["-m", "sparsecore", "train", "t", "--engine", "eager", "--metrics", "/dev/stderr"],
    ]
    command += ["--json", "j", "--save", "w", "--checkpoint", "c"]
    done = subprocess.run(["sh", "-c", '"$@" 0<&- 1>&- 2>&-', "sh", *command])
    assert done.returncode == 0
    assert json.loads(Path("j").read_text())["epochs"] and Path("w").stat().st_size
    assert {p.name for p in tmp_path.iterdir()} == {"t", "j", "w", "c"}
