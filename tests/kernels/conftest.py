"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Unset memory is NaN: whatever is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def poisoned_scratch(poisoned: None) -> Iterator[None]:
    """Memory that launchers allocate themselves starts as NaN; PyTorch's float32 is float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.empty(8, device=device).isnan().all()
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
