"""Damaged data sets: IDX and CIFAR files and folders of images, by `search` and `sparsecore.load`."""

import gzip
import math
import pickle
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

import sparsecore as sc

from .judge import Failure, Guard, call, command
from .mutations import of_bytes
from .of_commands import EAGER

_SEARCH = [
    "search", "--method", "magnitude", "--sparsity", "0.5", "--rewind-epochs", "0.5", "--epochs", "1", "--recipe",
    "batch=8", "--search-batch", "8", "--model-option", "width=0.05", "--out", "t", *EAGER,
]  # fmt: skip


def idx(folder: Path, rng: Random, spoil: bool) -> None:
    """MNIST's four files, of ten images; one of them spoiled."""
    folder = folder / "MNIST" / "raw"
    folder.mkdir(parents=True)
    names = [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ]
    odd = rng.choice(names) if spoil else ""
    for name in names:
        images = "images" in name
        shape = (10, 28, 28) if images else (10,)
        body, magic, kind = rng.randbytes(math.prod(shape)), 0, 8
        if not images:
            body = bytes(i % 10 for i in range(10))
        if name == odd:
            shape, body, magic, kind = _odd_idx(shape, body, rng)
        data = (
            struct.pack(">HBB", magic, kind, len(shape))
            + struct.pack(f">{len(shape)}I", *shape)
            + body
        )
        if name == odd and rng.random() < 0.4:
            data = rng.choice([of_bytes(data, rng), b"", gzip.compress(data), data + b"\0" * 7])
        (folder / name).write_bytes(data)
    if spoil and rng.random() < 0.1:
        (folder / odd).unlink()


def _odd_idx(
    shape: tuple[int, ...], body: bytes, rng: Random
) -> tuple[tuple[int, ...], bytes, int, int]:
    n, rest = shape[0], shape[1:]
    match rng.randrange(8):
        case 0:
            return (rng.choice([0, 1, n - 1, n + 1, 2**32 - 1]), *rest), body, 0, 8
        case 1:
            return (n, *(rng.choice([0, 1, 27, 2**32 - 1]) for _ in rest)), body, 0, 8
        case 2:
            return (
                shape,
                body,
                rng.choice([0, 1, 65535]),
                rng.choice([8, 9, 11, 12, 13, 14, 0, 255]),
            )
        case 3:
            return shape, body[: rng.randrange(len(body))], 0, 8
        case 4:  # labels out of range
            return shape, bytes([rng.choice([10, 99, 255])]) + body[1:], 0, 8
        case 5:
            return shape[:-1], body, 0, 8
        case 6:
            return (*shape, 1), body, 0, 8
        case _:
            return (0, *rest), b"", 0, 8


class Ran:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("ran"), "code in a data set was run")


def cifar(folder: Path, rng: Random, spoil: bool) -> None:
    """CIFAR-10's batches, of four images each; one of them spoiled."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    odd = rng.choice([*batches, "batches.meta"]) if spoil else ""
    for name in batches:
        data: Any = {
            b"data": np.frombuffer(rng.randbytes(4 * 3072), np.uint8).reshape(4, 3072),
            b"labels": [0, 1, 2, 3],
        }
        if name == odd:
            data = _odd_batch(data, rng)
        (folder / name).write_bytes(pickle.dumps(data, protocol=2))
    meta: Any = {"label_names": list("abcdefghij"), "num_cases_per_batch": 4, "num_vis": 3072}
    if odd == "batches.meta":
        meta = rng.choice(
            [{}, [], {"label_names": []}, {"label_names": "x" * 3}, {"label_names": Ran()}]
        )
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    if spoil and rng.random() < 0.3:
        path = folder / odd
        path.write_bytes(rng.choice([of_bytes(path.read_bytes(), rng), b""]))


def _odd_batch(data: dict[bytes, Any], rng: Random) -> Any:
    images = data[b"data"]
    odd: list[Any] = [
        data | {b"labels": [0, 1, 2]}, data | {b"labels": [0, 1, 2, 99]}, data | {b"labels": [0, 1, 2, -1]}, [],
        None, {},
        data | {b"labels": ["a", "b", "c", "d"]}, data | {b"labels": [0.5, 1, 2, 3]}, data | {b"data": images[:,
        :3000]},
        data | {b"data": images[:0]}, data | {b"data": images.astype(np.float32)}, data | {b"data": images[0]}, Ran(),
        data | {b"data": images.reshape(4, 3, 32, 32)}, data | {b"data": "x"}, data | {b"data": Ran()},
        {b"data": images},
        data | {b"labels": []}, data | {b"labels": None}, data | {b"data": images.astype(object)},
        data | {b"fine_labels": [0]},
    ]  # fmt: skip
    return rng.choice(odd)


def images(folder: Path, rng: Random, spoil: bool) -> None:
    """A folder of two classes; some of its files spoiled."""
    for split in ("train", "test"):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for i in range(4):
                name = folder / split / label / f"{i}.png"
                Image.frombytes("RGB", (12, 12), rng.randbytes(432)).save(name)
    if not spoil:
        return
    paths = sorted(folder.rglob("*.png"))
    for path in rng.sample(paths, rng.choice([1, 1, 3, len(paths)])):
        data = path.read_bytes()
        match rng.randrange(9):
            case 0 | 1:
                path.write_bytes(of_bytes(data, rng))
            case 2:
                path.write_bytes(b"")
            case 3:
                path.unlink()
            case 4:  # promises more pixels than there are
                path.write_bytes(
                    data[:16]
                    + struct.pack(">II", *rng.choices([0, 1, 65535, 2**31], k=2))
                    + data[24:]
                )
            case 5:
                path.rename(
                    path.with_name(
                        rng.choice(
                            ["\x1b[31m.png", "[red].png", "a\nb.png", ".png", "x" * 200 + ".png"]
                        )
                    )
                )
            case 6:
                Image.new(
                    rng.choice(["L", "RGBA", "P", "I;16", "1", "CMYK", "F"]),
                    (rng.choice([1, 40]), 3),
                ).save(path, "TIFF")
            case 7:
                path.unlink()
                path.symlink_to(rng.choice(["/dev/zero", "nothing", path.name, ".."]))
            case _:
                path.unlink()
                path.mkdir()


SETS = {"mnist": idx, "cifar10": cifar, "folder:data": images}


def run(seed: int, folder: Path) -> str:
    rng, guard = Random(seed), Guard(folder)
    name = rng.choice(sorted(SETS))
    data, spoil = folder / "data", rng.random() < 0.95
    data.mkdir()
    SETS[name](data, rng, spoil)
    print(name, spoil)
    there = [] if name.startswith("folder:") else ["--data-dir", "data"]
    guard.strict = True
    if rng.random() < 0.5:
        how = command([*_SEARCH, "--data", name, *there])
    else:
        how = call(lambda: _check(sc.load(name, None if not there else "data")))
    guard.check()
    if Path("ran").exists():
        raise Failure("code in a data set was run")
    if (
        not spoil and how != "fine" and name != "cifar10"
    ):  # whose files are the published ones or none
        raise Failure("good data was refused")
    return how


def _check(found: Any) -> None:
    for split in (found.train, found.test):
        labels = split.labels
        if not len(labels) or len(labels) != len(split.images):
            raise Failure(f"{len(labels)} labels of {len(split.images)} images")
        if int(labels.min()) < 0 or int(labels.max()) >= found.classes:
            raise Failure(f"labels {labels.min()} to {labels.max()} of {found.classes} classes")
        if tuple(split.images[[0]].shape[1:]) != tuple(found.shape):
            raise Failure(f"images of {tuple(split.images[[0]].shape)} in a set of {found.shape}")
