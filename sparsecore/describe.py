"""Tables about tickets: their layers, and the plan by which each trains."""

from typing import Any

import torch
from rich import box
from rich.table import Table

from .experiment import PlannedModel
from .plans import report
from .tickets import Ticket


def layers_of(ticket: Ticket, title: str) -> tuple[Table, list[dict[str, Any]]]:
    """What each layer keeps, as a table and as rows."""
    table = Table(title=title)
    for column in ("layer", "shape", "kept", "sparsity", "live rows", "live columns"):
        table.add_column(column, justify="left" if column in ("layer", "shape") else "right")
    rows = []
    for name, mask in ticket.masks.items():
        plane = mask.flatten(2).any(2) if mask.ndim > 2 else mask  # any tap keeps a channel alive
        live_rows, live_columns = int(plane.any(1).sum()), int(plane.any(0).sum())
        kept = int(mask.sum())
        sparsity = 1 - kept / mask.numel()
        table.add_row(
            name,
            "×".join(map(str, mask.shape)),
            f"{kept:,}",
            f"{100 * sparsity:.3f} %",
            f"{live_rows}/{plane.shape[0]}",
            f"{live_columns}/{plane.shape[1]}",
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
    total = sum(mask.numel() for mask in ticket.masks.values())
    kept = sum(row["kept"] for row in rows)
    table.add_section()
    table.add_row("all", "", f"{kept:,} of {total:,}", f"{100 * ticket.sparsity:.3f} %", "", "")
    return table, rows


def caveat(ticket: Ticket) -> str | None:
    """Why a search by gates was too short, if it was: its gates kept twice what the ticket has room for."""
    natural = ticket.meta.get("natural_sparsity")  # of any file: it may say anything
    if not isinstance(natural, float) or 1 - natural <= 2 * (1 - ticket.sparsity):
        return None
    return (
        f"the gates ended {100 * natural:.1f} % sparse, not {100 * ticket.sparsity:.4g} %, so the ticket cuts "
        "what they still used: more epochs, a smaller search batch or a higher search lr brings them there"
    )


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
            row.name,
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
