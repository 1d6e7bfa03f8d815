"""Data sets as tensors on the device: no workers, augmentation where the data lies."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .folders import DataWarning, Item, find_images
from .images import DataError, ImageFiles
from .kinds import checked
from .named_data import NAMED, default_folder, read_named
from .survey import Survey, moments, remember, remembered, sample_of, survey

__all__ = [
    "Batches",
    "DataError",
    "DataWarning",
    "Dataset",
    "ImageFiles",
    "Split",
    "corrupted",
    "limited",
    "load",
]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "folder:PATH")
MOST_PIXELS = 16_384  # of an image's side
EAGER_BYTES = 2 << 30  # a folder whose pixels fit in this much is decoded once and kept
_PAD = 4  # of the random crop
_DIGEST_BYTES = 256 << 20  # of pixels that `Split.digest` looks at one by one


@dataclass(frozen=True)
class Split:
    """images: uint8 [N, C, H, W] (a tensor, or decoded when asked for); labels: int64 [N]."""

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 of labels and images: of all pixels, of 2,048 images where more would take long, of files not decoded
        yet by name and size."""
        found = hashlib.sha256(self.labels.numpy().tobytes())
        if isinstance(self.images, ImageFiles):
            for path in self.images.paths:
                found.update(b"\0%s\0%d" % (os.fsencode(path.name), path.stat().st_size))
        else:
            found.update(repr(tuple(self.images.shape)).encode())
            whole = self.images.numel() <= _DIGEST_BYTES
            seen = self.images if whole else self.images[sample_of(len(self))]
            found.update(seen.contiguous().numpy().data)
        return found.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A training and a test split.  shape is [C, H, W]; mean and std are per channel in [0, 1]."""

    name: str
    train: Split
    test: Split
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_crop: bool  # whether random flips and crops are the customary augmentation

    @cached_property
    def digest(self) -> str:
        """SHA-256 that tells other images, labels, sizes and normalisations apart; equal wherever the files lie."""
        # The last digits of moments are those of a machine.
        scale = [f"{value:.6g}" for value in (*self.mean, *self.std)]
        facts = (self.classes, self.shape, scale, self.flip_crop)
        parts = (self.train.digest(), self.test.digest())
        return hashlib.sha256(repr((facts, parts)).encode()).hexdigest()


@checked
def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = True,
    image_size: int | None = None,
) -> Dataset:
    """A data set by name: digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH.

    Args:
        data_dir: where the files lie, as torchvision lays them out; nothing is downloaded then.
            For cifar10 also an image folder `cifar10-jpeg/{train,test}/<class>/`.
        image_size: side of a folder's images; by default the median of their shorter sides.  Of other data: that which
            they have.

    folder:PATH is PATH/{train,test}/<class>/* (val, valid, validation, dev or eval in place of test), or
    PATH/<class>/* with every sixth image as the test split (`folders.find_images`).  Images become RGB, upright, over
    white; deeper grey is scaled to 8 bits (`images.read_rgb`).  Mean and standard deviation are those of at most
    2,048 training images, and are remembered in PATH.

    Errors: DataError for an unknown name, a missing folder or set, a failed download, damaged files, an image size
    that the data does not have.
    """
    if image_size is not None and not 1 <= image_size <= MOST_PIXELS:
        raise DataError(f"image size: expected 1 to {MOST_PIXELS:,} pixels, got {image_size}")
    if (folder := folder_of(name)) is not None:
        return _folder(name, folder, image_size)
    found = _named(name, data_dir, download=download)
    if image_size is not None and found.shape[1:] != (image_size, image_size):
        raise DataError(
            f"image size: expected none for {name}, whose images are of {found.shape[1]} x {found.shape[2]} pixels, "
            f"got {image_size}; those of a folder:PATH have any size"
        )
    return found


def folder_of(name: str) -> Path | None:
    """The folder of folder:PATH; None for other data.  Errors: DataError for an empty PATH."""
    if not name.startswith("folder:"):
        return None
    path = name.removeprefix("folder:")
    if not path:
        raise DataError("data: expected folder:PATH, got no path; folder:. is the current folder")
    return Path(path).expanduser()


def _named(name: str, data_dir: str | Path | None, *, download: bool) -> Dataset:
    """A data set of its own name."""
    if name == "digits":
        return _digits()
    if name not in NAMED:
        raise DataError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    known = NAMED[name]
    root = default_folder() if data_dir is None else Path(data_dir)
    if data_dir is not None:
        if not root.is_dir():
            raise DataError(f"data folder {root}: expected a folder, found nothing there")
        download = False
        jpeg = root / "cifar10-jpeg"
        if name == "cifar10" and not (root / known.folder).is_dir() and jpeg.is_dir():
            return replace(_folder(name, jpeg, 32), mean=known.mean, std=known.std)
        if not (root / known.folder).is_dir():
            raise DataError(
                f"data folder {root}: expected {name} in {root / known.folder}; leave --data-dir out to "
                "download it"
            )
    train, test = read_named(name, root, download=download)
    _, channels, height, width = test[0].shape
    return Dataset(
        name, Split(*train), Split(*test), known.classes, (channels, height, width), known.mean, known.std,
        known.flip_crop,
    )  # fmt: skip


def lies_in(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether a data set of its own name lies in the data folder, the default one for None; digits always do."""
    if name not in NAMED:
        return name == "digits"
    root = default_folder() if data_dir is None else Path(data_dir)
    jpeg = data_dir is not None and name == "cifar10" and (root / "cifar10-jpeg").is_dir()
    return jpeg or (root / NAMED[name].folder).is_dir()


def limited(dataset: Dataset, samples: int | None) -> Dataset:
    """The data set with so many training samples, the same at every call, for reduced runs; None: all.

    Errors: DataError for fewer than 1 or more than there are.
    """
    if samples is None:
        return dataset
    train = dataset.train
    if not 1 <= samples <= len(train):
        raise DataError(
            f"train samples: expected 1 to {len(train)} of {dataset.name}, got {samples}"
        )
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[
        :samples
    ].sort()[0]
    if isinstance(train.images, Tensor):
        images: Tensor | ImageFiles = train.images[chosen]
    else:
        images = train.images.part(chosen)
    return replace(dataset, train=Split(images, train.labels[chosen]))


def require_in_memory(dataset: Dataset) -> Tensor:
    """The training images, uint8 [N, C, H, W].  Errors: DataError for images that are read when asked for."""
    images = dataset.train.images
    if not isinstance(images, Tensor):
        raise DataError(
            f"{dataset.name}: expected images in memory to corrupt, got a folder too large"
        )
    return images


def corrupted(dataset: Dataset, seed: int) -> Dataset:
    """The same data with nothing to learn: training labels shuffled, and each training image's pixels too.

    What a search finds there it did not learn from the data (Su et al. 2020, arXiv 2009.11094).

    Errors: DataError for images that are read when asked for.
    """
    images = require_in_memory(dataset)
    generator = torch.Generator().manual_seed(seed)
    count, channels, height, width = images.shape
    order = torch.rand(count, height * width, generator=generator, dtype=torch.float32).argsort(
        1
    )  # of the pixels
    pixels = images.flatten(2).gather(2, order[:, None].expand(-1, channels, -1))
    labels = dataset.train.labels[torch.randperm(count, generator=generator)]
    return replace(dataset, train=Split(pixels.view_as(images), labels))


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data: digits needs scikit-learn; install the extra: pip install '.[demo]'"
        ) from None
    raw: Any = load_digits()
    images = torch.from_numpy(np.round(raw.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    mean, std = moments(images[train])
    return Dataset(
        "digits",
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        10,
        (1, 8, 8),
        mean,
        std,
        flip_crop=False,
    )


def _folder(name: str, root: Path, image_size: int | None) -> Dataset:
    found = find_images(root)
    paths, others = ([path for path, _ in items] for items in (found.train, found.test))
    known = remembered(root, paths, image_size, others)
    seen = known or survey(paths, image_size, others)
    train, test = (_split(items, seen) for items in (found.train, found.test))
    if known is None:
        seen = replace(seen, moments=moments(train.images, sample_of(len(train))))
        remember(root, paths, image_size, seen, others)
    assert seen.moments is not None
    shape = (3, seen.size, seen.size)
    return Dataset(name, train, test, len(found.classes), shape, *seen.moments, flip_crop=True)


def _split(items: list[Item], seen: Survey) -> Split:
    images: Tensor | ImageFiles = ImageFiles([p for p, _ in items], seen.size, whites=seen.whites)
    if len(items) * 3 * seen.size**2 <= EAGER_BYTES:
        images = images[torch.arange(len(items))]
    return Split(images, torch.tensor([label for _, label in items]))


class Batches:
    """Re-iterable minibatches: x float32 [B, C, H, W], normalised; y int64 [B]; both on `device`.

    `epoch(i)` depends on (seed, i) alone.  Iterating gives epochs 0, 1, 2, ... in turn.

    Args:
        split: "train" or "test".
        augment: random flips and crops out of a 4-pixel border.
        drop_last: whether a last, smaller batch is left out; None: one of a single sample where a model with BatchNorm
            trains, which cannot compute with it.
        facts: what a checkpoint of a run on them tells apart, beside their first batch and the model's values.
    """

    @checked
    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        augment: bool = False,
        drop_last: bool | None = None,
        device: torch.device | str = "cpu",
        facts: Sequence[Any] = (),
    ) -> None:
        if split not in ("train", "test"):
            raise DataError(f"split: expected train or test, got {split!r}")
        if batch_size < 1:
            raise DataError(f"batch size: expected at least 1, got {batch_size}")
        part: Split = getattr(dataset, split)
        self.device = torch.device(device)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.augment, self.drop_last, self.facts = augment, drop_last, tuple(facts)
        self.labels = part.labels.to(self.device)
        self.images = part.images
        if isinstance(self.images, Tensor):
            self.images = self.images.to(self.device)
        mean = torch.tensor(dataset.mean, dtype=torch.float32, device=self.device)[:, None, None]
        std = torch.tensor(dataset.std, dtype=torch.float32, device=self.device)[:, None, None]
        # (x / 255 - mean) / std as one multiply and one add
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._next = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._next += 1
        return self.epoch(self._next - 1)

    def order(self, index: int) -> Tensor | None:
        """int64 [N]: the samples of epoch `index` in turn; None if a sample may differ or be left out."""
        left_out = self.drop_last and len(self.labels) % self.batch_size
        return None if self.augment or left_out else self._shuffled(index)[0]

    def _shuffled(self, index: int) -> tuple[Tensor, torch.Generator]:
        digest = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
        # Drawn on the CPU: the order is the same on every device.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if self.shuffle:
            return torch.randperm(len(self.labels), generator=generator), generator
        return torch.arange(len(self.labels)), generator

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `index`."""
        order, moves = self.plan(index)
        moved = order.to(self.device)
        for i in range(len(self)):
            part = slice(i * self.batch_size, (i + 1) * self.batch_size)
            rows = moved[part] if isinstance(self.images, Tensor) else order[part]
            yield self.take(rows, None if moves is None else [m[part] for m in moves])

    def plan(self, index: int) -> tuple[Tensor, Sequence[Tensor] | None]:
        """The order of epoch `index`, int64 [N] on the CPU, and its augmentation: what `take` asks for."""
        order, generator = self._shuffled(index)
        return order, self._draw(generator) if self.augment else None

    def take(self, rows: Tensor, moves: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """The batch of the samples `rows`; on the device alone if `rows` and the images are there."""
        if isinstance(self.images, Tensor):
            images = self.images.index_select(0, rows)  # faster than [...] here
        else:
            images = self.images[rows].to(self.device)
        x = torch.addcmul(self._shift, images.float(), self._scale)
        if moves is not None:
            flip, down, right = moves
            x = flip_crop(x, flip, down, right)
        return x, self.labels.index_select(0, rows.to(self.device))

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Flips (bool [N]) and crop offsets (int64 [N], rows and columns) of a whole epoch."""
        n = len(self.labels)
        flip = torch.rand(n, generator=generator, dtype=torch.float32) < 0.5
        rows, columns = torch.randint(0, 2 * _PAD + 1, (2, n), generator=generator)
        return flip.to(self.device), rows.to(self.device), columns.to(self.device)


def flip_crop(x: Tensor, flip: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Flips images left to right where `flip`, pads by 4 and crops at (rows, columns) in 0 ... 8.

    Padding is 0 after normalisation, i.e. the mean colour.
    """
    n, channels, height, width = x.shape
    padded = torch.nn.functional.pad(x, [_PAD] * 4)
    i = rows[:, None] + torch.arange(height, device=x.device)  # [B, H]
    j = torch.arange(width, device=x.device).expand(n, -1)
    j = columns[:, None] + torch.where(flip[:, None], width - 1 - j, j)  # [B, W]
    batch = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return padded[batch, channel, i[:, None, :, None], j[:, None, None, :]]
