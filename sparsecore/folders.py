"""Folders of images: which folder is a class, which a split, and which belongs to neither."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .images import SUFFIXES, DataError

Item = tuple[Path, int]  # an image and its label

TRAIN_NAMES = ("train", "training")
# In the order in which they are preferred where there are several: accuracy is told of test images.
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
_LIKE_A_SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation|hold_?out)"
    r"(set|split|data|images?|[\W_\d].*)?"
)
# What systems and tools leave in folders, besides all whose name begins with a dot.
_TOOL_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
    "system volume information",
}  # fmt: skip
_TOOL_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
# Of a folder within a class, by links: a few that lead to each other are millions of ways.
_MOST_VISITS = 64
_HELD_OUT = 6  # every sixth image is a test image where there is no test folder


class DataWarning(UserWarning):
    """What was left out of the data or moved within it, so that it is not so silently."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.  Labels are places in `classes`, the class folders' names in order."""

    classes: list[str]
    train: list[Item]
    test: list[Item]


def find_images(root: Path) -> ImageFolder:
    """The images of `ROOT/{train,test}/<class>/` or of `ROOT/<class>/`, of which every sixth is a test image.

    The second folder may be called by any of `TEST_NAMES`, both in any case.  Images may lie in folders within a
    class's; hidden folders and those of tools are passed over.  A class whose only image would be held out keeps it
    for training.  DataWarning says what was left out.

    Errors: DataError for no class folders, one class alone, classes without images, classes that differ between
    splits, splits that cannot be told, a folder that cannot be read.
    """
    try:
        there = root.exists()
    except OSError as error:
        raise DataError(
            f"data folder {str(root)[:80]}: expected a folder ({error.strerror})"
        ) from None
    if not there:
        raise DataError(f"data folder {root}: expected a folder, found nothing there")
    if not root.is_dir():
        raise DataError(f"data folder {root}: expected a folder, found a file")
    splits = _splits(root)
    if splits is None:
        return _held_out(root)
    (train_folder, test_folder) = splits
    classes, train = _list(train_folder)
    test_classes, test = _list(test_folder, filled=False)
    if classes != test_classes:
        parts = [
            f"{folder.name} has no {_some(missing)}"
            for folder, missing in (
                (train_folder, sorted(set(test_classes) - set(classes))),
                (test_folder, sorted(set(classes) - set(test_classes))),
            )
            if missing
        ]
        raise DataError(
            f"{root}: expected the same class folders in {train_folder.name} and {test_folder.name}, but "
            f"{' and '.join(parts)}; rename, add or remove folders"
        )
    if not test:
        raise DataError(f"{test_folder}: expected images in its class folders, found none")
    return ImageFolder(classes, train, test)


def is_class_folder(root: Path, path: Path) -> bool:
    """Whether a folder made at `path` would count as a class of the images in `root`, or lie in one."""
    top, real = (Path(os.path.realpath(p)) for p in (root, path))
    if not top.is_dir() or top not in (real, *real.parents):
        return False
    names = {folder.name.casefold() for folder in _folders(top)}
    split = not (names.isdisjoint(TRAIN_NAMES) or names.isdisjoint(TEST_NAMES))
    if real == top:  # what is made lies in it
        return not split
    first = real.relative_to(top).parts[0]
    if split:
        return first.casefold() in TRAIN_NAMES + TEST_NAMES
    return not _is_tool(first)


def _splits(root: Path) -> tuple[Path, Path] | None:
    """The folders of training and of test images; None where `root` holds class folders."""
    folders = _folders(root)
    trains = [f for f in folders if f.name.casefold() in TRAIN_NAMES]
    tests = sorted(
        (f for f in folders if f.name.casefold() in TEST_NAMES),
        key=lambda f: TEST_NAMES.index(f.name.casefold()),
    )
    if not (trains and tests):
        _refuse_other_splits(root, folders, trains)
        return None
    # ImageNet's test images have no classes; its validation images do.
    usable = [f for f in tests if _folders(f)] or tests
    twice = [f for f in usable if f.name.casefold() == usable[0].name.casefold()]
    for same in (trains, twice):
        if len(same) > 1:
            raise DataError(
                f"{root}: expected one such folder, got {_some(f.name for f in same)}; rename or remove all but one"
            )
    if len(tests) > 1:
        others = _some(f.name for f in tests if f != usable[0])
        _warn(f"{root}: test images are those of {usable[0].name}; {others} is left out")
    return trains[0], usable[0]


def _refuse_other_splits(root: Path, folders: list[Path], trains: list[Path]) -> None:
    """Splits that would be taken for classes are an error: a network would learn to tell them apart."""
    inner = {f: {part.name for part in _folders(f)} for f in folders}
    for folder in folders:
        if len(inner[folder]) < 2 or not _LIKE_A_SPLIT.fullmatch(folder.name.casefold()):
            continue
        shared = [f for f in folders if f != folder and inner[folder] & inner[f]]
        if shared or len(folders) == 1 or folder in trains:
            some = next((f for f in [folder, *shared] if "train" in f.name.casefold()), folder)
            raise DataError(
                f"{root}: expected class folders, or a folder called train and one called test (or "
                f"{', '.join(TEST_NAMES[2:-1])}), got {_some(f.name for f in folders)}; rename, or give "
                f"folder:{some} to have every sixth of its images held out"
            )


def _held_out(root: Path) -> ImageFolder:
    classes, items = _list(root)
    learned = {label for i, (_, label) in enumerate(items) if i % _HELD_OUT}
    alone = [
        classes[items[i][1]] for i in range(0, len(items), _HELD_OUT) if items[i][1] not in learned
    ]
    if alone:
        _warn(
            f"{root}: {_some(alone)} has one image, which is for training; no test image is of it"
        )
    test = [item for item in items[::_HELD_OUT] if item[1] in learned]
    train = [item for i, item in enumerate(items) if i % _HELD_OUT or item[1] not in learned]
    if not test:
        raise DataError(
            f"{root}: expected images enough to hold every sixth back as a test image, got {len(items)}; "
            "add images, or folders called train and test"
        )
    return ImageFolder(classes, train, test)


def _list(root: Path, *, filled: bool = True) -> tuple[list[str], list[Item]]:
    """Class names and images of class folders; `filled`: whether a class without images is an error."""
    folders = _folders(root)
    items: list[Item] = []
    empty: list[str] = []
    left_out = Counter(_kind(name) for name in _names(root, files=True) if not _is_tool(name))
    for label, folder in enumerate(folders):
        paths = _walk(folder, left_out)
        items += [(path, label) for path in paths]
        if not paths:
            empty.append(folder.name)
    if len(folders) - len(empty) < 2:
        found = f": {_some(f.name for f in folders)}" if folders else ""
        raise DataError(
            f"{root}: expected at least 2 class folders with images ({', '.join(SUFFIXES[:4])}, ...), got "
            f"{len(folders)} with {len(items)}{found}; put the images of each class into a folder of its own"
        )
    if empty and filled:
        raise DataError(
            f"{root}: expected images in every class folder, found none in {_some(empty)}; add some or remove "
            f"{'it' if len(empty) == 1 else 'them'}"
        )
    if empty:
        _warn(f"{root}: no test images of {_some(empty)}")
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(4))
        _warn(f"{root}: left out what is no image in a class folder: {kinds}")
    return [folder.name for folder in folders], items


def _walk(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The images within a class folder in the order of their folders' names, then their own; links are followed."""
    found: list[tuple[str, list[str]]] = []
    outside: dict[Path, frozenset[Path]] = {}  # real folders from which links lead to each place
    visits: Counter[Path] = Counter()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        here = Path(place)
        own = Path(os.path.realpath(here))
        origin = outside.get(here.parent, frozenset())
        if here.is_symlink():
            left = Path(os.path.realpath(here.parent))
            origin |= {left, *left.parents}
        outside[here] = origin
        above = origin | {own, *own.parents}
        visits[own] += 1
        if visits[own] > _MOST_VISITS:
            raise DataError(
                f"{own}: links in {folder} lead to it more than {_MOST_VISITS} times; remove some"
            )
        # A link to a folder above would be walked through until its path is too long.
        folders[:] = [
            name for name in folders
            if not _is_tool(name)
            and not ((here / name).is_symlink() and Path(os.path.realpath(here / name)) in above)
        ]  # fmt: skip
        found.append((place, sorted(name for name in files if not _is_tool(name))))
    paths = []
    for place, files in sorted(found):
        for name in files:
            path = Path(place, name)
            if path.exists() and not path.is_file():  # reading a pipe would wait for ever
                left_out["pipe or device"] += 1
            elif name.lower().endswith(SUFFIXES):
                paths.append(path)
            else:
                left_out[_kind(name)] += 1
    return paths


def _folders(root: Path) -> list[Path]:
    """Folders right within `root`, without hidden ones and those of tools, by name."""
    return [root / name for name in sorted(_names(root, files=False)) if not _is_tool(name)]


def _names(root: Path, *, files: bool) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if _is_folder(entry) != files]
    except OSError as error:
        _unreadable(error)
        raise


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: expected a folder that can be read ({error.strerror})"
    ) from None


def _is_tool(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _TOOL_FOLDERS | _TOOL_FILES


def _kind(name: str) -> str:
    return Path(name).suffix.lower() or "without an ending"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _warn(text: str) -> None:
    warnings.warn(text, DataWarning, stacklevel=2)
