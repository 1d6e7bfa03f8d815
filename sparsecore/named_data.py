"""Data sets by name, MNIST's and CIFAR's files: read as what they are, or refused by the name of the file.

Nothing of a file is taken on trust: IDX files have to hold what their header says, and CIFAR's are pickles, of which
those that were published are read, known by their sums, and no others.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from .images import DataError

Part = tuple[Tensor, Tensor]  # images, uint8 [N, C, H, W], and labels, int64 [N]

_UNSIGNED_BYTES = 8  # IDX's number of that type
_GZIP = b"\x1f\x8b"
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_GLOBALS = {  # all that CIFAR's pickles name
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}


@dataclass(frozen=True)
class NamedData:
    """A published data set.

    Args:
        kind: torchvision's class, which downloads it.
        folder: where its files lie within the data folder.
        read: its training and test split out of that folder.
        mean, std: of each channel, in [0, 1].
        flip_crop: whether random flips and crops are the customary augmentation.
    """

    kind: Any
    folder: str
    classes: int
    read: "Callable[[NamedData, Path], list[Part]]"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_crop: bool


def default_folder() -> Path:
    """Where downloads go.  Errors: DataError for a user without a home."""
    try:
        return Path.home() / ".cache" / "sparsecore"
    except RuntimeError:
        raise DataError("data: expected a home folder to keep it in; give --data-dir") from None


def read_named(name: str, root: Path, *, download: bool) -> list[Part]:
    """The training and the test split of one of `NAMED` out of the data folder `root`, downloaded if that is wanted.

    Errors: DataError for files that are not there, cannot be downloaded or hold something else, naming the file.
    """
    known = NAMED[name]
    folder = root / known.folder
    if download and not _is_there(known, folder):
        try:
            known.kind(root, train=False, download=True)
        except Exception as error:  # torchvision lets many kinds of error through
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"{name} could not be downloaded in {root}: {reason}; give --data-dir a folder that holds it"
            ) from None
    try:
        return known.read(known, folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: expected a file of {name} that can be read ({error.strerror or error})"
        ) from None


def _is_there(known: NamedData, folder: Path) -> bool:
    """Whether torchvision would have nothing to download."""
    if known.read is _read_cifar:
        return not any(_damage(folder / file, digest) for file, digest in _sums(known.kind))
    return all((folder / file).is_file() for pair in _IDX_FILES for file in pair)


# --- IDX: MNIST and its like ------------------------------------------------------------------------

_IDX_FILES = tuple(
    (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")
)
_SIDE = 28  # of the images, in pixels


def _read_idx_pairs(known: NamedData, folder: Path) -> list[Part]:
    return [
        _idx_pair(folder / images, folder / labels, known.classes) for images, labels in _IDX_FILES
    ]


def _idx_pair(images_file: Path, labels_file: Path, classes: int) -> Part:
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if images.shape[1:] != (_SIDE, _SIDE):
        height, width = images.shape[1:]
        raise DataError(
            f"{images_file}: expected images of {_SIDE} x {_SIDE} pixels, got {height} x {width}"
        )
    if len(images) != len(labels):
        raise DataError(
            f"{labels_file}: expected a label for each of the {len(images):,} images in {images_file.name}, got "
            f"{len(labels):,}"
        )
    _check_labels(labels_file, labels, classes)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A file of unsigned bytes with so many dimensions, uint8 [N, ...].

    The format is two zero bytes, the type, the number of dimensions, their sizes in 32 bits each, the values
    (https://yann.lecun.com/exdb/mnist).

    Errors: DataError, naming the file, for another format, type or number of dimensions, for more or fewer bytes than
    its sizes say, and for none.
    """
    _require_file(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(4 + 4 * dimensions)
        if header.startswith(_GZIP):
            raise DataError(f"{path}: expected an IDX file, got a gzip archive of one; unpack it")
        magic = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
        if header[:4] != magic or len(header) < 4 + 4 * dimensions:
            raise DataError(
                f"{path}: expected an IDX file of unsigned bytes in {dimensions} dimension{'s' * (dimensions > 1)}, "
                f"which begins with {magic.hex(' ')}, got {size:,} bytes that begin with "
                f"{header[:4].hex(' ') or 'nothing'}; {_AGAIN}"
            )
        shape = [
            int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)
        ]  # Python's integers: no overflow
        expected = len(header)
        count = 1
        for side in shape:
            count *= side
        if size != expected + count:
            raise DataError(
                f"{path}: expected {expected + count:,} bytes, as its header says ({' x '.join(map(str, shape))}), got "
                f"{size:,}; {_AGAIN}"
            )
        if not count:
            raise DataError(
                f"{path}: expected at least one value, got {' x '.join(map(str, shape))}"
            )
        return np.fromfile(file, np.uint8, count).reshape(shape)


# --- CIFAR: pickles ---------------------------------------------------------------------------------

_CIFAR_SIDE = 32


def _sums(kind: Any) -> Sequence[tuple[str, str]]:
    """The files and their MD5 sums as they were published."""
    return [(name, digest) for name, digest in [*kind.train_list, *kind.test_list]]


def _read_cifar(known: NamedData, folder: Path) -> list[Part]:
    sums = dict(_sums(known.kind))
    parts = []
    for listed in (known.kind.train_list, known.kind.test_list):
        batches = [_cifar_batch(folder / name, sums[name], known.classes) for name, _ in listed]
        images, labels = (np.concatenate(values) for values in zip(*batches, strict=True))
        images = images.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
        parts.append((torch.from_numpy(images), torch.from_numpy(labels)))
    return parts


def _damage(path: Path, digest: str) -> str | None:
    """What is wrong with a file that should have this MD5 sum."""
    if not path.is_file():
        return "nothing there" if not path.exists() else "no plain file"
    with path.open("rb") as file:
        found = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return None if found.hexdigest() == digest else f"one of MD5 {found.hexdigest()}"


def _cifar_batch(path: Path, digest: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, 3072], int64 [N])"""
    if (damage := _damage(path, digest)) is not None:
        raise DataError(
            f"{path}: expected the published file of MD5 {digest}, got {damage}; {_AGAIN}"
        )
    try:
        batch = _Numbers(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        pixels = batch["data"]
        labels = np.array(batch["labels"] if "labels" in batch else batch["fine_labels"])
    except Exception as error:  # whatever a pickle of another kind trips over
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: expected pixels and labels, got a pickle of others ({reason})"
        ) from None
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(
            f"{path}: expected a whole number as each label, got {labels.dtype} {labels.shape}"
        )
    wanted = (len(labels), 3 * _CIFAR_SIDE**2)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != wanted:
        raise DataError(
            f"{path}: expected unsigned bytes of shape {wanted}, got {getattr(pixels, 'dtype', type(pixels).__name__)} "
            f"of {getattr(pixels, 'shape', 'no shape')}"
        )
    _check_labels(path, labels, classes)
    return pixels, labels.astype(np.int64)


class _Numbers(pickle.Unpickler):
    """Reads arrays alone: a pickle that names anything else is refused before that is looked for."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in _GLOBALS:
            raise pickle.UnpicklingError(f"it names {name[:80]}")
        return _GLOBALS[name]


# --- Both -------------------------------------------------------------------------------------------

_AGAIN = "get it anew, or remove it to have it downloaded"


def _require_file(path: Path) -> None:
    if not path.is_file():  # reading a pipe would wait for ever
        found = (
            "a folder" if path.is_dir() else "no plain file" if path.exists() else "nothing there"
        )
        raise DataError(f"{path}: expected a file, found {found}; {_AGAIN}")


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise DataError(
            f"{path}: expected labels of 0 to {classes - 1}, got {labels[wrong]} as number {wrong:,}; {_AGAIN}"
        )


NAMED: dict[str, NamedData] = {
    "mnist": NamedData(
        torchvision.datasets.MNIST, "MNIST/raw", 10, _read_idx_pairs, (0.1307,), (0.3081,), False
    ),
    "fashion-mnist": NamedData(
        torchvision.datasets.FashionMNIST, "FashionMNIST/raw", 10, _read_idx_pairs, (0.2860,), (0.3530,), False
    ),
    "cifar10": NamedData(
        torchvision.datasets.CIFAR10, "cifar-10-batches-py", 10, _read_cifar,
        (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True,
    ),
    "cifar100": NamedData(
        torchvision.datasets.CIFAR100, "cifar-100-python", 100, _read_cifar,
        (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True,
    ),
}  # fmt: skip
