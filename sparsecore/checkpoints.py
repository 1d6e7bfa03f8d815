"""Checkpoints of running work: optimiser state as named tensors plus JSON, never pickle."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import NotRequired, TypedDict

from . import safefile, schema
from .batches import EpochBatches, parts_of
from .convert import sparse_layers
from .kernels import laid_out_as
from .losses import Loss
from .patterns import Planned
from .told_apart import network

# By optimiser, what it holds for a parameter that it has moved: those of `recipe.optimizer_for`.
_SLOTS: dict[type, tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
_MOST_STEPS = 2**24  # of a float32 that still counts

_PIECE = 1 << 22  # numbers of data that are looked at at once


class OtherRunError(safefile.FileError):
    """A checkpoint of another run: of other data, another model or other options."""


def pack_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """What an optimiser of `recipe.optimizer_for` holds, by name.

    What is held for kept weights alone is written as for dense ones, so that a file does not depend on the
    plan of `model`.
    """
    planned = _planned(optimizer, model)
    tensors: dict[str, Tensor] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot in _SLOTS[type(optimizer)]:
            value, pattern = slots.get(slot), planned.get(int(index))
            if value is not None:  # SGD without momentum has none
                dense = value if pattern is None or not value.ndim else pattern(value)
                tensors[f"optimizer/{index}/{slot}"] = dense
    return tensors


def _planned(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[int, Planned]:
    """The planned layers' patterns, by the place of their parameter in the optimiser."""
    patterns: dict[int, Planned] = {}
    for layer in sparse_layers(model).values() if model is not None else ():
        if isinstance(layer.pattern, Planned):
            patterns[id(layer.raw_weight)] = layer.pattern
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: patterns[id(p)] for i, p in enumerate(parameters) if id(p) in patterns}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], model: nn.Module | None = None
) -> None:
    """Puts back what `pack_optimizer` gave; rates and the like stay the optimiser's own.

    A file's tensors lie row by row; what is as large as its parameter lies as that does again, which
    fused optimisers insist on.

    Args:
        model: as it will go on: its masks say which entries are held.

    Errors: FileError, with nothing changed, for anything that this optimiser would not have put there: native code
    trusts its state.
    """
    state = check_optimizer(optimizer, tensors, model)
    own = [dict(group) for group in optimizer.param_groups]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group |= mine  # the rate that a graph reads among them


def check_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], model: nn.Module | None = None
) -> dict[int, dict[str, Tensor]]:
    """The state that `unpack_optimizer` would put back.  Errors: as `unpack_optimizer`, whatever the model's masks."""
    planned = _planned(optimizer, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots, entries = _SLOTS[type(optimizer)], dict[str, Tensor]()
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            entries[name.removeprefix("optimizer/")] = value
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        found = {slot: entries.pop(f"{index}/{slot}", None) for slot in slots}
        if all(value is None for value in found.values()):
            continue  # no step has moved it
        pattern = planned.get(index)
        shape = parameter.shape if pattern is None else pattern.mask.shape
        for slot, value in found.items():
            state.setdefault(index, {})[slot] = _slot(value, slot, parameter, shape, index, pattern)
    if entries:
        raise safefile.FileError(
            f"optimizer: expected {', '.join(slots)} of {len(parameters)} parameters, got {', '.join(entries)[:80]}"
        )
    # SGD wants a buffer of all or none: 0 is what one begins as.
    if state and isinstance(optimizer, torch.optim.SGD):
        for index, parameter in enumerate(parameters):
            if index not in state and parameter.requires_grad:
                state[index] = {"momentum_buffer": torch.zeros_like(parameter)}
    return state


def _slot(
    value: Tensor | None,
    slot: str,
    parameter: Tensor,
    shape: torch.Size,
    index: int,
    pattern: Planned | None,
) -> Tensor:
    """What a file holds of a parameter's state, as the optimiser wants it."""
    what = f"optimizer/{index}/{slot}"
    if value is None:
        raise safefile.FileError(f"{what}: expected a tensor, got none")
    counts = slot == "step"
    own = torch.empty((), dtype=torch.float32) if counts else parameter.detach().new_empty(0)
    bare = torch.empty(() if counts else shape, dtype=own.dtype, device="meta")
    value = schema.tensor(value, bare, what)
    if slot == "exp_avg_sq":
        schema.at_least_0(value, what)
    if counts and not (value == value.round() and 0 <= value <= _MOST_STEPS):
        raise safefile.FileError(f"{what}: expected a number of steps, got {value.item():g}")
    if not counts and pattern is not None:
        value = pattern.kept(value)
    return laid_out_as(value, parameter) if value.shape == parameter.shape else value


def apart(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(those without the prefix, those with it)."""
    of = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: value for name, value in tensors.items() if name not in of}, of


def fingerprint(
    model: nn.Module, batches: EpochBatches, *facts: Any, loss: Loss | None = None
) -> str:
    """Tells runs apart: the facts (those of `data.Batches` too), the loss and the network by what they compute, the
    first batch, all data that lies in memory, and the values a run starts from (masks included).

    Compare by `same_run`.

    Errors: ValueError for no batch.
    """
    batch = next(iter(batches.epoch(0)), None)
    if batch is None:
        raise ValueError("batches: expected at least one, got none")
    data = (len(batches), *_told(batch))
    facts += () if loss is None else loss.facts
    own = getattr(batches, "facts", ())
    facts += own if isinstance(own, tuple) else ()
    digest = hashlib.sha256(repr((facts, data, network(model))).encode())
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(safefile.bytes_of(value).data)
    return digest.hexdigest() + _of_contents(batches)


def same_run(saved: Any, run: str) -> bool:
    """Whether a file's fingerprint is that of this run; older files do not tell of data beyond the first batch."""
    return saved in (run, re.sub("-[0-9a-f]{16}", "", run))


def told_apart_by(saved: str, run: str) -> str:
    """Of two fingerprints, what an error says of them."""
    if saved[:12] == run[:12]:
        return "it began like this run, with other data"
    return f"its fingerprint is {saved[:12]}, this run's {run[:12]}"


def _of_contents(batches: Any) -> str:
    """Told of data that lies in memory, as the end of a fingerprint: integers, and sums of floats over their places,
    to a precision in which threads do not tell.  Many trainings on the same batches look at it once.
    """
    contents = getattr(batches, "contents", None)
    if contents is None:
        return ""
    data = [t for t in tree_leaves(contents) if isinstance(t, (Tensor, np.ndarray))]
    fixed = all(isinstance(t, Tensor) and not t.is_inference() for t in data)
    now = [(id(t), t._version) for t in data] if fixed else None  # pyright: ignore
    known, digest = getattr(batches, "told_contents", (None, ""))
    if now is None or now != known:
        digest = _digest_of(data)
        batches.told_contents = now, digest
    return digest


def _digest_of(data: Sequence[Tensor | np.ndarray]) -> str:
    told: list[Any] = []
    for t in data:
        t = torch.as_tensor(t).detach().cpu().contiguous().reshape(-1)
        if t.is_floating_point():
            told += [f"{value:.6g}" for value in _sums_over_places(t)]
        else:
            told.append(hashlib.sha256(safefile.bytes_of(t).data).hexdigest())
    return "-" + hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _told(batch: Any) -> list[Any]:
    """A batch's targets, and the sums of its inputs, which depend on threads."""
    inputs, target = parts_of(batch)
    labels = target.tolist() if isinstance(target, Tensor) else None
    sums = [
        f"{t.double().sum().item():.7g}" if isinstance(t, Tensor) else repr(t)
        for t in tree_leaves((inputs,) if isinstance(target, Tensor) else (inputs, target))
    ]
    return [labels, *sums]


def _sums_over_places(t: Tensor) -> list[float]:
    """Sums of sizes and of signs, weighed by places from 1 to 2; in pieces, since data may be most of the memory."""
    sizes = signs = 0.0
    for start in range(0, len(t), _PIECE):
        piece = t[start : start + _PIECE]
        places = (
            torch.arange(start, start + len(piece), dtype=torch.float64) / max(len(t) - 1, 1) + 1
        )
        sizes += float((piece.abs() * places).sum())
        signs += float(places[piece > 0].sum())
    return [sizes, signs]


def check_resumable(path: Path | None, batches: EpochBatches) -> None:
    """Errors: ValueError for a checkpoint of a run on data that cannot be read from any epoch on."""
    if path is not None and getattr(batches, "passing", False):
        raise ValueError(
            "checkpoint: expected data that can be read again (a DataLoader, a list, a function that makes an "
            "iterator, an object with epoch(i)), got a stream, which steps_per_epoch= makes of other data too; "
            "leave the checkpoint out"
        )


def seconds(path: Path | None) -> float:
    """How long the run behind a checkpoint had taken when it was written; 0 where there is none."""
    return read(path, _Timed)[1].get("seconds", 0.0) if path is not None and path.is_file() else 0.0


class _Timed(TypedDict):
    seconds: NotRequired[schema.Seconds]


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """One checkpoint, as a whole or not at all.  Errors: safefile.FileError."""
    meta = safefile.finite(meta, lambda number: {"float": str(number)})
    safefile.write(path, tensors, meta, kind="checkpoint")


def read(path: Path, hint: Any = schema.Facts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` was given, its facts as `schema.facts` has them by a type.  Errors: safefile.FileError."""
    try:
        tensors, meta = safefile.read(path, kind="checkpoint")
        return tensors, schema.facts(_floats(meta), hint, str(path))
    except safefile.FileError as error:
        raise safefile.FileError(f"{error}; remove it to begin anew, or name another") from None


# What a metric or a watched number may be, and JSON has not.
_NO_NUMBERS = ("nan", "inf", "-inf")


def _floats(value: Any) -> Any:
    """Facts with the numbers that `write` told by name."""
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in _NO_NUMBERS:
            return float(value["float"])
        return {k: _floats(v) for k, v in value.items()}
    return [_floats(v) for v in value] if isinstance(value, list) else value
