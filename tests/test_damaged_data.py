"""Data sets that are not what they say: each is refused by the name of its file, and none runs anything."""

import hashlib
import itertools
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import images, one_error
from data_files import TEST, TRAIN, idx, mnist
from PIL import Image

from sparsecore import data, folders, named_data
from sparsecore.cli import main
from sparsecore.data import DataError

FILES = [file for pair in named_data._IDX_FILES for file in pair]


def cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "cifar10", **changed: Any
) -> Path:
    """A small set in the files of CIFAR, which count as those that were published; returns their folder.

    changed: entries of the first file that are others.
    """
    known = named_data.NAMED[name]
    folder, rng = root / known.folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    for kind in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(known.kind, kind):
            labels = [i % known.classes for i in range(5)]
            batch: dict[str, Any] = {
                "data": rng.integers(0, 256, (5, 3072), dtype=np.uint8),
                "labels" if name == "cifar10" else "fine_labels": labels,
            }
            if kind == "train_list" and not sums:
                batch |= changed
            (folder / file).write_bytes(pickle.dumps(batch, protocol=3))
            sums.append([file, hashlib.md5((folder / file).read_bytes()).hexdigest()])
        monkeypatch.setattr(known.kind, kind, sums)
    return folder


def refused(name: str, root: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(name, root)
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")]
)
def test_whole_idx_files_are_read_as_torchvision_does(
    name: str, folder: str, tmp_path: Path
) -> None:
    mnist(tmp_path, folder=folder)
    found = data.load(name, tmp_path)
    assert (len(found.train), len(found.test), found.shape) == (TRAIN, TEST, (1, 28, 28))
    for train, part in ((True, found.train), (False, found.test)):
        raw = named_data.NAMED[name].kind(tmp_path, train=train)
        assert isinstance(part.images, torch.Tensor) and part.labels.dtype == torch.int64
        assert torch.equal(part.images[:, 0], raw.data) and torch.equal(part.labels, raw.targets)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:3],
        lambda b: b[:7],
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b + b"\0",
        lambda b: b + b,
        lambda b: bytes((0, 0, 9, b[3])) + b[4:],  # signed bytes
        lambda b: bytes((0, 0, 13, b[3])) + b[4:],  # floating point
        lambda b: b[:3] + bytes((b[3] + 1,)) + b[4:],  # more dimensions
        lambda b: b[:3] + b"\0" + b[4:],
        lambda b: b[:4] + struct.pack(">I", 2**32 - 1) + b[8:],
        lambda b: b[:4] + struct.pack(">I", 0) + b[8:],
        lambda b: b[:4] + bytes(4 * b[3]),  # an empty set, whole
        lambda b: b[:4] + b"\xff" * 4 * b[3] + b[4 + 4 * b[3] :],  # sizes that overflow
        lambda b: b[::-1],
        lambda b: b"\x1f\x8b" + zlib.compress(b),
        lambda b: b"<html>not found</html>",
    ],
)  # fmt: skip
def test_idx_files_hold_what_their_header_says(
    file: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    raw = mnist(tmp_path)
    (raw / file).write_bytes(damage((raw / file).read_bytes()))
    refused("mnist", tmp_path, str(raw / file), "expected")


@pytest.mark.parametrize("file", FILES)
def test_idx_files_that_are_none(file: str, tmp_path: Path) -> None:
    path = mnist(tmp_path) / file
    path.unlink()
    refused("mnist", tmp_path, str(path), "nothing there")
    path.mkdir()
    refused("mnist", tmp_path, str(path), "a folder")
    path.rmdir()
    os.mkfifo(path)  # to be waited for
    refused("mnist", tmp_path, str(path), "no plain file")


def test_images_and_labels_belong_together(tmp_path: Path) -> None:
    raw = mnist(tmp_path)
    file, labels = raw / FILES[1], np.arange(TRAIN, dtype=np.uint8) % 10
    file.write_bytes(idx(labels[:-1]))
    refused("mnist", tmp_path, str(file), "a label for each of the 30 images", "29")
    labels[7] = 10
    file.write_bytes(idx(labels))
    refused("mnist", tmp_path, str(file), "labels of 0 to 9, got 10 as number 7")


@pytest.mark.parametrize("side", [1, 27, 32])
def test_images_of_other_sizes_are_not_those_of_the_set(side: int, tmp_path: Path) -> None:
    raw = mnist(tmp_path, side)
    refused("mnist", tmp_path, str(raw / FILES[0]), f"28 x 28 pixels, got {side} x {side}")
    other = mnist(tmp_path / "whole")
    (raw / FILES[2]).replace(other / FILES[2])  # test images alone
    refused("mnist", tmp_path / "whole", str(other / FILES[2]), f"got {side} x {side}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_torchvision_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cifar(tmp_path, monkeypatch, name)
    found, known = data.load(name, tmp_path), named_data.NAMED[name]
    monkeypatch.setattr(known.kind, "_load_meta", lambda self: None)
    for train, part in ((True, found.train), (False, found.test)):
        raw = known.kind(tmp_path, train=train)
        assert isinstance(part.images, torch.Tensor) and part.images.is_contiguous()
        assert torch.equal(part.images, torch.as_tensor(raw.data).permute(0, 3, 1, 2))
        assert part.labels.tolist() == raw.targets and part.labels.dtype == torch.int64
    assert found.shape == (3, 32, 32) and found.classes == known.classes


class Runs:
    """A pickle that writes a file as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def test_cifar_files_that_were_not_published_are_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cifar(tmp_path, monkeypatch)
    for file, damage in (
        ("data_batch_3", lambda b: b[:-1]),
        ("test_batch", lambda b: b[:-9] + b"x" + b[-8:]),
        ("data_batch_1", lambda b: b""),
        ("data_batch_5", lambda b: pickle.dumps(Runs(tmp_path / "mark"))),
    ):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(damage(whole))
        refused("cifar10", tmp_path, str(folder / file), "the published file of MD5")
        (folder / file).write_bytes(whole)
    (folder / "data_batch_2").unlink()
    refused("cifar10", tmp_path, "data_batch_2", "nothing there")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": Runs(Path("mark"))}, "it names "),
        ({"data": np.zeros((4, 3072), np.uint8)}, "(5, 3072)"),
        ({"data": np.zeros((5, 3071), np.uint8)}, "(5, 3072)"),
        ({"data": np.zeros((5, 3072), np.int64)}, "int64"),
        ({"data": [[0] * 3072] * 5}, "list"),
        ({"data": np.array([{}] * 5, object)}, "object"),
        ({"labels": [0, 1, 2, 3, 10]}, "labels of 0 to 9, got 10 as number 4"),
        ({"labels": [0, 1, 2, 3, -1]}, "got -1"),
        ({"labels": [0, 1, 2, 3, 0.5]}, "a whole number as each label"),
        ({"labels": [0, 1, 2, 3, "x"]}, "a whole number as each label"),
        ({"labels": [0, 1, 2, 3, 2**80]}, "a whole number as each label"),
        ({"labels": []}, "a whole number as each label"),
        ({"labels": None}, "expected"),
    ],
)
def test_a_pickle_of_the_right_sum_holds_pixels_and_labels_alone(
    changed: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = cifar(tmp_path, monkeypatch, **changed)
    refused("cifar10", tmp_path, str(folder / "data_batch_1"), words)
    assert not Path("mark").exists()


def test_what_is_missing_is_downloaded_and_damage_is_told_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def download(root: Path, **options: Any) -> None:
        asked.append(options)
        mnist(Path(root))

    monkeypatch.setattr(data, "default_folder", lambda: tmp_path)
    changed = replace(named_data.NAMED["mnist"], kind=download)
    monkeypatch.setitem(named_data.NAMED, "mnist", changed)
    assert len(data.load("mnist").train) == TRAIN and asked == [{"train": False, "download": True}]
    data.load("mnist")
    assert len(asked) == 1
    file = tmp_path / "MNIST/raw" / FILES[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["search", "--data", "mnist", "--out", str(tmp_path / "t")]) == 2
    assert str(file) in one_error(capsys) and len(asked) == 1


# --- Folders of images ------------------------------------------------------------------------------


def bomb(path: Path, width: int, height: int) -> None:
    """A small PNG that says it has so many pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ))  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (2**31 - 1, 2**31 - 1), (2**20, 100)])
def test_images_that_unpack_to_gigabytes_are_not_unpacked(
    size: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images(tmp_path)
    bomb(tmp_path / "a" / "3.png", *size)
    refused(f"folder:{tmp_path}", None, str(tmp_path / "a" / "3.png"), "expected a readable image")  # type: ignore[arg-type]
    assert main(["search", "--data", f"folder:{tmp_path}", "--out", str(tmp_path / "t")]) == 2
    captured = capsys.readouterr().err.splitlines()
    assert len(captured) == 1 and captured[0].startswith("error: ")


def test_a_thin_strip_is_not_scaled_as_a_whole(tmp_path: Path) -> None:
    images(tmp_path)
    strip = np.zeros((1, 60_001, 3), np.uint8)
    strip[:, 30_000] = 200
    Image.fromarray(strip).save(tmp_path / "a" / "1.png")
    found = data.load(f"folder:{tmp_path}", image_size=64).train.images
    assert isinstance(found, torch.Tensor) and (found.flatten(1) == 200).all(1).any()


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"GIF89a", b"\x89PNG\r\n\x1a\n", PROGRAM, b"\xff" * 5000]
)
def test_files_that_are_no_images_are_named(content: bytes, tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "b" / "2.png").write_bytes(content)
    with pytest.raises(DataError, match=r"b/2\.png: expected a readable image"):
        data.load(f"folder:{tmp_path}")


def test_no_image_is_handed_to_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was asked")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ran)
    images(tmp_path)
    (tmp_path / "a" / "1.jpg").write_bytes(PROGRAM)
    with pytest.raises(DataError, match=r"a/1\.jpg: expected a readable image"):
        data.load(f"folder:{tmp_path}")


def test_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    for count in (2, 3):  # folders of a class, each with links to all others
        root = images(tmp_path / str(count))
        names = [f"d{i}" for i in range(count)]
        for name in names:
            (root / "a" / name).mkdir()
            Image.new("RGB", (12, 12)).save(root / "a" / name / "own.png")
            for other in names:
                (root / "a" / name / f"to-{other}").symlink_to(Path("..", other))
        assert data.load(f"folder:{root}").classes == 2
    (root / "a" / "itself.png").symlink_to("itself.png")
    with pytest.raises(DataError, match=r"itself\.png: expected a readable image"):
        data.load(f"folder:{root}")


def test_links_that_are_millions_of_ways_are_refused(tmp_path: Path) -> None:
    root = images(tmp_path)
    levels = [root / "a" / "0"] + [tmp_path.parent / f"{tmp_path.name}-{i}" for i in range(1, 40)]
    for level in levels:
        level.mkdir()
    for level, below in itertools.pairwise(levels):
        for way in "xy":
            (level / way).symlink_to(below)
    with pytest.raises(DataError, match="lead to it more than 64 times"):
        folders.find_images(root)


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = images(tmp_path / "i")
    named = os.fsencode(root / "a") + b"/0\xff\x9b2J\x1b]0;x\x07\n.png"
    (root / "a" / "0.png").rename(os.fsdecode(named))
    (root / "b").rename(os.fsdecode(os.fsencode(root) + b"/\xfe[red]"))
    found = data.load(f"folder:{root}")
    assert found.classes == 2 and len(found.digest) == 64
    Path(os.fsdecode(named)).write_bytes(b"")
    assert main(["search", "--data", f"folder:{root}", "--out", str(tmp_path / "t")]) == 2
    assert r"\xff\x9b2J\x1b]0;x\x07" in one_error(capsys)


@pytest.mark.parametrize(("classes", "count"), [("a", 6), ("ab", 0), ("ab", 1), ("", 0)])
def test_too_few_images(classes: str, count: int, tmp_path: Path) -> None:
    root = images(tmp_path / "made", count=max(count, 1))
    for label in "ab":
        for file in (
            sorted((root / label).iterdir())[count:]
            if label in classes
            else (root / label).iterdir()
        ):
            file.unlink()
        if label not in classes:
            (root / label).rmdir()
    if (classes, count) == ("ab", 1):  # one of each: the first would be held out
        assert main(["search", "--data", f"folder:{root}", "--out", str(tmp_path / "t")]) == 2
    else:
        with pytest.raises(DataError, match="expected at least 2 class folders with images"):
            data.load(f"folder:{root}")
