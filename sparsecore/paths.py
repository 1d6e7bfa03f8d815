"""The files that a command reads and writes: none over another, and every place writable, before any work."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .folders import is_class_folder
from .plain import read_plain
from .safefile import check_name
from .streams import check_stream, is_printed_to, is_stream
from .writing import FileError, sweep, target_of

_LONGEST = 240  # bytes; file systems take 255
Paths = Mapping[str, Path | None]  # by what they are called in messages; None: not asked for


def check_paths(
    reads: Paths | None = None,
    *,
    written: Paths | None = None,
    replaced: Paths | None = None,
    folders: Paths | None = None,
    made: Mapping[str, tuple[Path, str]] | None = None,
    data: Path | None = None,
) -> None:
    """Told before hours of work, not after.  What is refused is as it was.

    Args:
        reads: files and folders that the command needs as they are.
        written: files that it writes into; a pipe or device such as /dev/stdout is one, too.
        replaced: files that it makes anew and puts in their place.
        folders: folders that it writes into, and makes where there are none.
        made: what it writes there, whose names it chooses: a folder and a pattern of paths in it.
        data: a folder of images, in which a new folder would be a class.

    Errors: ValueError for two that are one file, a file where a folder is wanted or the other way round, and places
    that are not there or cannot be written.
    """
    read, written, replaced, folders = map(_given, (reads, written, replaced, folders))
    for name, path in folders.items():
        check_name(path)
        _check_folder(name, path)
    for name, path in (written | replaced).items():
        _check_file(name, path, [*folders.values()], stream=name in written)
    _check_apart(read, written | replaced | folders)
    for what, (folder, pattern) in (made or {}).items():
        whole = os.path.join(glob.escape(str(_real(folder))), pattern)  # noqa: PTH118  of which parts are patterns
        for name, path in (read | written | replaced).items():
            if _real(path).match(whole):
                raise ValueError(
                    f"{name} {path}: expected a file of its own, got one of {what} of this command; name another"
                )
    for name, path in folders.items():
        if data is not None and is_class_folder(data, path):
            raise ValueError(
                f"{name} {path}: expected a folder outside of the images, got what would be a class of {data}"
            )
    for name, path in (written | replaced).items():
        if data is not None and path.is_file() and _real(data) in _real(path).parents:
            raise ValueError(
                f"{name} {path}: expected a file outside of the images, got one of {data}"
            )


def check_file_name(option: str, path: Path) -> None:
    """Errors: ValueError for no file's name, or one without room for the endings of what lies beside it."""
    if not path.name or len(os.fsencode(path.name)) > _LONGEST:
        raise ValueError(
            f"{option} {str(path)[:80]!r}: expected the name of a file, of at most {_LONGEST} bytes; name another"
        )


def check_cache(path: Path | None, others: Paths) -> None:
    """A cache's folder is made where there is none, and a cache that cannot be written costs time alone.

    Errors: ValueError for one of the command's other files, or one that holds something else than remembered plans.
    """
    if path is None:
        return
    _check_apart(_given(others), {"--plan-cache": path})
    if not path.exists() or str(path) == os.devnull:  # where nothing is remembered
        return
    try:
        text = read_plain(path)
    except FileError as error:
        raise ValueError(f"--plan-cache {error}") from None
    try:
        good = not text or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise ValueError(
            f"--plan-cache {path}: expected a new file or one of remembered plans (JSON), got something else; "
            "name another file"
        )


def require_room(path: Path | None, state: Mapping[str, Tensor]) -> None:
    """Errors: ValueError for a disk without room for a state_dict, before hours of work lead to it."""
    if path is None or is_stream(path):
        return
    needed = sum(value.numel() * value.element_size() for value in state.values())
    folder = _real(path).parent
    while not folder.exists():  # it is made later
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{path}: expected {needed:,} bytes of room for weights, got {free:,} free; make room, or name a place on "
            "another disk"
        )


def _given(paths: Paths | None) -> dict[str, Path]:
    return {name: path for name, path in (paths or {}).items() if path is not None}


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _check_file(name: str, path: Path, made: list[Path], *, stream: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{name} {path}: expected the name of a file, got a folder")
    if is_stream(path):
        if not stream:
            raise ValueError(f"{name} {path}: expected the name of a file, got a pipe or device")
        try:
            check_stream(path)
        except FileError as error:
            raise ValueError(f"{name} {error}") from None
        return
    if is_printed_to(path):
        raise ValueError(
            f"{name} {path}: expected another file than this command's output goes to; name another, or /dev/stdout"
        )
    parent = _real(path).parent
    if any(parent == _real(folder) for folder in made):
        return
    if not parent.is_dir():
        raise ValueError(f"{name} {path}: its folder does not exist; create {parent}")
    _check_writable(name, path, parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{name} {path}: expected a file that can be written, got a protected one")
    try:
        if not stream:
            check_name(path)
        target_of(path)
    except FileError as error:
        raise ValueError(f"{name} {error}") from None


def _check_folder(name: str, path: Path) -> None:
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise ValueError(
                f"{name} {path}: expected a folder or a place for one, got {link}, a link that leads nowhere; remove it"
            )
    parent = _real(path)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"{name} {path}: expected the name of a folder, got the file {parent}")
    _check_writable(name, path, parent)


def _check_writable(name: str, path: Path, folder: Path) -> None:
    sweep(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} {path}: expected a folder that can be written, got {folder} ({error.strerror})"
        ) from None


def _check_apart(read: dict[str, Path], made: dict[str, Path]) -> None:
    """Two names of one file count as one, but for what is no file: /dev/null takes whatever comes."""
    known: dict[Path | tuple[int, int], tuple[str, bool]] = {}
    for name, path in [*read.items(), *made.items()]:
        if path.exists() and not (path.is_file() or path.is_dir()):
            continue
        keys: list[Path | tuple[int, int]] = [_real(path)]
        if path.exists():
            status = path.stat()
            keys.append((status.st_dev, status.st_ino))
        for key in keys:
            first, of_reads = known.get(key, (name, False))
            if first != name and not (of_reads and name in read):
                raise ValueError(
                    f"{name} {path}: expected a file of its own, got that of {first}; name another"
                )
        known |= dict.fromkeys(keys, (name, name in read))
