"""Runs stages within a budget of seconds, in slices that go on: `progress.jsonl` says what is done.

Everything runs in processes of its own, so that what crashes or hangs costs its case alone.  On disk as it
comes, in one folder: log.txt, progress.jsonl, tests.jsonl, summary.md, the rows; `runs/` is what goes on.
"""

import contextlib
import hashlib
import importlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, perf_counter, sleep

from . import kernel_cache, summary
from .kernel_cache import Kernels
from .processes import age, end_with_parent, kill_group
from .stages import WHOLE, Commands, Event, Journal, Measured, Setting, Stage, Tests, lines_of

ROOT = Path(__file__).resolve().parent.parent
LEAST = 5.0  # seconds below which nothing is begun: a process has hardly imported torch by then
START = 120.0  # seconds after which a process that has begun no case hangs
BAD_INPUT = 2  # exit code of a command that could not begin, for lack of data or a network
PACK_EVERY = 60.0  # seconds
Begun = Callable[[], object]  # whether START is over


def run(
    module: str, setting: Setting, *, budget: float, commit: str, cache: Path | None = None
) -> int:
    """Runs what is left of a module's stages; returns 0, 1 if anything failed, 3 if anything is left.

    Args:
        module: has `stages(setting)`; the last one gets what the others leave.
        budget: seconds, from the start of this process.
        commit: what is run; a folder holds one.
        cache: folder of the archive of compiled kernels; None leaves Triton its own cache.

    Errors: ValueError for a folder of another commit, device or size, or one that another call is at work in.
    """
    end = monotonic() + budget - age()
    setting.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(setting.out)
    with journal.alone():
        _same_run(journal, setting, commit)
        journal.add("call", budget=budget)
        stages: list[Stage] = importlib.import_module(module).stages(setting)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: processes end with us
        with kernel_cache.kept_in(cache) as kernels:
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


class _Supervisor:
    def __init__(
        self, module: str, setting: Setting, stages: Sequence[Stage], journal: Journal,
        kernels: Kernels | None, commit: str, end: float,
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
        self._killed()
        turns.sort(key=lambda turn: self._kills(turn[0]))
        try:
            for stage, share in turns:
                until = min(self.end, monotonic() + share * budget)
                if until - monotonic() < LEAST and not self.setting.quick:
                    continue
                if WHOLE in self.journal.ended(stage.name):
                    continue
                start = perf_counter()
                if problem := self._turn(stage, until):
                    self._end(stage, WHOLE, f"{problem}; see log.txt", again=True)
                seconds = round(perf_counter() - start, 1)
                self.journal.add("turn", stage=stage.name, seconds=seconds)
        finally:
            if self.worker is not None:
                kill_group(self.worker)
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
            code = self._wait(
                self.worker, until, stage.limit, self.journal.running, lambda: not self._left(stage)
            )
            if not self._left(stage):
                break
            kill_group(self.worker)
            self.worker, event = None, self.journal.running()
            if code is None and monotonic() >= until:
                self._cut(stage.limit)
            elif event is not None:
                self._end(stage, event["case"], self._how(code, stage.limit))
            elif fresh and self._left(stage) == left:
                return f"no case began, the worker {self._how(code, START)}"
            self.tell()
        return ""

    def _left(self, stage: Measured) -> set[str]:
        return set(stage.cases) - self.journal.ended(stage.name).keys()

    def _commands(self, stage: Commands, until: float) -> str:
        ended = self.journal.ended(stage.name)
        for command in stage.work:
            if command.name in ended or monotonic() >= until:
                continue
            self._begin(stage, command.name)
            told = self.log.stat().st_size if self.log.exists() else 0
            code = self._process(command.argv, until, stage.limit)
            if code is None and monotonic() >= until:
                self._cut(stage.limit)
            elif code == 0:
                self._end(stage, command.name)
            else:
                log = self.log.read_bytes()[told:].decode(errors="replace").strip()
                said = log.splitlines()[1:]  # behind the command
                reason = "\n".join([self._how(code, stage.limit), *said[-4:]])[:600]
                self._end(stage, command.name, reason, again=code == BAD_INPUT)
            self.tell()
        return ""

    def _tests(self, stage: Tests, until: float) -> str:
        notes = ("--notes", str(self.tests), "--notes-stage", stage.name)
        argv = (
            sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
            "--max-worker-restart=1000", "-p", "bench.pytest_notes", *notes,
            f"--test-seconds={stage.limit:g}", *stage.arguments,
        )  # fmt: skip
        before, size = self._failures(stage), self._noted()
        self._begin(stage, WHOLE)
        # A process is started anew, and a test takes its limit, between two notes at most.
        limit = START + stage.limit
        code = self._process(argv, until, limit, lambda: self._noted() > size)
        if code is None and monotonic() >= until:
            self._cut()
        elif code is None:
            return f"pytest noted nothing for {limit if self._noted() > size else START:g} s"
        elif code in (0, 5) or (code == 1 and self._failures(stage) > before):
            self._end(stage, WHOLE)  # passed, nothing left, failed
        else:
            return f"pytest {self._how(code)}" + " and noted no failure" * (code == 1)
        return ""

    def _outcomes(self, stage: Tests) -> list[Event]:
        return [n for n in lines_of(self.tests) if n["stage"] == stage.name and "test" in n]

    def _failures(self, stage: Tests) -> int:
        return sum(note["outcome"] == "failed" for note in self._outcomes(stage))

    def _noted(self) -> int:
        return self.tests.stat().st_size if self.tests.exists() else 0

    @staticmethod
    def _how(code: int | None, limit: float = float("inf")) -> str:
        if code is None:
            return f"took longer than {limit:g} s"
        if code >= 0:
            return f"ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"

    # --- How cases begin and end --------------------------------------------------------------------

    def _begin(self, stage: Stage, case: str) -> None:
        self.journal.add("begin", stage=stage.name, case=case, state=self._state(stage))

    def _state(self, stage: Stage) -> int | str | None:
        """Another one when what goes on where it was killed has got on; None for what begins anew."""
        if isinstance(stage, Tests):
            return len({note["test"] for note in self._outcomes(stage)})
        if not isinstance(stage, Commands) or stage.limit < float("inf"):
            return None
        found = hashlib.sha256()  # files' times would not do: folders are carried between machines
        for path in sorted(p for p in self.setting.runs.rglob("*") if p.is_file()):
            found.update(path.read_bytes())
        return found.hexdigest()[:16]

    def _end(self, stage: Stage, case: str, reason: str = "", *, again: bool = False) -> None:
        how: dict[str, object] = {"reason": reason} if reason else {}
        how |= {"again": True} if again else {}
        seconds = round(monotonic() - self.since, 1)
        event = "failed" if reason else "passed"
        self.journal.add(event, stage=stage.name, case=case, seconds=seconds, **how)

    def _cut(self, limit: float = float("inf")) -> None:
        """Takes back the case that runs, to run it again.

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
        else:
            self._take_back(event)
            self.journal.add("cut", **where, seconds=seconds)

    def _killed(self) -> None:
        """Takes back the case that ran when an earlier call was killed, and maybe killed it.

        It runs again; it fails when that happens twice and it has not got on meanwhile.
        """
        event = self.journal.running()
        if event is None:
            return
        where = {"stage": event["stage"], "case": event["case"]}
        stage = next((s for s in self.stages if s.name == event["stage"]), None)
        got_on = stage is not None and self._state(stage) != event.get("state")
        kills = [e for e in self.journal.events() if e["event"] == "killed"]
        before = [e for e in kills if where.items() <= e.items()]
        if before and not (got_on or before[-1]["got_on"]):
            reason = "twice the whole call was killed while it ran (out of memory?)"
            self.journal.add("failed", **where, seconds=0.0, reason=reason)
        else:
            self._take_back(event)
            self.journal.add("killed", **where, got_on=got_on)

    def _kills(self, stage: Stage) -> bool:
        """Whether calls are killed while a case of it runs: what gets on all the same goes behind the others."""
        ended = self.journal.ended(stage.name)
        kills = Counter(
            e["case"] for e in self.journal.events()
            if e["event"] == "killed" and e["stage"] == stage.name and e["case"] not in ended
        )  # fmt: skip
        return max(kills.values(), default=0) > 1

    def _take_back(self, event: Event) -> None:
        """The rows that a case wrote."""
        if "file" in event:
            path = self.setting.out / event["file"]
            lines = path.read_text().splitlines(keepends=True)
            whole = path.with_name(path.name + ".new")
            whole.write_text("".join(lines[: 1 + event["rows"]]))
            whole.replace(path)

    # --- Processes ----------------------------------------------------------------------------------

    def _process(
        self, argv: Sequence[str], until: float, limit: float, begun: Begun = lambda: True
    ) -> int | None:
        """Runs a process to its end; see `_wait`."""
        process = self._start(argv, stdin=subprocess.DEVNULL)
        try:
            return self._wait(process, until, limit, begun)
        finally:
            kill_group(process)

    def _start(self, argv: Sequence[str], stdin: int) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            log.write(f"== {' '.join(argv)}\n".encode())
            log.flush()
            return subprocess.Popen(
                argv, stdin=stdin, stdout=log, stderr=log, cwd=ROOT, env=self.env,
                start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    def _wait(
        self, process: subprocess.Popen[bytes], until: float, limit: float, begun: Begun,
        done: Callable[[], bool] = lambda: False,
    ) -> int | None:  # fmt: skip
        """Its exit code; None if it runs at `until`, `limit` seconds after the last event or note, or when `done`."""
        self.since, count = monotonic(), (len(self.journal.events()), self._noted())
        while process.poll() is None:
            now = len(self.journal.events()), self._noted()
            if now != count:
                self.since, count = monotonic(), now
                self.tell()
            allowed = limit if begun() else START
            if done() or monotonic() >= until or monotonic() - self.since > allowed:
                return None
            if self.kernels is not None and monotonic() - self.kernels.packed > PACK_EVERY:
                self.kernels.pack()
            sleep(0.1)
        return process.returncode
