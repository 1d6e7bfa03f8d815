"""The one place that reads and writes our files: safetensors plus one JSON entry, never pickle.

A file carries a SHA-256 digest of everything in it, so any damage is found before anything is used.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

VERSION = 1


class FileError(ValueError):
    """A file that cannot be read or written: which, what was expected and got, how to mend it."""


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, kind: str) -> None:
    """Writes atomically: a reader sees the old file or the new one, also when the disk is full.

    Errors: FileError if the file cannot be written; an older one is intact then.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = _canonical(dict(meta))
    entry = {"format": f"sparsecore/{kind}", "version": VERSION, "digest": _digest(plain, text)}
    header = {"sparsecore": json.dumps(entry | {"meta": json.loads(text)}, sort_keys=True)}
    put(
        path, save({name: t.clone() for name, t in plain.items()}, header)
    )  # clones share no storage


def put(path: Path, data: bytes) -> None:
    """A whole file at once: a reader sees the old one or the new one, also when the disk is full.

    Errors: FileError if it cannot be written; an older one is intact then.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise FileError(f"{path} could not be written: {error.strerror or error}") from None


def read(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of a file that `write` made with the same kind.

    Errors: FileError for a missing, foreign, damaged or newer file.
    """
    if not path.is_file():
        raise FileError(f"{path}: expected a {kind} file, found {_what_is(path)}")
    damaged = f"{path}: expected a sparsecore {kind} file (safetensors), got"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Clones own their memory: nothing stays mapped to the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise FileError(f"{damaged} something else or a damaged file ({error})") from None
    try:
        entry = json.loads(header["sparsecore"])
        found, version, digest, meta = (entry[k] for k in ("format", "version", "digest", "meta"))
        text = _canonical(meta)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise FileError(f"{damaged} one without a sparsecore header; make it again") from None
    if found != f"sparsecore/{kind}":
        raise FileError(f"{damaged} a file of format {str(found)[:80]!r}")
    if version != VERSION:
        raise FileError(
            f"{path}: expected version {VERSION}, got {str(version)[:20]}; update sparsecore"
        )
    if not isinstance(meta, dict) or digest != _digest(tensors, text):
        raise FileError(f"{damaged} contents that do not match their digest: the file is damaged")
    return tensors, meta


def _canonical(meta: Any) -> str:
    return json.dumps(meta, sort_keys=True, allow_nan=False)


def _digest(tensors: Mapping[str, Tensor], meta: str) -> str:
    digest = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"\0{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _what_is(path: Path) -> str:
    return (
        "a folder" if path.is_dir() else "nothing there" if not path.exists() else "no plain file"
    )


def finite(value: Any, instead: Callable[[float], Any] = lambda number: None) -> Any:
    """Facts as JSON takes them: numbers that are none, as a `watch` may say, become None, or what `instead` makes."""
    if isinstance(value, float) and not math.isfinite(value):
        return instead(value)
    if isinstance(value, dict):
        return {k: finite(v, instead) for k, v in value.items()}
    return [finite(v, instead) for v in value] if isinstance(value, (list, tuple)) else value
