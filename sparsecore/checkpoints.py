"""Checkpoints of running work: optimiser state as named tensors plus JSON, never pickle."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import safefile
from .batches import EpochBatches


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON-able rest) of an optimiser's state_dict."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{slot}"] = value
            else:
                numbers[f"{index}/{slot}"] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]
) -> None:
    """Puts back what `pack_optimizer` gave."""
    state: dict[int, dict[str, Any]] = {}
    entries: dict[str, Any] = dict(rest["numbers"])
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            entries[name.removeprefix("optimizer/")] = value
    for name, value in entries.items():
        index, slot = name.split("/")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def fingerprint(model: nn.Module, batches: EpochBatches, *facts: Any) -> str:
    """Tells runs apart: the facts, the first batch, and the values a run starts from (masks included)."""
    x, y = next(iter(batches.epoch(0)))
    data = (len(batches), y.tolist(), x.double().sum().item())
    digest = hashlib.sha256(repr((facts, data)).encode())
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """One checkpoint, atomically.  Errors: safefile.FileError."""
    safefile.write(path, tensors, meta, kind="checkpoint")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` was given.  Errors: safefile.FileError."""
    return safefile.read(path, kind="checkpoint")
