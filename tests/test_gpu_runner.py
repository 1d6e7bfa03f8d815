"""`make gpu` without a GPU: every stage, tiny, with cases that go wrong; the archive of compiled kernels."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from time import sleep

import pytest

from bench import comparison, kernel_cache, rows, supervise
from bench.__main__ import main
from bench.rows import read
from bench.stages import Journal, Setting, lines_of
from tests.gpu_stages import COMMIT, stages

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_all_stages_in_slices(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first call is killed in the middle, the second goes on, the third finds nothing to do."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    env = {name: value for name, value in ENV.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_stages", str(out), str(cache)]
    first = subprocess.Popen(command, cwd=ROOT, env=env)
    journal = Journal(out)
    while not (running := journal.running()) or running["stage"] != "training steps":
        assert first.poll() is None
        sleep(0.05)
    first.kill()
    first.wait()
    sleep(0.3)
    before = len(journal.events())
    assert journal.running() == running, "the worker outlived its supervisor"
    assert subprocess.run(command, cwd=ROOT, env=env, check=False).returncode == 1

    every = stages(Setting(out, "cpu", quick=True))
    ended = [e for e in journal.events() if e["event"] in ("passed", "failed")]
    assert set(Counter((e["stage"], e["case"]) for e in ended).values()) == {1}
    failed = {e["case"]: e["reason"] for e in ended if e["event"] == "failed"}
    assert failed == {
        "fails": "AssertionError: expected 1\ngot 2",
        "crashes": "was ended by SIGSEGV",
        "hangs": "took longer than 5 s",
    }
    for stage in every:
        assert set(stage.cases) == journal.ended(stage.name).keys()
    again = [e for e in journal.events()[before:] if e["event"] == "begin"]
    assert (again[0]["stage"], again[0]["case"]) == ("training steps", running["case"])
    tests = lines_of(out / "tests.jsonl")
    assert [note["outcome"] for note in tests if "test" in note] == ["passed", "passed"]
    # Rows of what passed, what failed, and what was begun twice are there, once.
    assert [r["provider"] for r in read(out / "cpu-injected.csv")] == [
        "crashes", "hangs", "well", "fails",
    ]  # fmt: skip
    for suite, parts in {
        "search-quick": {"ceiling", "network", "ops", "strategy", "layer"},
        "ticket-quick": {"model", "op", "conv"},
    }.items():
        found = read(out / f"cpu-{suite}.csv")
        assert {r["case"].partition("/")[0] for r in found} == parts
        keys = Counter((r["case"], r["provider"], r["mode"], r["metric"]) for r in found)
        assert set(keys.values()) == {1}
    assert len([p for p in out.iterdir() if p.is_file()]) <= 8
    summary = (out / "summary.md").read_text()
    assert f"Commit {COMMIT} on cpu, quick, call 2" in summary and "Exit code 1" in summary
    for told in (
        "**crashes**: was ended by SIGSEGV",
        "| injected | 1 | 3 | 0 | 0 |",
        "without compute-",
    ):
        assert told in summary

    length = len(journal.events())
    setting, handler = Setting(out, "cpu", quick=True), signal.getsignal(signal.SIGTERM)
    try:
        assert supervise.run("tests.gpu_stages", setting, budget=1e6, commit=COMMIT) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not [e for e in journal.events()[length:] if e["event"] == "begin"]
    with pytest.raises(ValueError, match=f"commit {COMMIT}, now other.*name another OUT"):
        supervise.run("tests.gpu_stages", setting, budget=60, commit="other")
    capfd.readouterr()


def test_rows_of_a_case_that_was_killed_are_taken_back(tmp_path: Path) -> None:
    """It runs again, and would add them twice; half a line of the journal is none."""
    (tmp_path / "cpu-x.csv").write_text("case\nbefore\nof it\nof i")
    journal = Journal(tmp_path)
    journal.add("run", commit=COMMIT, device="cpu", quick=True)
    journal.add("begin", stage="x", case="it", file="cpu-x.csv", rows=1)
    with journal.path.open("a") as file:
        file.write('{"event": "pas')
    handler = signal.getsignal(signal.SIGTERM)
    try:
        setting = Setting(tmp_path, "cpu", quick=True)
        assert supervise.run("bench.comparison", setting, budget=0.0, commit=COMMIT) == 3
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (tmp_path / "cpu-x.csv").read_text() == "case\nbefore\n"
    assert journal.running() is None
    assert [e["event"] for e in journal.events()][:4] == ["run", "begin", "call", "killed"]


# --- Tests ------------------------------------------------------------------------------------------

BROKEN = """
import ctypes, time

def test_well(): pass
def test_fails(): assert 1 + 1 == 3, "two"
def test_crashes(): ctypes.string_at(0)
def test_hangs(): time.sleep(1000)
def test_after(): pass
"""


def test_a_test_that_crashes_or_hangs_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text(BROKEN)
    notes = tmp_path / "notes.jsonl"
    command = [
        sys.executable, "-m", "pytest", "-q", "-n", "1", "--noconftest", "-p", "no:cacheprovider",
        "-p", "bench.pytest_notes", "--notes", str(notes), "--notes-stage", "s", "--test-seconds", "1",
        f"--rootdir={tmp_path}", str(tmp_path / "test_broken.py"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [note for note in lines_of(notes) if "test" in note]
    outcomes = {note["test"].rpartition("_")[2]: note for note in found}
    assert {name: note["outcome"] for name, note in outcomes.items()} == {
        "well": "passed", "fails": "failed", "crashes": "failed", "hangs": "failed", "after": "passed",
    }  # fmt: skip
    assert outcomes["fails"]["reason"].startswith("AssertionError: two\n")
    assert "crashed" in outcomes["crashes"]["reason"]
    assert lines_of(notes)[0] == {"stage": "s", "all": 5}
    # Again: nothing is left, which pytest says by 5; a note that is taken back is run again.
    assert (
        subprocess.run(command, capture_output=True, cwd=ROOT, env=ENV, check=False).returncode == 5
    )
    kept = [note for note in lines_of(notes) if "well" not in note.get("test", "")]
    notes.write_text("".join(json.dumps(note) + "\n" for note in kept))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout


# --- The archive of compiled kernels ----------------------------------------------------------------

COMPILE = """
import sys, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.static import static_cases
case = static_cases()[0]
knobs.compilation.listener = lambda **told: print("loaded" if told["cache_hit"] else "compiled")
options = {name: value for name, value in case.options.items() if name != "waive"}
source = ASTSource(case.function, case.signature, case.constexprs, case.attributes)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(len(made.asm["cubin"]))
"""


def test_a_compiled_kernel_is_found_in_another_folder(tmp_path: Path) -> None:
    """Compiled ahead of time, packed, laid elsewhere: loaded there with the same machine code."""
    archive, here, there = tmp_path / "a" / "k.tar.xz", tmp_path / "here", tmp_path / "there"

    def compiled(folder: Path) -> list[str]:
        env = {name: value for name, value in ENV.items() if name != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = str(folder)
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    how, size = compiled(here)
    assert how == "compiled"
    kernel_cache.pack(here, archive)
    assert kernel_cache.restore(archive, there) == 1
    names = {path.suffix for path in there.rglob("*.*")}
    assert names == {".cubin", ".json"}
    here.rename(tmp_path / "gone")
    assert compiled(there) == ["loaded", size]
    # Without the rewritten paths it would be compiled again.
    (group,) = there.rglob("__grp__*")
    group.write_text(group.read_text().replace(str(there), str(here)))
    assert compiled(there) == ["compiled", size]


def test_the_archive_is_whole_and_small(tmp_path: Path) -> None:
    cache, archive, other = tmp_path / "cache", tmp_path / "k.tar.xz", tmp_path / "other"
    for age in range(4):
        folder = cache / f"KEY{age}"
        folder.mkdir(parents=True)
        files = {"k.cubin": os.urandom(40_000), "k.json": b"{}", "k.ttir": b"text"}
        paths = {name: str(folder / name) for name in files}
        files["__grp__k.json"] = json.dumps({"child_paths": paths}).encode()
        for name, data in files.items():
            (folder / name).write_bytes(data)
            os.utime(folder / name, (1e9 - age, 1e9 - age))
    (cache / "HALF").mkdir()
    (cache / "HALF" / "k.cubin").write_bytes(b"no group yet")
    (cache / "LAUNCH").mkdir()
    (cache / "LAUNCH" / "launcher.cpython-312.so").write_bytes(b"code")
    assert kernel_cache.pack(cache, archive, limit=100_000) <= 100_000
    assert kernel_cache.restore(archive, other) == 3
    assert {path.name for path in other.iterdir()} == {"KEY0", "KEY1", "LAUNCH"}  # the newest
    group = json.loads((other / "KEY0" / "__grp__k.json").read_text())
    assert group == {"child_paths": {n: str(other / "KEY0" / n) for n in ("k.cubin", "k.json")}}
    assert (other / "KEY0" / "k.cubin").stat().st_mtime == 1e9
    assert [path.name for path in tmp_path.glob("*.xz*")] == ["k.tar.xz"]
    # A damaged archive and none are no kernels.
    archive.write_bytes(archive.read_bytes()[:-100])
    assert kernel_cache.restore(archive, tmp_path / "third") == 0
    assert kernel_cache.restore(tmp_path / "none", tmp_path / "third") == 0


@pytest.mark.parametrize(
    "group", ["not JSON", '{"child_paths": {}}', "[1]", '["../k.cubin"]', '[""]']
)
def test_an_archive_of_others_is_left_out(
    group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "group").write_text(group)
    with tarfile.open(tmp_path / "k.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "group", "KEY/__grp__k.json")
    assert kernel_cache.restore(tmp_path / "k.tar.xz", tmp_path / "cache") == 0
    assert "kernel cache left out" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_archived_costs_the_archive_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = kernel_cache.Kernels(tmp_path, tmp_path / "k.tar.xz")
    tmp_path.rename(tmp_path.with_name("moved"))
    kernels.pack()
    assert "kernels were not archived" in capsys.readouterr().err


# --- The command line -------------------------------------------------------------------------------


def test_make_hands_everything_over(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $BENCH_COMMIT $*"\nexit 3\n')
    python.chmod(0o755)
    given = [f"PY={python}", "OUT=out", "DATA=there", "CACHE=c", "BUDGET=60", "COMMIT=abc"]
    for target, told in {
        "gpu": "ran abc -m bench gpu --device cuda --budget 60 --cache c --data-dir there --out out\n",
        "compare-gpu": "ran abc -m bench compare --device cuda --budget 60 --cache c --data-dir there "
        "--out out/compare-resnet20\n",
    }.items():
        command = ["make", target, *given]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert told in done.stdout and "Error 3" in done.stderr
        # Without COMMIT the environment's name stays.
        env = ENV | {"BENCH_COMMIT": "def"}
        done = subprocess.run(
            command[:-1], capture_output=True, text=True, cwd=ROOT, env=env, check=False
        )
        assert told.replace("abc", "def") in done.stdout


def test_a_commit_that_files_differ_from_is_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart from rows: a suite's would make the next one's dirty."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    tracked = [tmp_path / "kernels" / "k.py", tmp_path / "bench" / "results" / "rows.csv"]
    for path in tracked:
        path.parent.mkdir(parents=True)
        path.touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "bench" / "rows.py"))
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    clean = rows.commit()
    tracked[1].write_text("a row")
    (tmp_path / "untracked").touch()
    assert clean and rows.commit() == clean
    tracked[0].write_text("changed")
    assert rows.commit() == f"{clean}-dirty"
    monkeypatch.setenv("BENCH_COMMIT", clean)
    assert rows.commit() == clean


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gpu", "--device", device])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --device {device}: expected")


def test_a_python_without_torch_is_one_line() -> None:
    script = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('bench', run_name='__main__')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "name a Python that has the packages" in line


def test_a_run_names_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(rows, "_said_by", lambda *command: "")
    command = ["gpu", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 2
    assert "name it by BENCH_COMMIT" in capsys.readouterr().err


def test_the_comparison_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut in the middle, it goes on and says how much is left."""
    setting = Setting(tmp_path, "cpu", quick=True)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(supervise, "age", lambda: 0.0)
    try:
        assert supervise.run("bench.comparison", setting, budget=1.0, commit=COMMIT) == 3
        summary = (tmp_path / "summary.md").read_text()
        assert "0 of 3 cells" in summary and "comparison: 1 of 1, from compare on" in summary
        assert supervise.run("bench.comparison", setting, budget=1e3, commit=COMMIT) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "3 of 3 cells" in (tmp_path / "summary.md").read_text()
    # The real one, as data: 3 seeds of a dense partner and of 6 methods at 3 sparsities.
    (stage,) = comparison.stages(Setting(tmp_path, "cuda", data_dir="/there"))
    assert "of 57 cells" in stage.note()
    argv = stage.work[0].argv
    assert argv[argv.index("--data-dir") :][:2] == ("--data-dir", "/there") and "amp=bf16" in argv
