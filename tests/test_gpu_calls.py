"""Whole calls of `make gpu` that go wrong: killed, without data, two at once, tests that cannot be collected."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest

from bench.__main__ import main
from bench.stages import Command, Commands, Journal, Setting, Stage, lines_of
from bench.stages import Tests as OfTests  # pytest would collect it
from tests.gpu_stages import COMMIT

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}

CALL = """
import pickle, sys
from types import SimpleNamespace
from bench import supervise
given, supervise.START = pickle.load(sys.stdin.buffer)
sys.modules["given"] = SimpleNamespace(stages=lambda setting: given[1:])
sys.exit(supervise.run("given", given[0], budget=60.0, commit="0123abc"))
"""


class Calls:
    """Calls of `stages` in one folder, each a process, as `make gpu` is."""

    def __init__(self, out: Path) -> None:
        self.setting, self.journal = Setting(out, "cpu", quick=True), Journal(out)
        self.stages: list[Stage] = []

    def __call__(self, start: float = 60.0) -> tuple[int, list[str]]:
        """The exit code, and the stages a case of which has begun."""
        before = len(self.journal.events())
        given = pickle.dumps(((self.setting, *self.stages), start))
        command = [sys.executable, "-c", CALL]
        code = subprocess.run(command, input=given, cwd=ROOT, env=ENV, check=False).returncode
        began = [e for e in self.journal.events()[before:] if e["event"] == "begin"]
        return code, [e["stage"] for e in began]

    @property
    def summary(self) -> str:
        return (self.setting.out / "summary.md").read_text()


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path / "out")


def shell(name: str, script: str, limit: float = 60.0) -> Commands:
    return Commands(name, 0.5, limit, work=[Command("it", ("sh", "-c", script))])


def pytest_on(path: Path, text: str, processes: int = 0) -> OfTests:
    path.write_text(text)
    how = ("-n", str(processes), "--noconftest", f"--rootdir={path.parent}", str(path))
    return OfTests("tests", 0.5, 60.0, arguments=how)


WELL = shell("well", "true")
TAKES_ALL_DOWN = "{ kill -9 $PPID; sleep 60; }"
TEST_TAKES_ALL_DOWN = """
import os, time
from pathlib import Path

def test_kills():
    Path(__file__).with_name("pid").write_text(str(os.getpid()))
    supervisor = Path(f"/proc/{os.getppid()}/stat").read_text().split()[3]
    os.kill(int(supervisor), 9)
    time.sleep(60)
"""


def require_dead(pid: str) -> None:
    """Killed at once, perhaps not yet waited for."""
    status = Path("/proc") / pid / "status"
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        sleep(0.05)
    raise AssertionError("it outlived what started it")


@pytest.mark.parametrize("kind", ["command", "command that goes on", "tests"])
def test_what_takes_the_whole_call_down_twice_fails(
    kind: str, calls: Calls, tmp_path: Path
) -> None:
    if kind == "tests":
        heavy: Stage = pytest_on(tmp_path / "test_it.py", TEST_TAKES_ALL_DOWN, processes=1)
    else:
        heavy = shell("heavy", TAKES_ALL_DOWN, float("inf") if "on" in kind.split() else 60.0)
    calls.stages = [heavy, WELL]
    for _ in range(2):
        assert calls()[0] == -signal.SIGKILL
        if kind == "tests":
            require_dead((tmp_path / "pid").read_text())
    assert calls() == (1, ["well"])
    assert "twice the whole call was killed while it ran" in calls.summary
    assert calls() == (1, [])


def test_what_takes_calls_down_and_gets_on_runs_behind_the_others(calls: Calls) -> None:
    made = calls.setting.runs / "made"
    script = (
        f"mkdir -p {made.parent}; echo >> {made}; [ $(wc -l < {made}) = 4 ] || {TAKES_ALL_DOWN}"
    )
    calls.stages = [shell("heavy", script, float("inf")), WELL]
    assert calls() == calls() == (-signal.SIGKILL, ["heavy"])
    assert calls() == (-signal.SIGKILL, ["well", "heavy"])
    assert calls() == (0, ["heavy"])


def test_bad_input_fails_in_its_call_alone(calls: Calls, tmp_path: Path) -> None:
    data = tmp_path / "data"
    script = f"[ -e {data} ] || {{ echo error: no data; exit 2; }}"
    calls.stages = [shell("needs data", script), shell("fails", "exit 1"), WELL]
    assert calls() == (1, ["needs data", "fails", "well"])
    assert "ended with exit code 2\n  error: no data" in calls.summary
    data.touch()
    assert calls() == (1, ["needs data"])
    assert "| needs data | 1 | 0 |" in calls.summary and "| fails | 0 | 1 |" in calls.summary


def test_a_folder_is_of_one_call_at_a_time(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.stages = [WELL]
    assert calls()[0] == 0
    command = ["gpu", "--quick", "--device", "cpu", "--out", str(calls.setting.out)]
    monkeypatch.setenv("BENCH_COMMIT", COMMIT)
    before = calls.journal.events()
    with calls.journal.alone():
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another call is at work" in line
    assert calls.journal.events() == before
    with calls.journal.alone():  # given back
        pass


def test_tests_that_cannot_be_collected_fail(calls: Calls, tmp_path: Path) -> None:
    """A module that does not import, and a collection that never ends."""
    bad = pytest_on(tmp_path / "test_bad.py", "import no_such_module", processes=1)
    (tmp_path / "test_good.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_skipped(): pytest.skip()\n"
        "@pytest.mark.xfail\ndef test_known(): assert False\n"
    )
    both = (*bad.arguments, str(tmp_path / "test_good.py"))
    calls.stages = [OfTests("tests", 0.5, 60.0, arguments=both), WELL]
    assert calls()[0] == 1
    assert "**test_bad.py**: E   ModuleNotFoundError: No module named 'no_such" in calls.summary
    assert "| tests | 1 | 1 | 2 | 0 |" in calls.summary
    notes = lines_of(calls.setting.out / "tests.jsonl")
    assert {note["all"] for note in notes if "all" in note} == {4}
    assert calls() == (1, [])  # as other tests, not again

    hangs = pytest_on(tmp_path / "test_hangs.py", "import time; time.sleep(1000)", processes=1)
    calls = Calls(tmp_path / "hangs")
    calls.stages = [hangs, WELL]
    assert calls(start=2.0) == (1, ["tests", "well"])
    assert "pytest noted nothing for 2 s" in calls.summary


def test_exit_code_1_without_a_failure_is_no_end(calls: Calls, tmp_path: Path) -> None:
    ends = "import os\ndef test_ends(): os._exit(1)"
    calls.stages = [pytest_on(tmp_path / "test_ends.py", ends), WELL]
    assert calls() == (1, ["tests", "well"])
    assert "exit code 1 and noted no failure" in calls.summary
    assert calls() == (1, ["tests"])


def test_what_checks_start_ends_with_them(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from bench import checks
Path(sys.argv[1]).write_text(str(checks.started(["sleep", "60"], lambda: True).pid))
os.kill(os.getpid(), 9)
"""
    told = tmp_path / "pid"
    command = [sys.executable, "-c", script, str(told)]
    assert subprocess.run(command, cwd=ROOT, env=ENV, check=False).returncode == -signal.SIGKILL
    require_dead(told.read_text())
