"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparsecore.kernels import philox


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


@pytest.fixture
def kernels_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's operation with the kernels' noise."""
    uniform_ = philox.uniform_

    def exact(out: Tensor, seed: Tensor, step: Tensor, layer: int, **_) -> Tensor:
        return uniform_(out, seed, step, layer, exact=True)

    monkeypatch.setattr("sparsecore.kernels.philox.uniform_", exact)
