"""What is common to a folder's images: looked at in pieces, remembered, and looked at again when they change."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rand
from PIL import Image

from sparsecore import data, survey, writing
from sparsecore.data import DataError

MEMORY = ".sparsecore-moments.safetensors"


def image_folder(root: Path, sides: tuple[int, ...] = (6, 6, 6), classes: str = "ab") -> Path:
    rng = np.random.default_rng(0)
    for label in classes:
        (root / label).mkdir(parents=True)
        for i, side in enumerate(sides):
            pixels = rng.integers(0, 256, (side, side + 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


@pytest.mark.parametrize(("largest", "white"), [(1.0, 1), (200.0, 255), (3000.0, 65535)])
def test_what_only_test_images_are_has_a_scale_too(
    largest: float, white: int, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        image_folder(tmp_path / split, (4,) * 4)
    values = np.full((4, 4), largest, np.float32)
    for label in "ab":
        Image.fromarray(values).save(tmp_path / "test" / label / "9.tif")
    loaded = data.load(f"folder:{tmp_path}").test.images
    assert isinstance(loaded, torch.Tensor)
    assert loaded[4].unique().item() == pytest.approx(255 * largest / white, abs=1)
    again = data.load(f"folder:{tmp_path}").test.images  # as remembered
    assert isinstance(again, torch.Tensor) and torch.equal(again, loaded)
    Image.fromarray(values / largest).save(tmp_path / "train" / "a" / "9.tif")
    if largest > 1:  # what training images say goes first, and does not fit here
        with pytest.raises(DataError, match="should lie in 0 to 1, and reach from"):
            data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_moments_are_those_of_all_pixels(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "CHUNK_BYTES", chunk)
    images = (256 * rand(9, 3, 5, 4)).to(torch.uint8)
    images[:, 1] = 7  # one colour
    for rows in (None, torch.tensor([0, 3, 8])):
        mean, std = survey.moments(images, rows)
        part = images.double() / 255 if rows is None else images[rows].double() / 255
        expected = torch.std_mean(part, (0, 2, 3))
        assert mean == pytest.approx(expected[1].tolist(), rel=1e-12)
        assert std == pytest.approx(expected[0].clamp_min(1e-3).tolist(), rel=1e-12)


def test_the_median_side_decides_and_image_size_over_it(tmp_path: Path) -> None:
    root = image_folder(tmp_path, (31, 8, 8, 9, 2))
    assert data.load(f"folder:{root}").shape == (3, 8, 8)
    assert data.load(f"folder:{root}", image_size=5).shape == (3, 5, 5)
    with pytest.raises(DataError, match="image size: expected 1 to 16,384 pixels, got 0"):
        data.load(f"folder:{root}", image_size=0)


@pytest.mark.parametrize(("largest", "white"), [(1.0, 1), (200.0, 255), (3000.0, 65535)])
def test_floating_point_has_one_scale_in_a_folder(
    largest: float, white: int, tmp_path: Path
) -> None:
    for label, part in (("dark", 0.1), ("light", 1.0)):
        (tmp_path / label).mkdir()
        for i in range(6):
            values = np.full((4, 4), largest * part, np.float32)
            Image.fromarray(values).save(tmp_path / label / f"{i}.tif")
    loaded = data.load(f"folder:{tmp_path}").train
    assert isinstance(loaded.images, torch.Tensor)
    for label, part in ((0, 0.1), (1, 1.0)):
        found = loaded.images[loaded.labels == label].unique().tolist()
        assert found == [pytest.approx(255 * largest * part / white, abs=1)]


def test_what_was_looked_at_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path)
    first = data.load(f"folder:{root}")
    assert [p.name for p in root.iterdir() if p.is_file()] == [MEMORY]

    def looked(*_: object) -> None:
        raise AssertionError("looked at again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "moments", looked)
        patch.setattr(data, "survey", looked)
        again = data.load(f"folder:{root}")
        for name in ("mean", "std", "shape"):
            assert getattr(again, name) == getattr(first, name)
        with pytest.raises(AssertionError, match="again"):
            data.load(f"folder:{root}", image_size=4)


def touch(root: Path) -> None:
    os.utime(root / "a" / "1.png", (1, 1))


def dated(root: Path) -> None:
    """Another image, of the size and time of the one before, as `cp -p` and `rsync -t` leave it."""
    path = root / "a" / "1.png"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rename(root: Path) -> None:
    (root / "a" / "1.png").rename(root / "a" / "9.png")


def add(root: Path) -> None:
    Image.new("RGB", (40, 40)).save(root / "a" / "9.png")


def damage(root: Path) -> None:
    (root / MEMORY).write_bytes((root / MEMORY).read_bytes()[:-1])


def nonsense(root: Path) -> None:
    tensors, meta = survey.safefile.read(root / MEMORY, kind="moments")
    survey.safefile.write(root / MEMORY, tensors | {"std": torch.zeros(3)}, meta, kind="moments")


@pytest.mark.parametrize("change", [touch, dated, rename, add, damage, nonsense])
def test_other_files_are_looked_at_and_a_damaged_memory_is_made_again(
    change, tmp_path: Path
) -> None:
    root = image_folder(tmp_path)
    data.load(f"folder:{root}")
    change(root)
    changed = (root / MEMORY).read_bytes()
    after = data.load(f"folder:{root}")
    assert min(after.std) > 0 and (root / MEMORY).read_bytes() != changed


@pytest.mark.parametrize("way", ["link", "dead link", "file", "folder", "pipe"])
def test_what_lies_where_the_memory_would_is_left_alone(way: str, tmp_path: Path) -> None:
    """A folder of images is a stranger's: what it holds does not decide what is written."""
    root, other = image_folder(tmp_path), tmp_path / "precious"
    memory = root / MEMORY
    if way == "link":
        other.write_text("mine")
    if "link" in way:
        memory.symlink_to(other)
    elif way == "file":
        memory.write_text("mine")
    elif way == "folder":
        memory.mkdir()
    else:
        os.mkfifo(memory)
    plain = data.load(f"folder:{root}")
    assert min(plain.std) > 0 and other.exists() == (way == "link")
    if way in ("link", "file"):
        assert memory.read_text() == "mine"
    assert memory.is_symlink() == ("link" in way)


def test_a_folder_that_cannot_be_written_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(writing, "_new_part", full)
    assert len(data.load(f"folder:{root}").train) == 5
    assert sorted(p.name for p in root.iterdir()) == ["a", "b"]


def test_loading_holds_the_pixels_and_little_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numpy's and Python's memory: images are not gathered there first.  Torch's is one tensor a split."""
    made: list[int] = []
    empty = torch.empty

    def counted(*size: int, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)  # type: ignore[call-overload]
        made.append(tensor.numel())
        return tensor

    root = image_folder(tmp_path, (96,) * 60)
    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(survey, "CHUNK_BYTES", 4 * 3 * 96 * 96)
    data.load(f"folder:{root}")  # imports what it needs
    (root / MEMORY).unlink()
    made.clear()
    tracemalloc.start()
    dataset = data.load(f"folder:{root}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pixels = 120 * 3 * 96 * 96
    assert len(dataset.train) == 100 and sum(made) < 1.2 * pixels and peak < 0.3 * pixels
