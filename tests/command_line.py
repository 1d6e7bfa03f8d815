"""What tests of the command line share: folders of images, and the one line of an error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DIGITS = [
    "search", "--data", "digits", "--model-option", "width=0.05", "--sparsity", "0.5", "--engine", "eager", "--out",
    "t",
]  # fmt: skip


def images(root: Path, size: int = 12, count: int = 6, seed: int = 0) -> Path:
    """A folder of two classes, each with `count` images of noise, [3, size, size]."""
    rng = np.random.default_rng(seed)
    for label in "ab":
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that a command has printed, beside warnings."""
    told = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    assert len(told) == 1 and told[0].startswith("error: "), told
    return told[0]
