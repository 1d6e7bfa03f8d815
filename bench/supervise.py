"""Runs stages within a budget of seconds, in slices that go on: `progress.jsonl` says what is done.

Everything runs in processes of its own, so that what crashes or hangs costs its case alone.  On disk as it
comes, in one folder: log.txt, progress.jsonl, tests.jsonl, summary.md, the rows; `runs/` is what goes on.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime, monotonic, perf_counter, sleep

from . import kernel_cache, summary
from .stages import Commands, Journal, Measured, Setting, Stage, Tests

ROOT = Path(__file__).resolve().parent.parent
LEAST = 5.0  # seconds below which nothing is begun: a process has hardly imported torch by then
START = 120.0  # seconds after which a worker that has begun no case hangs
PACK_EVERY = 60.0  # seconds


def run(
    module: str, setting: Setting, *, budget: float, commit: str, cache: Path | None = None
) -> int:
    """Runs what is left of a module's stages; returns 0, 1 if anything failed, 3 if anything is left.

    Args:
        module: has `stages(setting)`; the last one gets what the others leave.
        budget: seconds, from the start of this process.
        commit: what is run; a folder holds one.
        cache: folder of the archive of compiled kernels; None leaves Triton its own cache.

    Errors: ValueError for a folder of another commit, device or size.
    """
    end = monotonic() + budget - _age()
    setting.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(setting.out)
    _same_run(journal, setting, commit)
    journal.add("call", budget=budget)
    stages: list[Stage] = importlib.import_module(module).stages(setting)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: processes end with us
    with _kernels(cache) as kernels:
        supervisor = _Supervisor(module, setting, stages, journal, kernels, commit, end)
        supervisor.everything()
    return supervisor.tell()


def _same_run(journal: Journal, setting: Setting, commit: str) -> None:
    now = {"commit": commit, "device": setting.device, "quick": setting.quick}
    first = next((e for e in journal.events() if e["event"] == "run"), None)
    if first is None:
        journal.add("run", **now)
        first = now
    if differ := [f"{k} {first[k]}, now {v}" for k, v in now.items() if first[k] != v]:
        raise ValueError(
            f"{setting.out} holds another run ({'; '.join(differ)}): name another OUT or remove it"
        )


class _Kernels:
    """The cache of compiled kernels of all processes, and the archive that it is kept in."""

    def __init__(self, folder: Path, archive: Path) -> None:
        self.folder, self.archive = folder, archive
        kernel_cache.restore(archive, folder)
        self.packed, self.newest = monotonic(), kernel_cache.newest(folder)
        self.seconds = 1.0  # of the last time

    def pack(self) -> None:
        """Archives what has been compiled since."""
        newest, start = kernel_cache.newest(self.folder), monotonic()
        if newest > self.newest:
            try:
                kernel_cache.pack(self.folder, self.archive)
            except OSError as error:  # a full disk costs the archive, not the run
                print(f"kernels were not archived: {error}", file=sys.stderr)
            self.newest, self.seconds = newest, monotonic() - start
        self.packed = monotonic()


@contextlib.contextmanager
def _kernels(cache: Path | None) -> Iterator[_Kernels | None]:
    if cache is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kernels", ignore_cleanup_errors=True) as folder:
        yield _Kernels(Path(folder), cache / "kernels.tar.xz")


class _Supervisor:
    def __init__(
        self, module: str, setting: Setting, stages: Sequence[Stage], journal: Journal,
        kernels: _Kernels | None, commit: str, end: float,
    ) -> None:  # fmt: skip
        self.module, self.setting, self.stages, self.journal = module, setting, stages, journal
        self.kernels, self.budget_end = kernels, end
        self.worker: subprocess.Popen[bytes] | None = None
        self.since = monotonic()  # the journal's last event
        self.log, self.tests = setting.out / "log.txt", setting.out / "tests.jsonl"
        self.env = os.environ | {"BENCH_COMMIT": commit, "PYTHONUNBUFFERED": "1"}
        if kernels is not None:
            self.env["TRITON_CACHE_DIR"] = str(kernels.folder)

    @property
    def end(self) -> float:
        """When to stop; the rest of the budget is for the archive."""
        return self.budget_end - (0.5 if self.kernels is None else 1 + 2 * self.kernels.seconds)

    def everything(self) -> None:
        """A first turn within each stage's share, a second for what that left, and then the last stage."""
        budget, (*first, last) = self.end - monotonic(), self.stages
        turns = [*((s, s.share) for s in first), *((s, 1.0) for s in first), (last, 1.0)]
        broken: set[str] = set()
        self._cut()  # what a kill left, in an earlier call
        try:
            for stage, share in turns:
                until = min(self.end, monotonic() + share * budget)
                if stage.name in broken or (until - monotonic() < LEAST and not self.setting.quick):
                    continue
                start = perf_counter()
                if problem := self._turn(stage, until):
                    broken.add(stage.name)
                    self.journal.add("broken", stage=stage.name, reason=f"{problem}; see log.txt")
                seconds = round(perf_counter() - start, 1)
                self.journal.add("turn", stage=stage.name, seconds=seconds)
        finally:
            if self.worker is not None:
                _kill(self.worker)
            self._cut()
            self.tell()
            if self.kernels is not None:
                self.kernels.pack()

    def tell(self) -> int:
        """Writes the summary; returns the exit code."""
        return summary.write(self.setting.out, self.stages, self.journal)

    # --- Stages -------------------------------------------------------------------------------------

    def _turn(self, stage: Stage, until: float) -> str:
        """What kept the stage from going on, as opposed to a case of it; empty if nothing did."""
        if isinstance(stage, Tests):
            return self._tests(stage, until)
        if isinstance(stage, Commands):
            return self._commands(stage, until)
        assert isinstance(stage, Measured)
        return self._measured(stage, until)

    def _measured(self, stage: Measured, until: float) -> str:
        """Hands the stage to the worker, or to another when that dies, until all cases or the turn have ended."""
        while monotonic() < until and (left := self._left(stage)):
            fresh = self.worker is None
            if self.worker is None:
                argv = (sys.executable, "-m", "bench.worker", self.module, self.setting.text())
                self.worker = self._start(argv, stdin=subprocess.PIPE)
            assert self.worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its exit code says why
                self.worker.stdin.write(f"{stage.name}\n".encode())
                self.worker.stdin.flush()
            code = self._wait(self.worker, until, stage.limit, lambda: not self._left(stage))
            if not self._left(stage):
                break
            _kill(self.worker)
            self.worker, event = None, self.journal.running()
            if code is None and monotonic() >= until:
                self._cut(stage.limit)
            elif event is not None:
                self._end(stage, event["case"], self._how(code, stage))
            elif fresh and self._left(stage) == left:
                return f"no case began, the worker {self._how(code, stage)}"
            self.tell()
        return ""

    def _left(self, stage: Measured) -> set[str]:
        return set(stage.cases) - self.journal.ended(stage.name).keys()

    def _commands(self, stage: Commands, until: float) -> str:
        ended = self.journal.ended(stage.name)
        for command in stage.work:
            if command.name in ended or monotonic() >= until:
                continue
            self.journal.add("begin", stage=stage.name, case=command.name)
            told = self.log.stat().st_size if self.log.exists() else 0
            code = self._process(command.argv, until, stage.limit)
            if code is None and monotonic() >= until:
                self._cut(stage.limit)
            elif code == 0:
                self._end(stage, command.name)
            else:
                said = self.log.read_bytes()[told:].decode(errors="replace").strip().splitlines()
                self._end(
                    stage, command.name, "\n".join([self._how(code, stage), *said[-4:]])[:600]
                )
            self.tell()
        return ""

    def _tests(self, stage: Tests, until: float) -> str:
        if any(e["event"] == "tested" and e["stage"] == stage.name for e in self.journal.events()):
            return ""
        notes = ("--notes", str(self.tests), "--notes-stage", stage.name)
        argv = (
            sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
            "--max-worker-restart=1000", "-p", "bench.pytest_notes", *notes,
            f"--test-seconds={stage.limit:g}", *stage.arguments,
        )  # fmt: skip
        code = self._process(argv, until)
        if code in (0, 1, 5):  # passed, failed, nothing left
            self.journal.add("tested", stage=stage.name)
        elif code is not None:
            return f"pytest {self._how(code, stage)}"
        return ""

    @staticmethod
    def _how(code: int | None, stage: Stage) -> str:
        if code is None:
            return f"took longer than {stage.limit:g} s"
        if code >= 0:
            return f"ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"

    def _end(self, stage: Stage, case: str, reason: str = "") -> None:
        how = {"reason": reason} if reason else {}
        seconds = round(monotonic() - self.since, 1)
        event = "failed" if reason else "passed"
        self.journal.add(event, stage=stage.name, case=case, seconds=seconds, **how)

    def _cut(self, limit: float = float("inf")) -> None:
        """Takes back the case that was killed, with the rows it wrote, to run it again.

        What was cut before and has had twice its limit in all fails: it would take every later turn.
        """
        event = self.journal.running()
        if event is None:
            return
        where = {"stage": event["stage"], "case": event["case"]}
        seconds = round(monotonic() - self.since, 1)
        cuts = [e for e in self.journal.events() if e["event"] == "cut"]
        before = [e["seconds"] for e in cuts if where.items() <= e.items()]
        if before and sum(before) + seconds > 2 * limit:
            turns = f"{sum(before) + seconds:.0f} s in {1 + len(before)} turns"
            self.journal.add("failed", **where, seconds=seconds, reason=f"did not end in {turns}")
            return
        if "file" in event:
            path = self.setting.out / event["file"]
            lines = path.read_text().splitlines(keepends=True)
            whole = path.with_name(path.name + ".new")
            whole.write_text("".join(lines[: 1 + event["rows"]]))
            whole.replace(path)
        self.journal.add("cut", **where, seconds=seconds)

    # --- Processes ----------------------------------------------------------------------------------

    def _process(
        self, argv: Sequence[str], until: float, limit: float = float("inf")
    ) -> int | None:
        """Runs a process to its end; see `_wait`."""
        process = self._start(argv, stdin=subprocess.DEVNULL)
        try:
            return self._wait(process, until, limit)
        finally:
            _kill(process)

    def _start(self, argv: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            log.write(f"== {' '.join(argv)}\n".encode())
            log.flush()
            return subprocess.Popen(
                argv, stdin=stdin, stdout=log, stderr=log, cwd=ROOT, env=self.env,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _wait(
        self, process: subprocess.Popen[bytes], until: float, limit: float,
        done: Callable[[], bool] = lambda: False,
    ) -> int | None:  # fmt: skip
        """Its exit code; None if it runs at `until`, `limit` seconds after the journal's last event, or when `done`."""
        self.since, count = monotonic(), len(self.journal.events())
        while process.poll() is None:
            events = len(self.journal.events())
            if events != count:
                self.since, count = monotonic(), events
                self.tell()
            allowed = limit if self.journal.running() else max(limit, START)
            if done() or monotonic() >= until or monotonic() - self.since > allowed:
                return None
            if self.kernels is not None and monotonic() - self.kernels.packed > PACK_EVERY:
                self.kernels.pack()
            sleep(0.1)
        return process.returncode


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _age() -> float:
    """Seconds since this process began: it imports torch before it comes to read a clock."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks, frequency = int(fields[19]), os.sysconf("SC_CLK_TCK")
    return max(0.0, clock_gettime(CLOCK_BOOTTIME) - ticks / frequency)


def _end_with_parent() -> None:
    """In a new process: it is killed when the supervisor is."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
