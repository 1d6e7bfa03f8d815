"""Ways to spoil a file: its bytes, or its contents with everything else, the digest too, as it should be."""

import codecs
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparsecore.safefile import bytes_of

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip

NAMES = [
    "", " ", "/", ".", "..", "../../escaped", "/etc/passwd", "a" * 5_000, "\x1b[31mred\x1b[0m", "[/foo]",
    "[bold]x[/b]",
    "a[b]c", "\x00", "a\nerror: b", "\r", "\u202egnp", "\ud7ff", "名前", "0.weight", "weight", "pattern.mask",
    "optimizer/0/exp_avg", "optimizer/99/exp_avg", "optimizer/-1/exp_avg", "optimizer/x/step", "optimizer/0",
    "model/0.weight", "snapshot/nan/0.weight", "snapshot/x/y/z", "mask/", "score/0", "weight/0.weight", "__class__",
]  # fmt: skip

TEXTS = [
    *NAMES, "/dev/zero", "/dev/stdin", "folder:/", "folder:/etc", "folder:.", "folder:", "mnist", "cifar10",
    "DEFAULT",
    "torchvision:vit_h_14", "torchvision:resnet18", "resnet-56", "block:1x1", "block:0x0", "block:99999x99999", "2:1",
    "vector:0", "channel", "1e999", "nan", "auto", "graph", "compile", "HardConcrete(beta=nan)",
    "Concrete(tau=1e999)",
    "imp", "ltr:rate=1e-9", "joint:pace=999999", "{'a': 1}", "%s%n", "$(touch x)", "x" * 100_000,
]  # fmt: skip

NUMBERS = [
    0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320,
    1e-9,
    1e9, 1e18, 1e308, -1e308,
]  # fmt: skip

VALUES: list[Any] = [
    *TEXTS, *NUMBERS, None, True, False, [], {}, [[]], [None], {"": {}}, ["a", "b"], [1, 2, 3], [[1, 2, 3]],
    {"float": "nan"},
    {"float": "inf"}, {"float": 3}, {"float": []}, [0] * 5_000,
]  # fmt: skip

# What no JSON value written by Python is.
RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000,
    '"\\ud800"', '"\\u0000"', "1" * 5_000, "-", "", '{"a": 1, "a": 2}', "[1,]", "tru", "0x10", "\ufeff{}",
]  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a file of safetensors holds; format: None where it is not one of ours."""

    tensors: dict[str, Tensor]
    format: str | None = None
    version: Any = 1
    meta: Any = None

    @classmethod
    def read(cls, path: Path) -> "Contents | None":
        """The contents; None for a file of another kind."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        if "sparsecore" not in header:
            return cls(tensors)
        entry = json.loads(header["sparsecore"])
        return cls(tensors, entry["format"], entry["version"], entry["meta"])

    def sealed(self, raw: str | None = None) -> bytes:
        """A file of it with the right digest.  raw: the text of its facts, where it is not as Python writes it."""
        plain = {key: t.detach().contiguous().clone() for key, t in self.tensors.items()}
        if self.format is None:
            return save(plain)
        text = json.dumps(self.meta) if raw is None else raw
        try:
            canonical = json.dumps(json.loads(text), sort_keys=True, allow_nan=False)
        except (ValueError, RecursionError):
            canonical = text
        digest = hashlib.sha256(canonical.encode(errors="surrogatepass"))
        for name in sorted(plain):
            t = plain[name]
            digest.update(f"\0{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
            digest.update(bytes_of(t).tobytes())
        rest = {"format": self.format, "version": self.version, "digest": digest.hexdigest()}
        entry = json.dumps(rest)[:-1] + f', "meta": {text}}}'
        return save(plain, {"sparsecore": entry})


def spoiled(path: Path, rng: Random) -> bytes:
    """What the file might hold instead."""
    data = path.read_bytes()
    if rng.random() < 0.15:
        return of_bytes(data, rng)
    if (contents := Contents.read(path)) is not None:
        return of_contents(contents, rng)
    try:
        return of_json_text(data.decode(), rng)
    except ValueError:
        return of_lines(data, rng) if data.isascii() else of_bytes(data, rng)


def of_bytes(data: bytes, rng: Random) -> bytes:
    """Bytes flipped, cut off, put in, zeroed or moved."""
    found, at, length = bytearray(data), rng.randrange(len(data) + 1), rng.choice([1, 8, 512, 4096])
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice([1, 10, 1000])):
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case 1:
            del found[at:]
        case 2:
            found[at:at] = rng.randbytes(length)
        case 3:
            found[at : at + length] = bytes(length)
        case 4:
            del found[at : at + length]
        case 5:  # the header's length, and what begins it
            found[:8] = rng.choice([0, 1, 8, 2**31, 2**63, 2**64 - 1, len(data)]).to_bytes(
                8, "little"
            )
        case _:
            other = rng.randrange(len(found) + 1)
            part = found[at : at + length]
            found[other : other + len(part)] = part
    return bytes(found)


def of_contents(contents: Contents, rng: Random) -> bytes:
    """One to three changes of tensors and facts."""
    if contents.format is not None and rng.random() < 0.08:
        return contents.sealed(_raw(contents.meta, rng))
    if rng.random() < 0.35:
        return _subtle(contents, rng).sealed()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if contents.tensors and (contents.format is None or rng.random() < 0.5):
            contents = replace(contents, tensors=_of_tensors(contents.tensors, rng))
        elif contents.format is not None:
            if rng.random() < 0.03:
                contents = replace(contents, version=rng.choice(VALUES))
            elif rng.random() < 0.03:
                contents = replace(contents, format=rng.choice(["sparsecore/round", *TEXTS]))
            else:
                contents = replace(contents, meta=of_json(contents.meta, rng))
    try:
        return contents.sealed()
    except (SafetensorError, ValueError, KeyError):  # a dtype or name that no file can hold
        return of_bytes(Contents({}).sealed(), rng)


def _subtle(contents: Contents, rng: Random) -> Contents:
    """Contents that look right: values of the same kind, tensors of the same shape."""
    tensors = dict(contents.tensors)
    if tensors and (contents.format is None or rng.random() < 0.6):
        name = rng.choice(sorted(tensors))
        t = tensors[name]
        alike = [n for n, o in tensors.items() if o.shape == t.shape and o.dtype == t.dtype]
        other = rng.choice(sorted(alike))
        if rng.random() < 0.3:
            tensors[name], tensors[other] = tensors[other], t
        elif t.dtype == torch.bool:
            tensors[name] = ~t
        elif t.is_floating_point():
            tensors[name] = t * rng.choice([-1, 0, 1e-30, 1e3, 1e9, 1e30]) + rng.choice(
                [0, 0, 1, -1, 1e6]
            )
        else:
            tensors[name] = (
                t + rng.choice([1, -1, 2, 100])
                if rng.random() < 0.7
                else t.flip(0)
                if t.ndim
                else t * 0
            )
        return replace(contents, tensors=tensors)
    if contents.format is None:
        return contents
    leaves = [path for path in _places(contents.meta) if path]
    if not leaves:
        return contents
    path = rng.choice(leaves)
    value, others = _at(contents.meta, path), [_at(contents.meta, p) for p in leaves]
    alike = [o for o in others if type(o) is type(value) and o != value]
    if isinstance(value, bool):
        value = not value
    elif isinstance(value, (int, float)) and rng.random() < 0.7:
        value = rng.choice([value + 1, value - 1, -value, value * 10, type(value)(0), value * 1000])
    elif isinstance(value, list) and rng.random() < 0.7:
        value = rng.choice([value[::-1], value[:-1], value[1:], value + value, value + value[-1:]])
    elif alike:
        value = rng.choice(alike)
    return replace(contents, meta=_put(contents.meta, path, value))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _of_tensors(tensors: dict[str, Tensor], rng: Random) -> dict[str, Tensor]:
    found, name = dict(tensors), rng.choice(sorted(tensors))
    other = rng.choice(sorted(tensors))
    match rng.randrange(9):
        case 0:
            del found[name]
        case 1:
            found[rng.choice(NAMES)] = found[name]
        case 2:
            found[_beside(name, rng)] = found.pop(name)
        case 3:
            found[name], found[other] = found[other], found[name]
        case 4 | 5:
            found[name] = _shaped(found[name], rng)
        case 6:
            found[name] = _cast(found[name], rng.choice(DTYPES))
        case _:
            found[name] = _filled(found[name], rng)
    return found


def _beside(name: str, rng: Random) -> str:
    """Another name of nearly the same path."""
    slots = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step", "max_exp_avg_sq")
    head, _, _ = name.rpartition("/")
    return rng.choice(
        [
            f"{head}/{rng.choice([*slots, *NAMES])}",
            name + ".x",
            name.upper(),
            name[1:],
            rng.choice(NAMES),
        ]
    )


def _shaped(t: Tensor, rng: Random) -> Tensor:
    flat = t.reshape(-1)
    one = flat[:1] if len(flat) else torch.zeros(1, dtype=t.dtype)
    shapes = [
        lambda: one.reshape(()), lambda: flat[:0], lambda: flat[: len(flat) // 2], lambda: flat, lambda: t[None],
        lambda: t[..., None], lambda: torch.cat([flat, one]), lambda: t.T if t.ndim == 2 else flat.flip(0),
        lambda: one.expand(1 << 20), lambda: one.expand(1 << 10, 1 << 10), lambda: t.reshape(0,
        5) if not len(flat) else flat[:1],
        lambda: torch.cat([t, t]) if t.ndim else one.expand(2),
    ]  # fmt: skip
    return rng.choice(shapes)()


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t.real if t.is_complex() and not dtype.is_complex else t).float().to(dtype)


def _filled(t: Tensor, rng: Random) -> Tensor:
    """One value or all of them hostile."""
    if not t.numel():
        return torch.zeros(3)
    real = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-42, -1.0, 0.0, 1e20, 1.5]
    whole = [-1, 0, 1, 2**31, 2**62, -(2**62), 127]
    found = t.clone().reshape(-1)
    value = rng.choice(real if t.is_floating_point() or t.is_complex() else whole)
    if not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool:
        limits = torch.iinfo(t.dtype)
        value = max(limits.min, min(limits.max, int(value)))
    if t.dtype == torch.bool:
        value = bool(value)
    if rng.random() < 0.5:
        found[:] = value
    else:
        found[rng.randrange(len(found))] = value
    return found.reshape(t.shape)


def of_json(value: Any, rng: Random) -> Any:
    """The value with one place in it, at any depth, changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        match rng.randrange(12):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {rng.choice(NAMES): rng.choice([value[key], rng.choice(VALUES)])}
            case 2:
                return {(rng.choice(NAMES) if k == key else k): v for k, v in value.items()}
            case _:
                return value | {key: of_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case 2:
                return [*value[:at], rng.choice(VALUES), *value[at:]]
            case 3:
                return value * 50
            case _:
                return [*value[:at], of_json(value[at], rng), *value[at + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice(
            [
                -value,
                value + 1,
                value - 1,
                value * 10**9,
                value * 1_000_000,
                str(value),
                rng.choice(NUMBERS),
            ]
        )
    return rng.choice(VALUES)


def of_json_text(text: str, rng: Random) -> bytes:
    """JSON with a place changed, or text that is none."""
    value = json.loads(text)
    return (json.dumps(of_json(value, rng)) if rng.random() < 0.7 else _raw(value, rng)).encode()


def _raw(value: Any, rng: Random) -> str:
    """JSON with a place in it that Python would not write."""
    mark = "\u2603 here"
    text = json.dumps(_put(value, rng.choice(_places(value)), mark))
    return text.replace(json.dumps(mark), rng.choice(RAW), 1)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, v in inner for p in _places(v, (*path, key)))]


def _put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    found = value.copy()
    found[path[0]] = _put(value[path[0]], path[1:], new)
    return found


def of_lines(data: bytes, rng: Random) -> bytes:
    """A table or records by line: lines and fields changed, or all of it as editors and spreadsheets save it."""
    lines = data.split(b"\n")
    at, hostile = rng.randrange(len(lines)), str(rng.choice(VALUES)).encode(errors="replace")
    fields = lines[at].split(b",")
    fields[rng.randrange(len(fields))] = hostile
    match rng.randrange(10):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 8:
            return rng.choice([b"", codecs.BOM_UTF8]) + data.replace(b"\n", b"\r\n")
        case 9:
            lines += rng.choice([[b""], [b"\r", b"  ", b""], [b",,", b""]])
        case 2:
            lines[at] = hostile
        case 3:
            lines[at] = lines[at][: len(lines[at]) // 2]
        case 4:
            lines.reverse()
        case 5:
            lines = [*lines, *[lines[at]] * 1000]
        case _:
            lines[at] = b",".join(fields)
    return b"\n".join(lines)
