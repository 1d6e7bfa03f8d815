"""The summary of a run in slices, from its journal and its tests' notes."""

from collections.abc import Sequence
from pathlib import Path

from .stages import WHOLE, Journal, Stage, Tests, lines_of

# Passed; failed, with reasons; skipped; left, None: not counted yet.
Outcome = tuple[int, dict[str, str], int, int | None]


def write(out: Path, stages: Sequence[Stage], journal: Journal) -> int:
    """Writes summary.md; returns 1 if anything failed, else 3 if anything is left, else 0."""
    events = journal.events()
    about = next(e for e in events if e["event"] == "run")
    calls = [e for e in events if e["event"] == "call"]
    head = ["stage", "passed", "failed", "skipped", "not reached", "seconds"]
    text = [
        f"# Commit {about['commit']} on {about['device']}{', quick' if about['quick'] else ''}, call {len(calls)}",
        "", _row(head), _row(["---"] * len(head)),
    ]  # fmt: skip
    failed: list[str] = []
    left: list[str] = []
    for stage in stages:
        passed, problems, skipped, rest = _outcome(out, stage, journal)
        turns = [e for e in events if e["event"] == "turn" and e["stage"] == stage.name]
        seconds = sum(e["seconds"] for e in turns)
        counts = (passed, len(problems), skipped, "all" if rest is None else rest)
        text.append(_row([stage.name, *map(str, counts), f"{seconds:.0f}"]))
        failed += [f"- {stage.name}: **{name}**: {_quoted(why)}" for name, why in problems.items()]
        if rest != 0:
            left.append(f"- {stage.name}: {_left(stage, journal)}")
    for title, lines in (("Failed", failed), ("Not reached", left)):
        text += ["", f"## {title}", *(lines or ["nothing"])]
    told = [f"- {stage.name}: {note}" for stage in stages if (note := stage.note())]
    text += ["", "## Notes", *told] if told else []
    code = 1 if failed else 3 if left else 0
    text += ["", f"Exit code {code}: {_MEANING[code]}."]
    new = out / "summary.md.new"
    new.write_text("\n".join(text) + "\n")
    new.replace(out / "summary.md")
    return code


_MEANING = {
    0: "everything ran and passed",
    1: "something failed",
    3: "nothing failed and something is left: run the same command again",
}


def _outcome(out: Path, stage: Stage, journal: Journal) -> Outcome:
    known = {*stage.cases, WHOLE}
    ended = {case: e for case, e in journal.ended(stage.name).items() if case in known}
    failed = {case: e["reason"] for case, e in ended.items() if e["event"] == "failed"}
    if isinstance(stage, Tests):
        return _tests(out, stage, failed, ended=WHOLE in ended.keys() - failed.keys())
    return len(ended) - len(failed), failed, 0, len(set(stage.cases) - ended.keys())


def _tests(out: Path, stage: Tests, problems: dict[str, str], *, ended: bool) -> Outcome:
    notes = [note for note in lines_of(out / "tests.jsonl") if note["stage"] == stage.name]
    failed: dict[str, str] = {}
    for note in notes:  # the first reason: a process that ends then gives a second
        if note.get("outcome") == "failed":
            failed.setdefault(note["test"], note["reason"])
    seen = {note["test"] for note in notes if "test" in note}
    skipped = {note["test"] for note in notes if note.get("outcome") == "skipped"} - failed.keys()
    every = max((note["all"] for note in notes if "all" in note), default=None)
    left = 0 if ended else None if every is None else every - len(seen)
    passed = len(seen) - len(failed) - len(skipped)
    return passed, failed | problems, len(skipped), left


def _left(stage: Stage, journal: Journal) -> str:
    if isinstance(stage, Tests):
        return "tests"
    ended = journal.ended(stage.name)
    names = [case for case in stage.cases if case not in ended]
    return f"{len(names)} of {len(stage.cases)}, from {names[0]} on"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _quoted(reason: str) -> str:
    return "\n  ".join(reason.splitlines())
