"""Tables about tickets: their layers, and the plan by which each trains."""

from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from .coverage import told_share
from .plans import report
from .printable import printable
from .tickets import Ticket
from .training_plan import PlannedModel

_FOLDED = 16  # more layers than that do not fit a screen
_EXTREMES = 6
_LONGEST = 200  # characters of a layer's name in a table


def layers_of(ticket: Ticket, title: str) -> tuple[Table, list[dict[str, Any]]]:
    """What each layer keeps, as a table and as rows.

    Of more than 16 layers the table has the 6 sparsest and the 6 densest, in the model's order.
    """
    table = Table(title=title)
    for column in ("layer", "shape", "kept", "sparsity", "live rows", "live columns"):
        table.add_column(column, justify="left" if column in ("layer", "shape") else "right")
    rows: list[dict[str, Any]] = []
    cells: list[tuple[str, ...]] = []
    for name, mask in ticket.masks.items():
        plane = mask.flatten(2).any(2) if mask.ndim > 2 else mask  # any tap keeps a channel alive
        live_rows, live_columns = int(plane.any(1).sum()), int(plane.any(0).sum())
        kept = int(mask.sum())
        sparsity = 1 - kept / mask.numel()
        cells.append(
            (
                printable(name, _LONGEST),
                "×".join(map(str, mask.shape)),
                f"{kept:,}",
                f"{100 * sparsity:.3f} %",
                f"{live_rows}/{plane.shape[0]}",
                f"{live_columns}/{plane.shape[1]}",
            )
        )
        rows.append(
            {
                "layer": name,
                "shape": list(mask.shape),
                "kept": kept,
                "sparsity": sparsity,
                "live_rows": live_rows,
                "live_columns": live_columns,
            }
        )
    ranked = sorted(range(len(rows)), key=lambda i: rows[i]["sparsity"])
    folded = set(ranked[_EXTREMES:-_EXTREMES]) if len(rows) > _FOLDED else set[int]()
    skipped = 0
    for index, row in enumerate([*cells, None]):
        if index in folded:
            skipped += 1
            continue
        if skipped:
            table.add_row(f"… {skipped} more", *[""] * 5)
            skipped = 0
        if row is not None:
            table.add_row(*row)
    total = sum(mask.numel() for mask in ticket.masks.values())
    kept = sum(row["kept"] for row in rows)
    table.add_section()
    table.add_row("all", "", f"{kept:,} of {total:,}", f"{100 * ticket.sparsity:.3f} %", "", "")
    return table, rows


def covered_of(ticket: Ticket) -> list[str]:
    """What share of the whole model a ticket is of, and what stays dense and why; nothing where it does not say."""
    parameters, dense = ticket.meta.get("parameters"), ticket.meta.get("dense")
    covered = sum(mask.numel() for mask in ticket.masks.values())
    if type(parameters) is not int or not covered <= parameters:
        return []
    lines = [told_share(covered, parameters, ticket.sparsity)]
    if isinstance(dense, dict):
        parts = [f"{n:,} {_short(why)}" for why, n in dense.items() if type(n) is int]
        lines += [f"dense: {', '.join(parts)}"] if parts else []
    return lines


_PROVENANCE = {
    "found by": ("method", "search", "seed", "search_epochs", "rounds", "engine"),
    "search": ("objective", "control", "gate", "search_lr", "distribution", "rewind"),
    "gates ended": ("natural_sparsity",),
    "ticket": ("sparsity", "granularity", "finished", "sanity", "torch"),
}
_SETUP = {
    "model": ("model", "data", "image_size"),
    "epochs": ("rewind_epochs", "train_epochs"),
}
_RECIPE = {"recipe": ("optimizer", "lr", "momentum", "weight_decay", "batch", "schedule")}


def provenance_of(ticket: Ticket) -> Table:
    """Where a ticket comes from, in the settings that matter; `ticket.meta` has all."""
    setup = ticket.meta.get("setup")
    setup = setup if isinstance(setup, dict) else {}
    recipe = setup.get("recipe", ticket.meta.get("recipe"))
    recipe = recipe if isinstance(recipe, dict) else {}
    table = Table(box=None, show_header=False, pad_edge=False)
    for labels, facts in ((_PROVENANCE, ticket.meta), (_SETUP, setup), (_RECIPE, recipe)):
        for label, keys in labels.items():
            found = [f"{key} {_short(facts[key])}" for key in keys if _told(facts.get(key))]
            if found:
                table.add_row(label, Text(", ".join(found), overflow="ellipsis", no_wrap=False))
    return table


def _told(value: Any) -> bool:
    return value is not None and value is not False and value != ""


def _short(value: Any) -> str:
    """A value of any file, in a few words: of what holds many, how many."""
    if isinstance(value, list | dict):
        return f"of {len(value)}"
    text = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
    return text if len(text) <= 60 else f"{text[:59]}…"


def plans_of(planned: PlannedModel, title: str) -> tuple[Table, list[str], list[dict[str, Any]]]:
    """What each layer of a planned model does (milliseconds a step), why in a line each, and all as rows."""
    table = Table(title=title, box=box.SIMPLE)
    for column in ("layer", "kept", "forward, dX, dW", "ms", "predicted", "dense*mask", "dense"):
        table.add_column(
            column, justify="left" if column in ("layer", "forward, dX, dW") else "right"
        )
    rows, lines, sums = [], [], [0.0] * 3
    for row in report(planned.model):
        choice = row.choice
        formats = choice.formats or ("mask",) * 3
        times = (choice.chosen, choice.time("mask"), choice.time("dense"))
        sums = [a + (b or 0.0) for a, b in zip(sums, times, strict=True)]
        size = torch.Size(row.shape).numel()
        state = 8 * (size if choice.formats is None else row.kept)
        ms, masked, dense = (_ms(t) for t in times)
        table.add_row(
            printable(row.name, _LONGEST),
            f"{100 * (1 - row.sparsity):.2f} %",
            formats[0] if len(set(formats)) == 1 else ", ".join(formats),
            ms, _ms(choice.guess), masked, dense,
        )  # fmt: skip
        memory = f"AdamW state {state / 2**20:.2f} of {8 * size / 2**20:.2f} MiB"
        lines.append(f"{row.name} ({'×'.join(map(str, row.shape))}): {choice.reason}; {memory}")
        rows.append(
            {
                "layer": row.name,
                "shape": list(row.shape),
                "kept": row.kept,
                "formats": list(formats),
                "reason": choice.reason,
                "milliseconds": times[0],
                "predicted": choice.guess,
                "dense_mask": times[1],
                "dense": times[2],
                "state_bytes": state,
                "measured": {name: list(t) for name, t in choice.measured.items()},
            }
        )
    if any(sums):
        table.add_section()
        ms, masked, dense = (_ms(t) for t in sums)
        table.add_row("all", "", "", ms, "", masked, dense)
    return table, lines, rows


def _ms(time: float | None) -> str:
    return "" if time is None else f"{time:.3g}"
