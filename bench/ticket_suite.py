"""The ticket suite: what training a decided ticket costs, against what a user would run instead."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .rows import Rows
from .search_suite import Work, run_all
from .ticket_cases import CPU, GPU, PARTS, QUICK, OpCase
from .ticket_ops import op_case
from .ticket_training import train_case


def parts_on(device: torch.device, *, quick: bool) -> tuple[str, ...]:
    """The parts that a device measures: whole steps on the CPU; bf16 models and products on a GPU."""
    if quick:
        return PARTS
    cases = GPU if device.type == "cuda" else CPU
    return tuple(part for part in PARTS if any(case.part == part for case in cases))


def ticket_work(device: torch.device, cache: Path, *, quick: bool = False) -> list[Work]:
    """Every case of the suite.

    Args:
        cache: where "plan auto" remembers: a new file, so that a run measures for itself.
    """
    work = []
    for case in QUICK if quick else GPU if device.type == "cuda" else CPU:
        if isinstance(case, OpCase):
            run = lambda rows, c=case: op_case(c, rows, device, quick=quick)  # noqa: E731
        else:
            run = lambda rows, c=case: train_case(c, rows, device, cache)  # noqa: E731
        work.append(Work(case.part, case.name, run))
    return work


def ticket_suite(
    rows: Rows, device: torch.device, *, quick: bool = False, parts: Sequence[str] = PARTS
) -> int:
    """Measures every case of the named parts; returns how many failed."""
    with tempfile.TemporaryDirectory() as folder:
        work = ticket_work(device, Path(folder) / "plans.json", quick=quick)
        return run_all([one for one in work if one.part in parts], rows, device)
