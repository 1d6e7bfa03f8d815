"""Small data sets in the files of published ones."""

import struct
from pathlib import Path

import numpy as np

TRAIN, TEST = 30, 10  # images


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    return (
        bytes((0, 0, kind, values.ndim))
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.tobytes()
    )


def mnist(root: Path, side: int = 28, folder: str = "MNIST/raw") -> Path:
    """A small set of noise in the files of MNIST; returns their folder."""
    raw, rng = root / folder, np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        pixels = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return raw
