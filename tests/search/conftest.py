"""A folder for rounds, and what their trainings start from."""

from pathlib import Path

import pytest
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.patterns import Masked
from sparsecore.search import rewinding
from sparsecore.tickets import dense_state
from sparsecore.training import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "rounds"


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What each round's training was given."""
    seen = []

    def watched(model: nn.Module, *args, **options):
        assert all(isinstance(m.pattern, Masked) for m in sc.sparse_layers(model).values())
        seen.append(dense_state(model))
        return train(model, *args, **options)

    monkeypatch.setattr(rewinding, "train", watched)
    return seen
