"""Bars on a terminal, nothing anywhere else."""

import pytest

from sparsecore.progress import Progress


def show(capsys: pytest.CaptureFixture[str]) -> str:
    with Progress() as progress, progress.task("search", total=3) as advance:
        for i in range(3):
            advance(objective=1.5 / (i + 1))
        advance.describe(seconds=2.0)
    captured = capsys.readouterr()
    assert captured.out == ""  # results go to stdout, bars never do
    return captured.err


def test_no_terminal_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(capsys) == ""


def test_bars_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told that stderr is a terminal
    monkeypatch.setenv("COLUMNS", "120")
    shown = show(capsys)
    assert "search" in shown and "/3" in shown
