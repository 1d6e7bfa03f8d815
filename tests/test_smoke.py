"""Which tests `gpu and smoke` are: its list is whole and in order, whatever tests are called."""

import subprocess
import sys
from pathlib import Path

import pytest
from smoke import SMOKE

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_family_is_in_it_and_graphs_come_first() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "-m",
        "gpu and smoke",
        "--collect-only",
        "-q",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]
    families = []
    for name in found:
        family = next(f for f, starts in SMOKE.items() if name.startswith(starts))
        families += [] if families[-1:] == [family] else [family]
    assert families == list(SMOKE)
    for starts in SMOKE.values():
        for start in starts:  # larger shapes are there on a GPU alone
            assert "x=(12608" in start or any(name.startswith(start) for name in found), start
