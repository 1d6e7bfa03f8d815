"""The ticket suite: what training a decided ticket costs, against what a user would run instead."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .rows import Rows
from .search_suite import run_all
from .ticket_cases import CPU, GPU, PARTS, QUICK, OpCase
from .ticket_ops import op_case
from .ticket_training import train_case


def parts_on(device: torch.device, *, quick: bool) -> tuple[str, ...]:
    """The parts that a device measures: whole steps on the CPU; bf16 models and products on a GPU."""
    if quick:
        return PARTS
    cases = GPU if device.type == "cuda" else CPU
    return tuple(part for part in PARTS if any(case.part == part for case in cases))


def ticket_suite(
    rows: Rows, device: torch.device, *, quick: bool = False, parts: Sequence[str] = PARTS
) -> int:
    """Measures every case of the named parts; returns how many failed."""
    cases = QUICK if quick else GPU if device.type == "cuda" else CPU
    work: list[tuple[str, Callable[[], Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "plans.json"
        for case in cases:
            if case.part not in parts:
                continue
            if isinstance(case, OpCase):
                step = lambda c=case: op_case(c, rows, device, quick=quick)  # noqa: E731
            else:
                step = lambda c=case: train_case(c, rows, device, cache, quick=quick)  # noqa: E731
            work.append((case.name, step))
        return run_all(work, device)
