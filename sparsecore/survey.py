"""What a folder's training images have in common, looked at once and remembered beside them."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import TypedDict

from . import safefile, schema
from .images import WHITES, DataError, ImageFiles, deep_grey, read_header
from .plain import read_plain

SAMPLE = 2048  # images that are looked at, evenly over all
CHUNK_BYTES = 32 << 20  # of pixels that are counted at once
_FILE = ".sparsecore-moments.safetensors"
_VERSION = "3"  # of how images are read: what an older one remembered is looked at again
_STD_FLOOR = 1e-3  # images of one colour would be divided by zero

Moments = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Survey:
    """Of a folder's training images.

    Attributes:
        size: the median of the shorter sides in pixels, or what was asked for.
        whites: the value that is white, by Pillow's mode (`images.ImageFiles`).
        moments: mean and standard deviation of each channel, in [0, 1]; None: not looked at yet.
    """

    size: int
    whites: dict[str, int]
    moments: Moments | None = None


def sample_of(count: int) -> Tensor:
    """int64 [min(count, 2048)]: which of so many images are looked at."""
    return torch.linspace(0, count - 1, min(count, SAMPLE), dtype=torch.float32).long()


def survey(paths: Sequence[Path], image_size: int | None, others: Sequence[Path] = ()) -> Survey:
    """Size and whites of the images, of which headers alone are read, and the pixels of 32-bit ones.

    Args:
        others: test images, which say what is white in a mode that no training image has.

    Errors: DataError, naming an image that cannot be read.
    """
    modes, sides = _headers(paths)
    other_modes = _headers(others)[0] if len(others) else {}
    whites = dict(WHITES)
    for mode in WHITES:
        if deep := modes.get(mode) or other_modes.get(mode):
            whites[mode] = _white(mode, max(map(_largest, deep)))
    return Survey(image_size or median_low(sides), whites)


def _headers(paths: Sequence[Path]) -> tuple[dict[str, list[Path]], list[int]]:
    """Of those that are looked at: the images by Pillow's mode, and the shorter sides."""
    modes: dict[str, list[Path]] = {}
    sides = []
    for i in sample_of(len(paths)).tolist():
        mode, side = read_header(paths[i])
        modes.setdefault(mode, []).append(paths[i])
        sides.append(side)
    return modes, sides


def _largest(path: Path) -> float:
    with contextlib.suppress(Exception), Image.open(path) as image:
        image.load()
        values = deep_grey(image)
        return 0.0 if values is None else float(np.nanmax(values))
    return 0.0  # damaged: told where it is decoded


def _white(mode: str, largest: float) -> int:
    """One scale for a whole set: by itself a dark image of one range looks like a bright one of another."""
    if mode == "F" and largest <= 1:
        return 1
    return 255 if largest <= 255 else 65535


def moments(images: Tensor | ImageFiles, rows: Tensor | None = None) -> Moments:
    """Mean and standard deviation of each channel of uint8 [N, C, H, W], in [0, 1]; of these rows alone, int64 [M].

    How often each value occurs says all of them, exactly, and needs no more memory than a few images.
    """
    rows = torch.arange(len(images)) if rows is None else rows
    first = images[rows[:1]]
    counts = torch.zeros(first.shape[1], 256, dtype=torch.int64)
    for chunk in rows.split(max(1, CHUNK_BYTES // first.numel())):
        for channel, values in enumerate(images[chunk].transpose(0, 1)):
            counts[channel] += torch.bincount(values.reshape(-1), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    total = counts.sum(1)
    mean = (counts * levels).sum(1) / total
    variance = (counts * (levels - mean[:, None]) ** 2).sum(1) / (total - 1).clamp_min(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(_STD_FLOOR).tolist())


class _Remembered(TypedDict):
    key: str
    size: Annotated[int, schema.Range(1, 16_384)]
    whites: dict[str, Annotated[int, schema.Range(1, 65_535)]]


def remembered(
    root: Path, paths: Sequence[Path], image_size: int | None, others: Sequence[Path] = ()
) -> Survey | None:
    """What `remember` wrote for these very files, by name, size and times; None if there is nothing of use."""
    path = root / _FILE
    if not path.is_file():
        return None
    try:
        tensors, meta = safefile.read(path, kind="moments")
        meta = schema.facts(meta, _Remembered, str(path))
        three = torch.zeros(3, dtype=torch.float64)
        found = schema.tensors(tensors, {"mean": three, "std": three}, str(path))
    except safefile.FileError:  # damaged or foreign: looked at again
        return None
    mean, std = (tuple(found[name].tolist()) for name in ("mean", "std"))
    known = meta["key"] == _key(root, paths, image_size, others)
    if not (known and meta["whites"].keys() == set(WHITES) and min(std) > 0):
        return None
    return Survey(meta["size"], meta["whites"], (mean, std))


def remember(
    root: Path,
    paths: Sequence[Path],
    image_size: int | None,
    found: Survey,
    others: Sequence[Path] = (),
) -> None:
    """Writes a survey beside the images, where that is allowed and nothing else lies, for all who read them."""
    assert found.moments is not None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in found.moments)
    key = _key(root, paths, image_size, others)
    meta = {"key": key, "size": found.size, "whites": found.whites}
    with contextlib.suppress(safefile.FileError):  # a folder of somebody else's, a full disk
        if _is_ours(root / _FILE):
            safefile.write(root / _FILE, {"mean": mean, "std": std}, meta, kind="moments")


def _is_ours(path: Path) -> bool:
    """Or nobody's: what lies in a folder of images does not decide what is written over, by a link or a name."""
    if path.is_symlink():
        return False
    return not path.exists() or b"sparsecore/moments" in read_plain(path)[:4096]


def _key(root: Path, paths: Sequence[Path], image_size: int | None, others: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{_VERSION}/{image_size}/{len(paths)}".encode())
    for path in (*paths, *others):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: expected a readable image ({error.strerror})") from None
        name = os.fsencode(path.relative_to(root))
        # A copy may be given its original's time of change by whoever makes it, but none of its own.
        times = status.st_mtime_ns, status.st_ctime_ns
        digest.update(b"\0%s\0%d\0%d\0%d" % (name, status.st_size, *times))
    return digest.hexdigest()
