"""What a GPU is asked in the minutes it is there, as stages: what tells most comes first."""

import shutil
import sys

import torch

from .search_suite import search_work
from .stages import Command, Commands, Measured, Setting, Stage, Tests
from .ticket_suite import ticket_work

MEMCHECK = "compute-sanitizer"


def stages(setting: Setting) -> list[Stage]:
    """Shares are of the budget; their sum is above 1, as few stages need all of theirs."""
    device, quick = torch.device(setting.device), setting.quick
    suffix = "-quick" if quick else ""
    searches = search_work(device, quick=quick)
    tickets = ticket_work(device, setting.runs / "plans.json", quick=quick)

    def part(name: str, share: float, suite: str, *parts: str) -> Measured:
        work = [one for one in (searches if suite == "search" else tickets) if one.part in parts]
        whole = {"models", "networks"} & {*parts}  # which are compiled
        limit = 240.0 if whole else 120.0
        return Measured(name, share, limit, suite=suite + suffix, work=work)

    return [
        _tests("smoke tests", "gpu and smoke", 0.25, setting),
        part("search step", 0.3, "search", "networks"),
        _ticket(setting),
        _resume(setting),
        _memory(setting),
        part("training steps", 0.3, "ticket", "models"),
        part("products", 0.2, "ticket", "ops", "convs"),
        part("launches", 0.15, "search", "ceilings", "ops"),
        part("strategies", 0.15, "search", "strategies"),
        part("layers", 0.2, "search", "layers"),
        _tests("other tests", "gpu and not smoke", 1.0, setting),
    ]


def _tests(name: str, marked: str, share: float, setting: Setting) -> Tests:
    if setting.quick:  # one test that imports nothing, to try the path out
        test = "tests/test_layering.py::test_files_stay_of_a_readable_length"
        chosen = (test, "--noconftest", "-n", "1")
    else:
        chosen = ("-m", marked, "-n", "12")
    return Tests(name, share, 120.0, arguments=chosen)


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def _ticket(setting: Setting) -> Commands:
    """The paper's headline row; minutes of training, a part of them in each call."""
    argv = _python("bench", "tickets", "--lengths", "short", "--device", setting.device)
    where = ("--out", str(setting.out), "--keep", str(setting.runs), *setting.data_options)
    how = ("--quick",) if setting.quick else ()
    work = [Command("CTS short", (*argv, *where, *how))]
    return Commands("ticket", 0.3, float("inf"), work=work)


def _check(*what: str, setting: Setting) -> Command:
    where = ("--folder", str(setting.runs / "killed"), "--device", setting.device)
    how = ("--quick",) if setting.quick else ()
    return Command(" and ".join(what), _python("bench.checks", *what, *where, *how))


def _resume(setting: Setting) -> Commands:
    if setting.quick:  # a process less
        work = [_check("training", "search", setting=setting)]
    else:
        work = [_check(what, setting=setting) for what in ("training", "search")]
    return Commands("kill and resume", 0.25, 180.0, work=work)


def _memory(setting: Setting) -> Commands:
    checker = shutil.which(MEMCHECK) if setting.device != "cpu" else None
    under = (checker, "--tool", "memcheck", "--error-exitcode", "9") if checker else ()
    plans = () if setting.quick else ("mask", "state", "compact", "block:16x16", "auto")
    work = [_check(what, setting=setting) for what in ("gates", *(f"step:{p}" for p in plans))]
    work = [Command(command.name, (*under, *command.argv)) for command in work]
    told = f"under {MEMCHECK}" if checker else f"without {MEMCHECK}, which is not here"
    return Commands("memory", 0.2, 180.0, lambda: told, work=work)
