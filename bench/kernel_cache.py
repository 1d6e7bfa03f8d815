"""Triton's cache of compiled kernels as one small archive: what one machine has compiled another loads.

Of a kernel's folder a reload needs the machine code, its metadata and the group that lists both (which is what
TRITON_STORE_BINARY_ONLY leaves too), and of a launcher its shared object.  Groups name their files by
absolute paths, so an archive holds bare names and `restore` puts them where they lie then.
"""

import contextlib
import io
import json
import lzma
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from time import monotonic

LIMIT = 16 << 20  # bytes of an archive
KEPT = (".cubin", ".json", ".so")
GROUP = "__grp__"

Entry = tuple[str, tuple[float, dict[str, bytes]]]  # its key; when it was made, and its files


def pack(folder: Path, archive: Path, limit: int = LIMIT) -> int:
    """Writes the archive, atomically, and returns its bytes; the newest kernels stay where not all fit."""
    entries = sorted(_entries(folder), key=lambda entry: entry[1][0], reverse=True)
    while len(packed := _packed(entries)) > limit:
        # Kernels are alike: a share of the bytes takes about that share of the archive.
        sizes = [sum(map(len, files.values())) for _, (_, files) in entries]
        room = 0.95 * limit / len(packed) * sum(sizes)
        count = sum(size <= room for size in accumulate(sizes))
        entries = entries[: min(count, len(entries) - 1)]
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f"{archive.name}.{os.getpid()}")
    temporary.write_bytes(packed)
    temporary.replace(archive)
    return len(packed)


def restore(archive: Path, folder: Path) -> int:
    """Lays the archive's kernels into a cache folder; returns how many.  No archive, or none of ours: none."""
    try:
        found = _unpacked(archive, folder.absolute())
    except FileNotFoundError:
        return 0
    except (ValueError, EOFError, OSError, tarfile.TarError, lzma.LZMAError) as error:
        print(f"kernel cache left out: {archive}: {error}", file=sys.stderr)
        return 0
    for key, (made, files) in found.items():
        (folder / key).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            path = folder / key / name
            path.write_bytes(data)
            os.utime(path, (made, made))
    return len(found)


def _unpacked(archive: Path, folder: Path) -> dict[str, tuple[float, dict[str, bytes]]]:
    """All entries of an archive, as they lie in the folder.  Errors: ValueError for one that `pack` did not write."""
    found: dict[str, tuple[float, dict[str, bytes]]] = {}
    with tarfile.open(archive, "r:xz") as tar:
        for member in tar:
            key, _, name = member.name.partition("/")
            file = tar.extractfile(member)
            if file is None or not key.isalnum() or not _is_name(name):
                raise ValueError(f"{member.name}: expected KEY/FILE")
            data = file.read()
            if name.startswith(GROUP):
                children = json.loads(data)
                if not isinstance(children, list) or not all(map(_is_name, children)):
                    raise ValueError(f"{member.name}: expected names, got {children!r:.80}")
                data = _group({child: str(folder / key / child) for child in children})
            found.setdefault(key, (member.mtime, {}))[1][name] = data
    return found


def _is_name(name: object) -> bool:
    """Of a file, without a folder."""
    return isinstance(name, str) and Path(name).name == name != ""


def newest(folder: Path) -> float:
    """When the cache got its newest entry; 0 for an empty one."""
    return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)


class Kernels:
    """The cache of compiled kernels of all processes, and the archive that it is kept in."""

    def __init__(self, folder: Path, archive: Path) -> None:
        self.folder, self.archive = folder, archive
        restore(archive, folder)
        self.packed, self.newest = monotonic(), newest(folder)
        self.seconds = 1.0  # of the last time

    def pack(self) -> None:
        """Archives what has been compiled since."""
        start = monotonic()
        try:
            made = newest(self.folder)
            if made > self.newest:
                pack(self.folder, self.archive)
                self.newest, self.seconds = made, monotonic() - start
        except (
            OSError
        ) as error:  # a full disk, or a compiler at work: costs the archive, not the run
            print(f"kernels were not archived: {error}", file=sys.stderr)
        self.packed = monotonic()


@contextlib.contextmanager
def kept_in(cache: Path | None) -> Iterator[Kernels | None]:
    """Kernels in a folder of their own, kept in a folder's archive; None leaves Triton its own cache."""
    if cache is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kernels", ignore_cleanup_errors=True) as folder:
        yield Kernels(Path(folder), cache / "kernels.tar.xz")


def _entries(folder: Path) -> Iterator[Entry]:
    for path in folder.iterdir():
        kept = [p for p in path.iterdir() if p.suffix in KEPT] if path.is_dir() else []
        if not any(p.name.startswith(GROUP) or p.suffix == ".so" for p in kept):
            continue  # half a kernel: the group is what Triton writes last
        files = {}
        for file in kept:
            files[file.name] = file.read_bytes()
            if file.name.startswith(GROUP):
                children = json.loads(files[file.name])["child_paths"]
                names = [name for name in children if Path(name).suffix in KEPT]
                files[file.name] = json.dumps(names).encode()
        yield path.name, (max(p.stat().st_mtime for p in kept), files)


def _group(children: dict[str, str]) -> bytes:
    return json.dumps({"child_paths": children}).encode()


def _packed(entries: Sequence[Entry]) -> bytes:
    """The fastest preset: kernels are so alike that the others gain little and take several times as long."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as tar:
        for key, (made, files) in entries:
            for name, data in files.items():
                member = tarfile.TarInfo(f"{key}/{name}")
                member.size, member.mtime = len(data), int(made)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
