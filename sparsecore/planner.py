"""The fastest way for one layer of a ticket: candidates, left out by a cost model, measured, remembered.

A choice is made for real shapes, dtype and batch, for forward, dX and dW separately, and is kept in a file;
with the same file it is always the same.  The floor is dense compute with sparse state, and a mask over a
dense weight where even that would be slower.
"""

import functools
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import TypedDict

from . import capture, kernels
from .costs import Facts, Machine, Times, predicted, rounds, seconds, stored
from .kernels import Layer
from .plain import read_plain
from .products import Products, dense_products, products_of, runs
from .schema import Range
from .schema import facts as facts_of
from .writing import FileError, put

_WORTH = 0.95  # another format must take less than this share of the floor's time
_HOPELESS = 1.6  # what should take this many times the best prediction is not measured
SIDES = ((128, 128), (64, 64), (32, 32), (16, 16))
# Several formats in a layer must save that much over the best one: activations that one wants turned and another
# does not are copied in between, and each product measures without that.
_MIXED = 0.9
_FILL = 0.5  # a block format stores at most this share of padding


_T = TypeVar("_T")


@dataclass(frozen=True)
class Choice:
    """What a layer does, why, and what it was weighed against (milliseconds of forward, dX and dW).

    formats: of forward, dX and dW; None: a mask over a dense weight.
    """

    formats: tuple[str, ...] | None
    reason: str
    measured: Mapping[str, Times] = field(default_factory=dict)
    predicted: Mapping[str, Times] = field(default_factory=dict)
    update: Mapping[str, float] = field(default_factory=dict)

    def time(self, format: str) -> float | None:
        """Milliseconds of a measured candidate, its optimiser's step included."""
        if format not in self.measured:
            return None
        return (
            self.measured[format].total
            + self.update["dense" if format in ("dense", "mask") else "kept"]
        )

    @property
    def chosen(self) -> float | None:
        """The same of what was chosen."""
        if self.formats is None:
            return self.time("mask")
        if not all(f in self.measured for f in self.formats):
            return None
        return sum(self.measured[f][i] for i, f in enumerate(self.formats)) + self.update["kept"]

    @property
    def guess(self) -> float | None:
        """What the cost model says of what was chosen."""
        chosen = self.formats or ("mask",) * 3
        if not all(f in self.predicted for f in chosen):
            return None
        update = self.update["dense" if self.formats is None else "kept"]
        return sum(self.predicted[f][i] for i, f in enumerate(chosen)) + update


class Cache:
    """Choices in a JSON file; each is written as it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.unwritten = self._read(), False

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(read_plain(self.path))
        except (ValueError, RecursionError):
            found = None  # absent, damaged or no file: what it held is measured again
        return found if isinstance(found, dict) else {}

    def get(self, key: str, make: Callable[[], Any], read: Callable[[Any], _T]) -> _T:
        """The entry as `read` understands it, made and written if it is new or `read` does not.

        A folder that cannot be written costs only time.
        """
        try:
            found = read(self.entries[key])
            if self.unwritten:  # the disk was full
                self._write()
            return found
        except (KeyError, TypeError, ValueError, AttributeError):
            pass  # new, or of another version
        made = json.loads(json.dumps(make()))  # as it will be read
        self.entries = self._read() | self.entries | {key: made}  # other programs write it too
        self._write()
        return read(made)

    def _write(self) -> None:
        self.unwritten = True
        with suppress(OSError, FileError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            put(self.path, json.dumps(self.entries, indent=1).encode())
            self.unwritten = False


@functools.cache
def _cache_at(path: Path) -> Cache:
    return Cache(path)


def cache_of(path: str | Path | None = None) -> Cache:
    """The cache at a path; by default at $SPARSECORE_PLANS, else plans.json in the user's cache folder."""
    path = path or os.environ.get("SPARSECORE_PLANS")
    if not path:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sparsecore" / "plans.json"
    with suppress(RuntimeError):  # a user without a home
        path = Path(path).expanduser()
    return _cache_at(Path(path).absolute())


def where(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, torch {torch.__version__}"


def _processor() -> str:
    name = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{name} {kind} {torch.get_num_threads()} threads"


def regime(device: torch.device, captured: bool) -> str:
    """How steps are launched there, in words; nothing where there is one way alone."""
    if not capture.possible_on(device):
        return ""
    return "as CUDA graphs" if captured else "launched one by one"


def order(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x as they lie in memory, the slowest first: (0, 2, 3, 1) is channels last."""
    if x.layout != torch.strided:
        return ()
    sides = (d for d in range(x.ndim) if x.shape[d] > 1)  # others may have any stride
    return tuple(sorted(sides, key=lambda d: (-x.stride(d), d)))


_Speed = Annotated[float, Range(1, 1e30)]


def machine(device: torch.device, dtype: torch.dtype, cache: Cache) -> Machine:
    """The device's speed, measured once and remembered."""
    key = f"machine | {where(device)} | {dtype}"

    def read(entry: Any) -> Machine:
        return Machine(**facts_of(entry, dict[str, _Speed], key))

    return cache.get(key, lambda: asdict(Machine.measured(device, dtype)), read)


# --- One layer --------------------------------------------------------------------------------------


def candidates(mask: Tensor, layer: Layer, dtype: torch.dtype) -> list[str]:
    """Formats that can do this and whose storage is not mostly padding, the floor first."""
    names, facts = ["state", "csr"], Facts.of(mask)
    if facts.live_rows * facts.live_columns < 0.9 * layer.shape[0] * layer.shape[1]:
        names.append("compact")
    if mask.is_cuda:
        names += [f"block:{h}x{w}" for h, w in SIDES if stored(mask, h, w) * _FILL <= facts.nnz]
    known = [name for name in names if name.partition(":")[0] in kernels.FORMATS]
    return [n for n in known if kernels.obstacle(n, mask.device, layer, dtype) is None]


def choose(
    mask: Tensor,
    layer: Layer,
    x: Tensor,
    *,
    grad: bool = True,
    captured: bool = False,
    cache: Cache,
) -> Choice:
    """The fastest way to compute a layer, measured on inputs like x (forward, dX and dW).

    Args:
        x: [*, k] or [b, k, h, w] in the compute dtype, on the mask's device.
        grad: whether dX is wanted.
        captured: whether steps will be CUDA graphs, where the device has those.
    """
    captured = captured and capture.possible_on(x.device)
    facts, dtype = Facts.of(mask), x.dtype
    if facts.nnz == 0:
        return Choice(("state",) * 3, "nothing is kept: the layer is its bias")
    names = candidates(mask, layer, dtype)
    fills = {n: stored(mask, *_sides(n)) for n in names if ":" in n}
    key = " | ".join(map(str, (
        where(x.device), regime(x.device, captured), dtype, layer.numbers, list(x.shape), order(x),
        bool(grad), facts, fills, ",".join(names),
    )))  # fmt: skip

    def make() -> dict[str, Any]:
        of = machine(x.device, dtype, cache)
        return asdict(_weigh(mask, layer, x, grad, captured, names, facts, of))

    def read(entry: Any) -> Choice:
        entry = facts_of(entry, _Remembered, key)
        times = {w: {n: Times(*t) for n, t in entry[w].items()} for w in ("measured", "predicted")}
        formats, known = (
            entry["formats"],
            {n + e for n in names for e in ("", *kernels.BLOCK_TILES)},
        )
        if not (formats is None or set(formats) <= known) or entry["update"].keys() != {
            "kept",
            "dense",
        }:
            raise ValueError(key)
        return Choice(formats, entry["reason"], update=entry["update"], **times)

    return cache.get(key, make, read)


_Time = Annotated[float, Range(0, 1e9)]  # seconds


class _Remembered(TypedDict):
    """What the cache holds of a choice."""

    formats: tuple[str, str, str] | None
    reason: str
    update: dict[str, _Time]
    measured: dict[str, tuple[_Time, _Time, _Time]]
    predicted: dict[str, tuple[_Time, _Time, _Time]]


def _sides(name: str) -> tuple[int, int]:
    h, w = name.partition(":")[2].split("x")
    return int(h), int(w)


def _weigh(
    mask: Tensor,
    layer: Layer,
    x: Tensor,
    grad: bool,
    captured: bool,
    names: Sequence[str],
    facts: Facts,
    of: Machine,
) -> Choice:
    """Predicts all candidates, measures those that may win, and decides."""
    x = x.detach() if layer.conv else x.detach().reshape(-1, layer.inputs)
    shape = layer.output(x.shape)
    tokens = math.prod(shape) // layer.shape[0]
    guesses = {
        name: predicted(name, mask, facts, layer, tokens, x.element_size(), of)
        for name in ("dense", "mask", *names)
    }
    best = min(guesses[name].total for name in names)
    tried = [n for n in names if n == "state" or guesses[n].total <= _HOPELESS * best]
    weight = torch.linspace(-1, 1, math.prod(layer.shape), device=x.device, dtype=x.dtype)
    weight = weight.view(layer.shape)
    products = {n: products_of(n, mask, layer, weight, x) for n in tried}
    products |= {n: dense_products(n, mask, layer, weight, x) for n in ("dense", "mask")}
    measured = _measured(products, x.device, grad, captured)
    for name in {min(tried, key=lambda n, i=i: measured[n][i]) for i in range(3)}:
        if name.startswith("block:"):
            tiles = [f"{name}{end}" for end in ("", *kernels.BLOCK_TILES)]
            products = {n: products_of(n, mask, layer, weight, x) for n in tiles}
            products = {n: steps for n, steps in products.items() if runs(steps)}
            now = _measured(products, x.device, grad, captured)
            measured |= now | {name: Times(*map(min, now[name], measured[name]))}
    update = {
        "dense": 1e3 * math.prod(layer.shape) / of.updates,
        "kept": 1e3 * facts.nnz / of.updates,
    }
    times, tiles = _best_tiles(measured, tried)
    formats, reason = _decided(times, update, tried)
    if formats is not None:
        formats = tuple(tiles[f][i] for i, f in enumerate(formats))
    how = regime(x.device, captured)
    return Choice(formats, f"{reason}, {how}" if how else reason, measured, guesses, update)


def _measured(
    products: Mapping[str, Products], device: torch.device, grad: bool, captured: bool
) -> dict[str, Times]:
    """The shortest times, all in turn."""
    found: dict[str, Times] = {}
    with torch.no_grad():
        for _ in rounds(0.2):
            for name, steps in products.items():
                wanted = (True, grad, True)
                now = [
                    1e3 * seconds(s, device, captured=captured) if w else 0.0
                    for s, w in zip(steps, wanted, strict=True)
                ]
                found[name] = Times(*map(min, now, found.get(name, now)))
    return found


def _best_tiles(
    measured: Mapping[str, Times], names: Sequence[str]
) -> tuple[dict[str, Times], dict[str, tuple[str, ...]]]:
    """Times by format in its fastest tiles, and what their names are."""
    times, tiles = dict(measured), {}
    for name in names:
        ways = [
            n for n in measured if n.partition("/")[0] == name
        ]  # itself first, which wins level
        tiles[name] = tuple(
            min(ways, key=lambda n, i=i: measured[n][i] / (1 if n == name else _WORTH))
            for i in range(3)
        )
        times[name] = Times(*(measured[n][i] for i, n in enumerate(tiles[name])))
    return times, tiles


def _decided(
    measured: Mapping[str, Times], update: Mapping[str, float], names: Sequence[str]
) -> tuple[tuple[str, ...] | None, str]:
    """The formats and the reason, from what was measured."""
    formats: list[str] = []
    for i in range(3):
        if measured["state"][i] == 0:  # not wanted
            formats.append(formats[0])
            continue
        fastest = min(names, key=lambda name, i=i: measured[name][i])
        floor = measured["state"][i]
        formats.append(fastest if measured[fastest][i] < _WORTH * floor else "state")
    alone = min(names, key=lambda name: measured[name].total)
    alone = alone if measured[alone].total < _WORTH * measured["state"].total else "state"
    mixed = sum(measured[f][i] for i, f in enumerate(formats))
    if mixed > _MIXED * measured[alone].total:
        formats = [alone] * 3
    total = sum(measured[f][i] for i, f in enumerate(formats)) + update["kept"]
    masked = measured["mask"].total + update["dense"]
    dense = measured["dense"].total + update["dense"]
    told = f"{total:.3g} ms a step, dense*mask {masked:.3g}, dense {dense:.3g}"
    if masked < _WORTH * total:
        return None, f"no format is faster than dense*mask: {told}"
    if set(formats) == {"state"}:
        return ("state",) * 3, f"dense compute is fastest here, its state sparse: {told}"
    return tuple(formats), f"measured: {told}"
