"""The fuzz suite in short, and that it would see a broken promise."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

from tests.hostile import disk, judge, mutations
from tests.hostile.faults import Changes, full
from tests.hostile.sandbox import Input, Outcome, outcomes

ROOT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by /proc")


@linux
@pytest.mark.slow
def test_no_hostile_input_breaks_a_promise() -> None:
    """A few of each kind; `make fuzz` tries thousands."""
    command = [sys.executable, "-m", "tests.hostile", "--count", "40", "--seed", "1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert found.stdout.splitlines()[-1].split()[2] == "40"


def ended(run, seconds: float = 12.0) -> Outcome:
    (found,) = outcomes([Input("k", 0, run, seconds)])
    return found


def raises(seed: int, folder: Path) -> str:
    raise KeyError("records")


def dies(seed: int, folder: Path) -> str:
    faulthandler.disable()  # pytest's
    os.kill(os.getpid(), signal.SIGSEGV)
    return "fine"


def hangs(seed: int, folder: Path) -> str:
    time.sleep(60)
    return "fine"


def exits(seed: int, folder: Path) -> str:
    sys.exit(0)


def reads(seed: int, folder: Path) -> str:
    assert folder == Path.cwd() and not any(folder.iterdir())
    return "refused" if sys.stdin.read() == "" else "fine"


@linux
@pytest.mark.parametrize(
    ("run", "how", "why"),
    [
        (reads, "refused", ""),
        (raises, "failed", "KeyError"),
        (dies, "failed", "SIGSEGV"),
        (hangs, "failed", "more than 0.5 s"),
        (exits, "failed", "SystemExit"),
    ],
)
def test_inputs_are_told_apart_by_how_they_end(run, how: str, why: str) -> None:
    found = ended(run, 0.5 if run is hangs else 12)
    assert found.how == how and why in found.why


@linux
def test_memory_is_watched() -> None:
    """In a process of its own, as fuzzing is: what hundreds of tests have left behind would count in by chance."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/hostile/watched_memory.py",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-8000:]


def test_a_command_ends_by_one_line_or_is_a_failure() -> None:
    said = judge.Said()
    said.err = "warning: beside\nerror: one line\n"
    assert judge.judged(2, said, []) == "refused"
    for code, err in [
        (2, ""),
        (2, "error: one\nerror: two\n"), (1, "error: one\n"), (0, "error: one\n"), (2, "Traceback\nerror: x\n"),
        (2, "error: \x1b[31mred\n"), (2, "error: \u202egnp\n"), (130, "error: x\n"),
    ]:  # fmt: skip
        said.err = err
        with pytest.raises(judge.Failure):
            judge.judged(code, said, [])


def test_a_call_ends_by_a_documented_exception() -> None:
    assert judge.call(lambda: int("x")) == "refused" and judge.call(lambda: None) == "fine"
    with pytest.raises(KeyError):
        judge.call(lambda: {}["x"])
    with pytest.raises(judge.Failure, match="without a word"):
        judge.call(lambda: (_ for _ in ()).throw(ValueError()))


def loads_elsewhere(seed: int, folder: Path) -> str:
    guard = judge.Guard(folder)
    guard.strict = True
    list(Path("/etc").iterdir())
    guard.check()
    return "fine"


def leaves_a_file(seed: int, folder: Path) -> str:
    changes = Changes(folder)
    with changes.fault(full, 2):
        (folder / "a").write_text("")
        try:
            (folder / "b").write_text("")
        except OSError as error:
            return "refused" if error.errno == 28 and not (folder / "b").exists() else "fine"
    return "fine"


@linux
def test_the_world_is_watched() -> None:
    assert "looked into /etc" in ended(loads_elsewhere).why
    assert ended(leaves_a_file).how == "refused"


def small(seed: int, folder: Path) -> str:
    with disk.small_files(10):
        try:
            Path("a").write_text("x" * 100)
        except OSError:
            Path("b").write_text("x" * 10)
            return "refused"
    return "fine"


@linux
def test_files_can_be_kept_small() -> None:
    assert ended(small).how == "refused"


def test_contents_are_sealed_by_a_right_digest(tmp_path: Path) -> None:
    """Otherwise every mutation would be refused for its digest alone."""
    from sparsecore import safefile

    path = tmp_path / "f"
    safefile.write(path, {"a": torch.ones(2, 3)}, {"x": [1, {"y": "é"}]}, kind="checkpoint")
    contents = mutations.Contents.read(path)
    assert contents is not None
    path.write_bytes(contents.sealed())
    tensors, meta = safefile.read(path, kind="checkpoint")
    assert torch.equal(tensors["a"], torch.ones(2, 3)) and meta == {"x": [1, {"y": "é"}]}


def test_mutations_depend_on_their_seed_alone(tmp_path: Path) -> None:
    from sparsecore import safefile

    path = tmp_path / "f"
    safefile.write(path, {"a": torch.ones(2, 3)}, {"x": [1, 2.5]}, kind="checkpoint")
    found = [mutations.spoiled(path, Random(seed)) for seed in range(50)]
    assert found == [mutations.spoiled(path, Random(seed)) for seed in range(50)]
    assert len(set(found)) > 30
