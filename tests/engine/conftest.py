"""What every test of the engine needs."""

from pathlib import Path

import pytest

from sparsecore import planner


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is remembered, in a file of the test's own."""
    planner._cache_at.cache_clear()
    monkeypatch.setenv("SPARSECORE_PLANS", str(tmp_path / "plans.json"))
    return tmp_path / "plans.json"
