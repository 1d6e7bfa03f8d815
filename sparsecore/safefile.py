"""The one place that reads and writes our files: safetensors plus one JSON entry, never pickle.

A file carries a SHA-256 digest of everything in it, so any damage is found before anything is used.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .interrupts import signals_later
from .writing import FileError as FileError
from .writing import put

VERSION = 1


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, kind: str) -> None:
    """Writes as a whole or not at all, as `writing.put` does.

    Errors: FileError if the file cannot be written, for names that are no plain text, or facts that are no JSON; an
    older one is intact then.
    """
    if (odd := _no_text(tensors)) is not None:
        raise FileError(f"{path}: expected names of plain text, got {odd!r}; rename the layer")
    check_name(path)
    # Clones share no storage, and lie row by row whatever their strides were.
    plain = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    try:
        text = _canonical(dict(meta))
    except (TypeError, ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: expected facts that JSON holds, {_odd_fact(meta)} ({error})"
        ) from None
    entry = {"format": f"sparsecore/{kind}", "version": VERSION, "digest": _digest(plain, text)}
    header = {"sparsecore": json.dumps(entry | {"meta": json.loads(text)}, sort_keys=True)}
    put(path, save(plain, header))


def read(path: Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of a file that `write` made with the same kind.

    Errors: FileError for a missing, foreign, damaged or newer file.
    """
    try:
        there = path.is_file()
    except OSError as error:
        raise FileError(f"{path}: expected a {kind} file ({error.strerror})") from None
    if not there:
        raise FileError(f"{path}: expected a {kind} file, found {_what_is(path)}")
    damaged = f"{path}: expected a sparsecore {kind} file (safetensors), got"
    try:
        with signals_later(), safe_open(path, framework="pt") as file:
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
    if not isinstance(meta, dict) or _deep(meta) or digest != _digest(tensors, text):
        raise FileError(f"{damaged} contents that do not match their digest: the file is damaged")
    if (odd := _no_text(tensors)) is not None:
        raise FileError(f"{damaged} a tensor of the name {odd!r:.80}, which is no plain text")
    return tensors, meta


def _odd_fact(value: Any, at: str = "") -> str:
    """Which of them is none of JSON's."""
    inner = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    for key, item in inner:
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return _odd_fact(item, f"{at}.{key}" if at else str(key))
    return f"got another under {at!r}" if at else "got others"


_MOST_LEVELS = 50


def _deep(value: Any) -> bool:
    """Whether lists and objects lie in each other beyond what any file of ours has, and beyond what recursion takes."""
    level = [value]
    for _ in range(_MOST_LEVELS):
        inner = [v for v in level if isinstance(v, (dict, list))]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
    return bool(level)


def _no_text(names: Iterable[str]) -> str | None:
    """The first name that would do more to a screen than be read."""
    return next((name for name in names if not name.isprintable()), None)


def check_name(path: Path) -> None:
    """Errors: FileError for bytes that are no text: safetensors opens no such file."""
    if any("\udc80" <= letter <= "\udcff" for letter in str(path)):
        raise FileError(f"{path}: expected a name in UTF-8, got other bytes; name another")


def _canonical(meta: Any) -> str:
    return json.dumps(meta, sort_keys=True, allow_nan=False)


def _digest(tensors: Mapping[str, Tensor], meta: str) -> str:
    digest = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"\0{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        digest.update(bytes_of(t).data)
    return digest.hexdigest()


def bytes_of(t: Tensor) -> np.ndarray:
    """The tensor's bytes, row by row, without a copy where it lies so on the CPU."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # of one entry, which counts as contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()


def _what_is(path: Path) -> str:
    return (
        "a folder" if path.is_dir() else "nothing there" if not path.exists() else "no plain file"
    )


def finite(value: Any, instead: Callable[[float], Any] = lambda number: None) -> Any:
    """Facts as JSON takes them, numpy's and torch's numbers too.

    Those that are none, as a `watch` may say, become None, or what `instead` makes.
    """
    if isinstance(value, (np.generic, np.ndarray)) or (
        isinstance(value, Tensor) and value.numel() == 1
    ):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return instead(value)
    if isinstance(value, dict):
        return {k: finite(v, instead) for k, v in value.items()}
    return [finite(v, instead) for v in value] if isinstance(value, (list, tuple)) else value
