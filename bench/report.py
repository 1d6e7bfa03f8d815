"""Committed measurements as tables and a picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .rows import Row, read

SUITES = ("step", "search", "ticket", "engine", "cts-resnet20", "host")
# What cases' names begin with: a table each.
SEARCH_PARTS = ("ceiling", "layer", "network", "ops", "strategy")
TICKET_PARTS = ("mlp", "lenet", "model", "op", "conv")
PARTS = SEARCH_PARTS + TICKET_PARTS
# Columns of a table, where a suite has them, in this order; anything else follows.
METRICS = (
    "time", "bandwidth", "share of copy bandwidth", "rate", "time over dense", "speed-up over eager",
    "speed-up over compiled", "speed-up over dense*mask", "speed-up over dense",
    "speed-up over dense, compile-graph", "speed-up over dense*mask, compiled", "speed-up over dense, compiled",
    "compile time", "optimiser state", "parameters", "formats", "peak memory", "peak memory beyond state",
    "density kept", "accuracy", "rewind time", "search time", "search epoch", "training time", "training epoch",
    "search and training time",
)  # fmt: skip


def files(folder: Path, suite: str) -> list[Path]:
    """A suite's files, one a device."""
    return sorted(folder.glob(f"*-{suite}.csv"))


def headings(rows: Sequence[Row]) -> list[str]:
    """case, provider, mode and every metric with its unit where it has one only."""
    return ["case", "provider", "mode", *(_heading(m, rows) for m in _metrics(rows))]


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each case, provider and mode, with its metrics side by side."""
    metrics = _metrics(rows)
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["case"], row["provider"], row["mode"])
        cells.setdefault(key, {})[row["metric"]] = _cell(row, rows)
    return [[*key, *(found.get(m, "") for m in metrics)] for key, found in cells.items()]


def _metrics(rows: Sequence[Row]) -> list[str]:
    present = dict.fromkeys(row["metric"] for row in rows)
    return [m for m in METRICS if m in present] + [m for m in present if m not in METRICS]


def _units(metric: str, rows: Sequence[Row]) -> set[str]:
    return {row["unit"] for row in rows if row["metric"] == metric}


def _heading(metric: str, rows: Sequence[Row]) -> str:
    units = _units(metric, rows)
    unit = units.pop() if len(units) == 1 else ""
    return f"{metric}, {unit}" if unit else metric


def _cell(row: Row, rows: Sequence[Row]) -> str:
    spread = f" ({row['q20']}-{row['q80']})" if row["q20"] else ""
    unit = "" if len(_units(row["metric"], rows)) == 1 else f" {row['unit']}"
    return f"{row['median']}{spread}{unit}"


def table(
    folder: Path, suites: Sequence[str], *, markdown: bool = False, only: str = ""
) -> list[str]:
    """Prints the suites' tables; returns those without a GPU's rows, which it says.

    Args:
        only: a part of the cases' names.
    """
    missing = []
    for suite in suites:
        found = files(folder, suite)
        for path in found:
            parts: dict[str, list[Row]] = {}
            for row in read(path):
                if only in row["case"]:
                    first = row["case"].partition("/")[0]
                    parts.setdefault(first if first in PARTS else "", []).append(row)
            for rows in parts.values():
                _print(path, rows, markdown)
        if suite != "host" and all(path.name.startswith("cpu-") for path in found):
            missing.append(suite)
            print(f"{suite} on a GPU: not measured")
    return missing


def _print(path: Path, rows: Sequence[Row], markdown: bool) -> None:
    where = rows[0]
    driver = f", driver {where['driver']}" if where["driver"] else ""
    title = (
        f"{path.name}: {where['device']}{driver}, torch {where['torch']}, triton {where['triton']}, "
        f"commit {where['commit'] or 'unknown'}, {where['date']}"
    )
    head, body = headings(rows), lines(rows)
    if markdown:
        print(f"{title}; medians (20-80 %)\n")
        for line in (head, ["---"] * len(head), *body):
            print(f"| {' | '.join(line)} |")
        print()
        return
    grid = Table(title=title, caption="medians (20-80 %)")
    for i, name in enumerate(head):
        grid.add_column(name, no_wrap=i < 3)  # case, provider, mode
    for line in body:
        grid.add_row(*line)
    wide = sum(max(map(len, column)) for column in list(zip(*body, strict=True))[:3])
    Console(width=max(140, wide + 16 * len(head))).print(grid)


def curves(
    rows: Sequence[Row], baseline: str = "eager"
) -> dict[str, dict[tuple[str, str], dict[float, float]]]:
    """Speed-up by layer or model, then (provider, mode), then the number its cases end in."""
    found: dict[str, dict[tuple[str, str], dict[float, float]]] = {}
    for row in rows:
        name, _, last = row["case"].rpartition("/")
        _, equals, value = last.partition("=")
        if row["metric"] == f"speed-up over {baseline}" and equals:
            lines = found.setdefault(name, {}).setdefault((row["provider"], row["mode"]), {})
            lines[float(value)] = float(row["median"])
    return found


def plot(folder: Path, suite: str, out: Path | None = None) -> list[Path]:
    """Draws speed-ups, one panel for each layer or model, a picture for each device.

    Over eager against the tokens or the batch; of tickets over dense*mask against the sparsity.  Losing
    points stay: the line at 1 parts them.
    """
    # A backend of its own, so that no display is needed and no caller's choice is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = []
    tickets = suite.startswith("ticket")
    baseline = "dense*mask" if tickets else "eager"
    for path in files(folder, suite):
        rows = read(path)
        panels = curves(rows, baseline)
        if tickets:  # one point is no curve
            panels = {n: p for n, p in panels.items() if any(len(at) > 1 for at in p.values())}
        if not panels:
            continue
        columns = min(4 if tickets else 3, len(panels))
        count = -(-len(panels) // columns)
        figure = Figure(figsize=(max(9, 4.6 * columns), 1.2 + 3 * count), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(count, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        colours: dict[str, str] = {}
        for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
            axes.set_visible(True)
            for (provider, mode), points in lines.items():
                if provider == baseline:
                    continue  # 1 by definition
                x = sorted(points)
                colour = colours.setdefault(provider, f"C{len(colours) % 10}")
                style = ("-", "--", ":", "-.")[2 * ("compile" in mode) + ("graph" in mode)]
                label = f"{provider} ({mode})"
                axes.plot(x, [points[t] for t in x], style, color=colour, marker="o", ms=3, label=label)  # fmt: skip
            axes.axhline(1, color="grey", linewidth=1)
            if tickets:
                shown = sorted({at for points in lines.values() for at in points})
                axes.set_xscale("logit")
                axes.set_xticks(shown, [f"{100 * at:g} %" for at in shown], fontsize=7)
                axes.set_xticks([], minor=True)
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_xscale("log", base=2)
                axes.set_ylim(bottom=0)
            axes.set_xlabel("sparsity" if tickets else "batch" if suite.startswith("step") else "T")
            axes.set_title(name, fontsize=9)
            axes.grid(alpha=0.3)
        grid[0][0].set_ylabel(f"speed-up over {baseline} (same mode)")
        handles = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)  # fmt: skip
        figure.suptitle(f"{suite}: {rows[0]['device']}")
        target = out or path.with_suffix(".png")
        figure.savefig(target, dpi=130)
        made.append(target)
    if not made:
        print(f"plot: expected rows of speed-ups in {folder}/*-{suite}.csv, found none")
    return made
