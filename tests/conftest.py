"""Fixtures: offline data where it is at hand, and a global generator that must stay untouched."""

import functools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from smoke import SMOKE

# Tests run side by side: threads of their own would wait for each other's.
torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would tests of it and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU the kernels run in Triton's interpreter, chosen before anything imports them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from replay import recordings  # noqa: E402, F401  a fixture; imports kernels

from sparsecore import engine  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    starts = [f"tests/{start}" for family in SMOKE.values() for start in family]

    def place(item: pytest.Item) -> int:
        places = (i for i, start in enumerate(starts) if item.nodeid.startswith(start))
        return next(places, len(starts)) if item.get_closest_marker("gpu") else len(starts)

    for item in items:
        if place(item) < len(starts):
            item.add_marker("smoke")
    items.sort(key=place)


@pytest.fixture(autouse=True)
def global_generator_untouched() -> Iterator[None]:
    """Library code draws from explicit seeds only; tests that use the global generator fork it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator was used"


@pytest.fixture(autouse=True)
def fused_transformers_untouched() -> Iterator[None]:
    """Searches turn PyTorch's fused evaluation off, for the whole process, and back on."""
    yield
    assert torch.backends.mha.get_fastpath_enabled(), (
        "fused evaluation of transformers was left off"
    )


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch.compile but machine code, which takes its time."""
    engine.compiled_call.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MNIST and Fashion-MNIST as torchvision reads them; skips where there is none.

    SPARSECORE_DATA names such a folder, or one that has an `unpack` script making it.
    """
    source = Path(os.environ.get("SPARSECORE_DATA", ROOT.parent / "shared" / "data"))
    if (source / "FashionMNIST").is_dir():
        return source
    if not (source / "unpack").is_file():
        pytest.skip("no offline data; set SPARSECORE_DATA")
    target = tmp_path_factory.mktemp("data")
    command = ["bash", str(source / "unpack"), str(target), "mnist", "fashion-mnist"]
    subprocess.run(command, check=True)
    return target
