"""A pytest plugin: notes each test as it ends, leaves out those noted before, and outlives what kills a process.

It needs pytest-xdist's processes (`-n`): a test that crashes, hangs or leaves its GPU unusable ends one of
them; that test fails, and another process goes on with the rest.
"""

import faulthandler
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from .processes import end_with_parent
from .stages import add_line, lines_of


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("notes")
    group.addoption("--notes", help="file of JSON lines")  # text: options travel to processes
    group.addoption("--notes-stage", help="what the tests belong to")
    group.addoption("--test-seconds", type=float, help="after which a test hangs")


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", None)
    if given is None:
        plugin: Any = _Notes(Path(config.option.notes), config.option.notes_stage)
    else:
        end_with_parent()
        plugin = _Process(given["noted"], config.option.test_seconds)
    config.pluginmanager.register(plugin)


class _Notes:
    """In the process that hands out tests."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        # All processes leave out the same tests, those that are started later too.
        self.noted = [e["test"] for e in lines_of(path) if e["stage"] == stage and "test" in e]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["noted"] = self.noted

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        add_line(self.path, {"stage": self.stage, "all": len(set(ids) | set(self.noted))})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._add(report, seconds=round(report.duration, 2))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """What is not collected (it does not import, say) is noted as one test: nobody knows of those in it."""
        if not report.passed:
            self.noted.append(report.nodeid)  # and counted
            self._add(report)

    def _add(self, report: pytest.TestReport | pytest.CollectReport, **more: float) -> None:
        note = {"stage": self.stage, "test": report.nodeid, "outcome": report.outcome} | more
        if report.failed:
            note["reason"] = _reason(report)
        add_line(self.path, note)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:  # the text of a process that ended
        said, where = report.longreprtext, ""
    else:
        said, where = crash.message, f" ({Path(crash.path).name}:{crash.lineno})"
    lines = [line for line in said.splitlines() if line.strip()]
    lines = [
        line for line in lines if line.startswith("E ")
    ] or lines  # pytest's mark of what went wrong
    return "\n".join(lines[:5])[:600] + where


class _Process:
    """In each process that runs tests."""

    def __init__(self, noted: Sequence[str], seconds: float) -> None:
        self.noted, self.seconds = set(noted), seconds
        self.failed = False

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        left_out = [item for item in items if item.nodeid in self.noted]
        items[:] = [item for item in items if item.nodeid not in self.noted]
        config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self.failed = False
        # Ends the process, from a thread that no hanging call of a driver can hold.
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=2)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        if self.failed:
            from .worker import (
                usable,
            )  # which imports kernels, after the tests have chosen how they run

            if not usable():  # before the next test, which would fail of it
                os._exit(1)
        return (yield)
