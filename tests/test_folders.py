"""Folders of images as people and tools leave them: splits, classes, and what is neither."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from sparsecore.folders import DataWarning, ImageFolder, find_images, is_class_folder
from sparsecore.images import DataError


def images(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (2, 2)).save(folder / f"{i}.png")
    return folder


def classes(folder: Path, names: Iterable[str] = ("cat", "dog"), count: int = 3) -> None:
    for name in names:
        images(folder / name, count)


def quiet(root: Path) -> ImageFolder:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return find_images(root)


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize(
    "test", ["test", "TEST", "testing", "val", "Valid", "validation", "dev", "eval", "evaluation"]
)
def test_splits_by_their_usual_names(train: str, test: str, tmp_path: Path) -> None:
    classes(tmp_path / train, count=4)
    classes(tmp_path / test)
    (tmp_path / "docs").mkdir()
    found = quiet(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert [label for _, label in found.train] == [0] * 4 + [1] * 4
    assert [path.relative_to(tmp_path).parts[0] for path, _ in found.test] == [test] * 6


@pytest.mark.skipif(os.name == "nt", reason="no named pipes in folders")
@pytest.mark.parametrize("name", ["9.png", "pipe"])
def test_a_pipe_is_left_out_rather_than_waited_for(name: str, tmp_path: Path) -> None:
    classes(tmp_path)
    os.mkfifo(tmp_path / "cat" / name)
    with pytest.warns(DataWarning, match="no image in a class folder: 1 pipe or device"):
        found = find_images(tmp_path)
    assert len(found.train) + len(found.test) == 6


@pytest.mark.parametrize(
    ("path", "split", "expected"),
    [
        ("runs", False, True),
        ("cat/runs", False, True),
        (".", False, True),
        ("../runs", False, False),
        (".runs", False, False),
        ("runs", True, False),
        (".", True, False),
        ("train/runs", True, True),
        ("Val/cat/runs", True, True),
    ],
)
def test_where_a_new_folder_would_be_a_class(
    path: str, split: bool, expected: bool, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    for part in ("train", "Val") if split else (".",):
        classes(root / part)
    assert is_class_folder(root, root / path) is expected
    assert not is_class_folder(tmp_path / "nowhere", tmp_path / "nowhere" / "runs")


def test_the_advice_names_the_training_images(tmp_path: Path) -> None:
    for name in ("hold_out", "train_set"):
        classes(tmp_path / name)
    with pytest.raises(DataError, match=r"folder:\S*train_set to have"):
        find_images(tmp_path)


def test_of_two_test_folders_one_is_used_and_named(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("val", 2), ("test", 1)):
        classes(tmp_path / name, count=count)
    with pytest.warns(DataWarning, match=r"test images are those of test; val is left out"):
        assert len(find_images(tmp_path).test) == 2


def test_a_test_folder_without_classes_gives_way(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", count=2)
    images(tmp_path / "test")
    with pytest.warns(DataWarning, match="those of val; test is left out"):
        assert len(find_images(tmp_path).test) == 4


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train"], r"a folder called train and one called test .* got train; .*folder:\S*train"),
        (["valid"], "got valid"),
        (["test", "valid"], "got test, valid"),
        (["train", "holdout"], "got holdout, train"),
        (["train_set", "test_set"], "got test_set, train_set"),
        (["train", "unlabelled/"], "got train, unlabelled"),
        (["train", "Train", "test"], "expected one such folder, got Train, train"),
        (["train", "test", "Test"], "expected one such folder, got Test, test"),
        (["train/", "test/"], "at least 2 class folders"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_splits_that_cannot_be_told_are_not_taken_for_classes(
    folders: list[str], message: str, tmp_path: Path
) -> None:
    for folder in folders:
        if folder.endswith("/"):
            images(tmp_path / folder)
        else:
            classes(tmp_path / folder)
    with pytest.raises(DataError, match=message):
        find_images(tmp_path)


def test_a_class_may_be_called_train_and_hold_folders(tmp_path: Path) -> None:
    classes(tmp_path, ["bus", "train"])
    assert quiet(tmp_path).classes == ["bus", "train"]
    classes(tmp_path / "bus", ["red", "blue"])
    classes(tmp_path / "tram", ["red", "blue"])
    found = quiet(tmp_path)
    assert found.classes == ["bus", "train", "tram"] and len(found.train + found.test) == 18


TOOLS = [
    ".ipynb_checkpoints",
    "__MACOSX",
    "__pycache__",
    ".git",
    "@eaDir",
    "$RECYCLE.BIN",
    ".cache",
]


@pytest.mark.parametrize("tool", TOOLS)
def test_hidden_folders_and_those_of_tools_are_no_classes(tool: str, tmp_path: Path) -> None:
    for root in (tmp_path / "flat", tmp_path / "split" / "train", tmp_path / "split" / "test"):
        classes(root)
        images(root / "cat" / tool)  # within a class too
    images(tmp_path / "flat" / tool)
    classes(tmp_path / "split" / tool)
    (tmp_path / "split" / "train" / tool).mkdir()
    for name, count in (("flat", 6), ("split", 12)):
        found = quiet(tmp_path / name)
        assert found.classes == ["cat", "dog"] and len(found.train + found.test) == count


def test_other_files_are_left_out_and_said_so(tmp_path: Path) -> None:
    classes(tmp_path)
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._0.png"):
        (tmp_path / "cat" / name).write_bytes(b"of a system")
        (tmp_path / name).write_bytes(b"of a system")
    assert len(quiet(tmp_path).train) == 5
    (tmp_path / "cat" / "a.HEIC").write_bytes(b"no image that is read")
    (tmp_path / "dog" / "LICENSE").write_text("free")
    Image.new("RGB", (2, 2)).save(tmp_path / "stray.png")
    with pytest.warns(DataWarning, match=r"left out .* 1 \.png, 1 \.heic, 1 without an ending"):
        assert len(find_images(tmp_path).train) == 5


def test_empty_classes_are_named(tmp_path: Path) -> None:
    classes(tmp_path / "flat")
    (tmp_path / "flat" / "owl").mkdir()
    with pytest.raises(DataError, match="expected images in every class folder, found none in owl"):
        find_images(tmp_path / "flat")
    for split in ("train", "test"):
        classes(tmp_path / "split" / split, ["cat", "dog", "owl"])
    for path in (tmp_path / "split" / "test" / "owl").iterdir():
        path.unlink()
    with pytest.warns(DataWarning, match="no test images of owl"):
        assert find_images(tmp_path / "split").classes == ["cat", "dog", "owl"]
    for path in (tmp_path / "split" / "train" / "owl").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"train: expected images in every .* none in owl"):
        find_images(tmp_path / "split")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a", "b", "c"], ["a", "b"], "but test has no c;"),
        (["a", "b"], ["a", "b", "c"], "but train has no c;"),
        (["Cat", "dog"], ["cat", "dog"], "but train has no cat and test has no Cat;"),
        ([*"abcdefgh"], ["a", "b"], "test has no c, d, e, f and 2 more;"),
    ],
)
def test_which_split_lacks_which_class(
    train: list[str], test: list[str], message: str, tmp_path: Path
) -> None:
    classes(tmp_path / "train", train)
    classes(tmp_path / "test", test)
    with pytest.raises(DataError, match=message):
        find_images(tmp_path)


def test_no_class_is_lost_to_the_test_split(tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 1), ("c", 5), ("d", 1), ("e", 3)):
        images(tmp_path / name, count)
    with pytest.warns(DataWarning, match="b, d has one image"):
        found = find_images(tmp_path)
    assert {label for _, label in found.train} == {0, 1, 2, 3, 4}
    assert [path.parent.name for path, _ in found.test] == ["a"]
    assert [label for _, label in found.train] == sorted(label for _, label in found.train)
    few = tmp_path / "few"
    classes(few, count=1)
    with pytest.warns(DataWarning), pytest.raises(DataError, match="images enough to hold every"):
        find_images(few)


def test_nothing_of_use(tmp_path: Path) -> None:
    images(tmp_path / "flat")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("none", "expected a folder, found nothing there"),
        ("file", "expected a folder, found a file"),
        ("flat", "at least 2 class folders with images .* got 0 with 0"),
        (".", "at least 2 class folders with images .* got 1 with 3: flat; put the images of each"),
    ):
        with pytest.raises(DataError, match=message):
            find_images(tmp_path / name)


def test_a_folder_that_cannot_be_read_is_no_empty_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes(tmp_path, ["cat", "dog", "owl"])
    scandir = os.scandir

    def closed(path: Path | str) -> object:  # as root no folder is closed
        if Path(path).name == "owl":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"owl: expected a folder that can be read \(Permission"):
        find_images(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    classes(tmp_path / "data", ["cat"])
    (tmp_path / "data" / "dog").symlink_to(images(tmp_path / "elsewhere"))
    (tmp_path / "data" / "cat" / "self").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "all").symlink_to(tmp_path / "data")
    found = quiet(tmp_path / "data")
    assert found.classes == ["cat", "dog"] and len(found.train + found.test) == 6


def test_names_of_any_script_and_folders_within_classes_in_order(tmp_path: Path) -> None:
    for name in ("猫", "Ünïcode & spaces", "a/b", "a/b-c"):
        images(tmp_path / name, 1)
    found = quiet(tmp_path)
    assert found.classes == ["a", "Ünïcode & spaces", "猫"]
    both = [path for path, label in sorted([*found.train, *found.test]) if label == 0]
    assert [path.parent.name for path in both] == ["b", "b-c"]
