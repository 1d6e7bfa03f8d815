"""Data: determinism, augmentation against a slow reference, folders, and every way to be wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import rand
from PIL import Image
from torch import Tensor

from sparsecore import data
from sparsecore.data import Batches, DataError, Dataset, Split, limited


def toy(n: int = 50, channels: int = 3, size: int = 8) -> Dataset:
    images = (255 * rand(n, channels, size, size)).to(torch.uint8)
    split = Split(images, torch.arange(n))
    moments = (0.5,) * channels, (0.25,) * channels
    return Dataset("toy", split, split, n, (channels, size, size), *moments, True)


def image_folder(
    root: Path, per_class: int = 6, size: int = 10, classes: tuple = ("a", "b")
) -> Path:
    rng = np.random.default_rng(0)
    for label in classes:
        (root / label).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


def all_of(batches: Batches, epoch: int = 0) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches.epoch(epoch), strict=True)
    return torch.cat(x), torch.cat(y)


def test_every_sample_once_an_epoch_in_an_order_of_seed_and_epoch() -> None:
    batches = Batches(toy(), "train", 16, seed=1)
    assert len(batches) == 4 == len(list(batches.epoch(0)))
    orders = [all_of(batches, i)[1].tolist() for i in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert all_of(Batches(toy(), "train", 16, seed=2))[1].tolist() != orders[0]
    iterated = [torch.cat([y for _, y in batches]).tolist() for _ in range(2)]
    assert iterated == orders[:2]
    assert all_of(Batches(toy(), "test", 16, shuffle=False))[1].tolist() == list(range(50))
    dropping = Batches(toy(), "train", 16, drop_last=True)
    assert len(dropping) == 3 == len(list(dropping.epoch(0)))


def test_order_numbers_the_samples_of_the_batches() -> None:
    dataset = toy()
    batches = Batches(dataset, "train", 16, seed=1)
    order = batches.order(3)
    assert order is not None
    assert torch.equal(all_of(batches, 3)[1], dataset.train.labels[order])
    assert Batches(dataset, "train", 16, augment=True).order(3) is None
    assert Batches(dataset, "train", 16, drop_last=True).order(3) is None  # 50 samples


def test_normalisation() -> None:
    dataset = toy()
    x, _ = all_of(Batches(dataset, "train", 7, shuffle=False))
    assert isinstance(dataset.train.images, Tensor) and x.dtype == torch.float32
    torch.testing.assert_close(x, (dataset.train.images.float() / 255 - 0.5) / 0.25)


def test_augmentation_against_one_image_at_a_time() -> None:
    x = rand(12, 2, 6, 5)
    flip = torch.arange(12) % 2 == 0
    rows, columns = torch.arange(12) % 9, (torch.arange(12) * 5) % 9
    result = data.flip_crop(x, flip, rows, columns)
    for i in range(12):
        image = x[i].flip(-1) if flip[i] else x[i]
        # A flipped image is cropped from its own, mirrored padding: the border is symmetric.
        padded = torch.nn.functional.pad(x[i], [4] * 4)
        r, c = int(rows[i]), int(columns[i])
        expected = padded[:, r : r + 6, c : c + 5]
        expected = expected.flip(-1) if flip[i] else expected
        assert torch.equal(result[i], expected)
        assert image.shape == expected.shape


def test_augmentation_is_drawn_per_epoch_and_changes_pixels_only() -> None:
    plain, moved = (Batches(toy(), "train", 16, augment=a) for a in (False, True))
    assert torch.equal(all_of(plain)[1], all_of(moved)[1])
    assert not torch.equal(all_of(plain)[0], all_of(moved)[0])
    assert torch.equal(all_of(moved, 3)[0], all_of(moved, 3)[0])


def test_digits_are_embedded() -> None:
    dataset = data.load("digits")
    assert (len(dataset.train), len(dataset.test)) == (1438, 359)
    assert dataset.shape == (1, 8, 8) and dataset.classes == 10
    again = data.load("digits")
    assert isinstance(dataset.train.images, Tensor) and isinstance(again.train.images, Tensor)
    assert torch.equal(dataset.train.images, again.train.images)
    x, _ = all_of(Batches(dataset, "train", 512))
    assert abs(x.mean().item()) < 1e-4 and x.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_sets_offline(name: str, data_dir: Path) -> None:
    dataset = data.load(name, data_dir)
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert dataset.shape == (1, 28, 28) and dataset.classes == 10
    x, _ = all_of(Batches(dataset, "train", 10_000))
    assert abs(x.mean().item()) < 2e-3 and x.std().item() == pytest.approx(1, abs=2e-3)


def test_folders_with_and_without_a_split(tmp_path: Path) -> None:
    flat = data.load(f"folder:{image_folder(tmp_path / 'flat')}")
    assert (len(flat.train), len(flat.test)) == (10, 2)
    assert flat.shape == (3, 10, 10) and flat.classes == 2
    image_folder(tmp_path / "split" / "train")
    image_folder(tmp_path / "split" / "val", per_class=2)
    split = data.load(f"folder:{tmp_path / 'split'}", image_size=6)
    assert (len(split.train), len(split.test)) == (12, 4) and split.shape == (3, 6, 6)


def test_lazy_folders_give_the_same_batches(tmp_path: Path, monkeypatch) -> None:
    name = f"folder:{image_folder(tmp_path)}"
    eager = Batches(data.load(name), "train", 4, augment=True)
    monkeypatch.setattr(data, "EAGER_BYTES", 0)
    dataset = data.load(name)
    assert isinstance(dataset.train.images, data.ImageFiles)
    lazy = Batches(dataset, "train", 4, augment=True)
    for a, b in zip(all_of(eager), all_of(lazy), strict=True):
        assert torch.equal(a, b)


def test_cifar10_from_its_folder_of_images(tmp_path: Path) -> None:
    for part in ("train", "test"):
        image_folder(tmp_path / "cifar10-jpeg" / part, per_class=1, classes=tuple("abcdefghij"))
    dataset = data.load("cifar10", tmp_path)
    assert dataset.classes == 10 and dataset.shape == (3, 32, 32) and dataset.flip_crop
    assert dataset.mean == (0.4914, 0.4822, 0.4465)


def test_bad_requests(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    image_folder(tmp_path / "one", classes=("a",))
    image_folder(tmp_path / "odd" / "train")
    image_folder(tmp_path / "odd" / "test", classes=("a", "c"))
    cases = {
        "imagenet": "expected one of digits, mnist",
        f"folder:{tmp_path / 'none'}": "found nothing there",
        f"folder:{tmp_path / 'empty'}": "class folders",
        f"folder:{tmp_path / 'one'}": "at least 2 class folders",
        f"folder:{tmp_path / 'odd'}": "the same class folders",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            data.load(name)
    with pytest.raises(DataError, match="found nothing there"):
        data.load("mnist", tmp_path / "none")
    with pytest.raises(DataError, match=r"expected mnist in .*MNIST.raw"):
        data.load("mnist", tmp_path)
    for bad in ({"split": "valid"}, {"batch_size": 0}):
        with pytest.raises(DataError, match="expected"):
            Batches(toy(), **({"split": "train", "batch_size": 4} | bad))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (root / "a" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png: expected a readable image"):
        data.load(f"folder:{root}")


def test_reduced_data_are_a_fixed_choice() -> None:
    whole = data.load("digits")
    few = limited(whole, 100)
    assert len(few.train) == len(few.train.images) == 100 and len(few.test) == len(whole.test)
    assert torch.equal(limited(whole, 100).train.images, few.train.images)
    assert len(few.train.labels.unique()) == 10 and limited(whole, None) is whole
    for wrong in (0, len(whole.train) + 1):
        with pytest.raises(DataError, match="train samples: expected 1 to"):
            limited(whole, wrong)
