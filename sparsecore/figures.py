"""Pictures of what was measured, and the numbers behind them as CSV.  Pure: data in, the file's path out.

Nothing here touches matplotlib's global state: a `Figure` of its own draws without a display.
"""

import csv
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .connectivity import STABLE, LinearPath
from .printable import printable
from .writing import put

_SIZE = (6.4, 4.2)  # inches, as of `compare`'s picture
_MOST = 400  # inches of a picture's side: renderers have a largest one
_MOST_BARS, _MOST_PANELS = 8_000, 300  # ten seconds of drawing
_LONGEST = 60  # characters of a name in a picture
_LETTER = 0.08  # inches of one


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A header and a line per row; a field that a row lacks, or that is None, stays empty.

    Texts are printable, each in its line: what would break a row, or is no text, is an escape (`printable`).

    Errors: ValueError for no rows, FileError if it cannot be written.
    """
    rows = _some(list(rows), "rows")
    rows = [{_cell(key): _cell(value) for key, value in row.items()} for row in rows]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    put(path, text.getvalue().encode())
    return path


def _cell(value: Any) -> Any:
    return printable(value, len(value)) if isinstance(value, str) else value


def draw_paths(file: Path, paths: Mapping[str, LinearPath], title: str = "") -> Path:
    """Test error along linear paths, by label; the loss if one of them has no classes."""
    by_loss = any(isnan(path.errors[0]) for path in _some(paths, "paths").values())
    measured = "test loss" if by_loss else "test error, %"
    figure, axes = _axes(title, "α, from one optimum to the other", measured)
    for label, path in paths.items():
        values = path.losses if by_loss else path.errors
        axes.plot(path.alphas, values, marker=".", label=shown(label))
    axes.legend()
    return save(figure, file)


def draw_instabilities(
    file: Path,
    instabilities: Mapping[str, Mapping[float, float]],
    threshold: float = STABLE,
    title: str = "",
) -> Path:
    """Instability (percentage points) against the rewind epoch, by label, with the line of stability."""
    figure, axes = _axes(title, "rewind epoch", "instability, percentage points")
    axes.axhline(threshold, color="grey", linestyle="--", linewidth=1, label="stable below")
    for label, values in _some(instabilities, "instabilities").items():
        epochs = sorted(values)
        axes.plot(epochs, [values[e] for e in epochs], marker="o", label=shown(label))
    axes.legend()
    return save(figure, file)


def draw_angles(
    file: Path, distances: Tensor, sparsities: Sequence[float], title: str = ""
) -> Path:
    """A heat map of angular distances [R, R] between rounds of the given sparsities; NaN stays blank.

    Errors: ValueError if there are not R sparsities.
    """
    expected = (len(sparsities), len(sparsities))
    if distances.shape != expected:
        raise ValueError(
            f"distances: expected shape {expected}, a row and a column per sparsity, got "
            f"{tuple(distances.shape)}"
        )
    figure, axes = _axes(title, "sparsity, % of weights removed", "sparsity, % of weights removed")
    axes.grid(False)
    values = distances.detach().cpu().double().numpy()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)  # beyond orthogonal is rare
    ticks = range(0, len(sparsities), -(-len(sparsities) // 12))
    labels = [_percent(sparsities[i]) for i in ticks]
    axes.set_xticks(ticks, labels, rotation=90)
    axes.set_yticks(ticks, labels)
    figure.colorbar(image, label="angular distance (1: orthogonal)", extend="max")
    return save(figure, file)


def draw_barriers(
    file: Path, barriers: Mapping[str, Mapping[float, float]], title: str = ""
) -> Path:
    """Error barriers (percentage points) against sparsity, by label."""
    figure, axes = _axes(
        title, "sparsity, % of weights removed", "error barrier, percentage points"
    )
    axes.axhline(STABLE, color="grey", linestyle="--", linewidth=1)
    for label, values in _some(barriers, "barriers").items():
        sparsities = sorted(values)
        places = _kept(sparsities)
        axes.plot(places, [values[s] for s in sparsities], marker="o", label=shown(label))
    _sparsity_axis(axes, {s for values in barriers.values() for s in values})
    axes.legend()
    return save(figure, file)


def draw_search(file: Path, records: Sequence[Mapping[str, float]], title: str = "") -> Path:
    """Sparsity and accuracy as a search goes on.

    Args:
        records: of "epoch" and what there is of "sparsity" (a fraction), "accuracy" of the network with its
            soft gates and "hard_accuracy" with the mask they stand for (percent).
    """
    _some(records, "records")
    figure, axes = _axes(title, "search epoch", "test accuracy, %")
    removed = axes.twinx()
    removed.set_ylabel("sparsity, % of weights removed")
    lines: list[Any] = []
    for key, label, on, style in (
        ("accuracy", "accuracy, soft gates", axes, "-"),
        ("hard_accuracy", "accuracy, hardened", axes, "-"),
        ("sparsity", "sparsity", removed, "--"),
    ):
        there = [r for r in records if r.get(key) is not None]
        if there:
            scale = 100 if key == "sparsity" else 1
            values = [scale * r[key] for r in there]
            color = f"C{len(lines)}"
            lines += on.plot([r["epoch"] for r in there], values, style, color=color, label=label)
    axes.legend(handles=lines)
    return save(figure, file)


def draw_layers(file: Path, sparsities: Mapping[str, Mapping[str, float]], title: str = "") -> Path:
    """Bars of the fraction removed in each layer (`Ticket.layer_sparsities`), by ticket.

    Errors: ValueError for more bars than a picture shows.
    """
    tickets = _some(sparsities, "sparsities")
    _few("bars", sum(map(len, tickets.values())), _MOST_BARS)
    layers = list(dict.fromkeys(layer for ticket in tickets.values() for layer in ticket))
    figure, axes = _axes(title, "", "weights removed, %")
    names, legend = [*map(shown, layers)], max(len(shown(label)) for label in tickets)
    # Long names want room of their own: bars would have none.
    figure.set_figwidth(
        min(max(_SIZE[0], 0.4 * len(layers)) + _LETTER * max(0, legend - 20), _MOST)
    )
    figure.set_figheight(_SIZE[1] + _LETTER * max(0, max(map(len, names)) - 20))
    width = 0.8 / len(tickets)
    for i, (label, by_layer) in enumerate(tickets.items()):
        offset = (i - (len(tickets) - 1) / 2) * width
        places = [layers.index(layer) + offset for layer in by_layer]
        axes.bar(places, [100 * s for s in by_layer.values()], width, label=shown(label))
    axes.set_xticks(range(len(layers)), names, rotation=90)
    axes.grid(False, axis="x")
    figure.legend(loc="outside right upper")  # bars may fill the axes
    return save(figure, file)


def draw_gates(file: Path, gates: Mapping[str, Tensor], bins: int = 50, title: str = "") -> Path:
    """Histograms of gates in [0, 1] on a log scale, one per entry (a layer, or all of them pooled).

    Errors: ValueError for values outside of [0, 1], and for more entries than a picture shows.
    """
    columns = min(4, len(_some(gates, "gates")))
    _few("histograms", len(gates), _MOST_PANELS)
    rows = -(-len(gates) // columns)
    size = (max(_SIZE[0], 2.4 * columns), min(max(_SIZE[1], 1.8 * rows), _MOST))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for (label, values), axes in zip(gates.items(), grid, strict=False):
        values = values.detach().float()
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"gates of {label}: expected values in [0, 1], got others; harden first"
            )
        # Counted where the gates lie: a model's worth of them never leaves the device.
        counts = torch.histc(values, bins, 0, 1).cpu().numpy()
        axes.stairs(counts, torch.linspace(0, 1, bins + 1).numpy(), fill=True)
        axes.set_yscale("log")
        axes.set_title(shown(label), fontsize="small")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(bottom=0.5)  # of all, and only now that all is drawn: one gate shows
    for axes in grid:  # those that are left
        axes.set_visible(False)
    figure.suptitle(shown(title))
    figure.supxlabel("gate")
    figure.supylabel("gates per bin")
    return save(figure, file)


def draw_widths(
    file: Path, accuracies: Mapping[str, Mapping[float, Sequence[float]]], title: str = ""
) -> Path:
    """Accuracies (percent, one per seed) against the width of the base network, by label."""
    figure, axes = _axes(title, "width of the base network", "test accuracy, %")
    for label, by_width in _some(accuracies, "accuracies").items():
        widths = sorted(by_width)
        means = [mean(by_width[w]) for w in widths]
        errors = [stdev(by_width[w]) if len(by_width[w]) > 1 else 0.0 for w in widths]
        axes.errorbar(widths, means, yerr=errors, marker="o", capsize=3, label=shown(label))
    axes.legend()
    return save(figure, file)


def shown(name: str) -> str:
    """A name as matplotlib draws it: no formula, whatever dollars it has, and in legends too if it begins with _."""
    text = printable(name, _LONGEST).replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text


def _some(values: Any, what: str) -> Any:
    """`values`, of which there must be some."""
    if not values:
        raise ValueError(f"{what}: expected at least one, got none; measure something first")
    return values


def _few(what: str, count: int, most: int) -> None:
    """Errors: ValueError for more than a picture shows, which would take minutes to draw."""
    if count > most:
        raise ValueError(
            f"figure: expected at most {most:,} {what} in one, got {count:,}; give fewer tickets or layers"
        )


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(title=shown(title), xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _kept(sparsities: Iterable[float]) -> list[float]:
    return [100 * (1 - s) for s in sparsities]


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.4g}"


def _sparsity_axis(axes: Axes, sparsities: Iterable[float]) -> None:
    """Weights kept on a log scale, named by what is removed."""
    sparsities = sorted(sparsities)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(_kept(sparsities), [_percent(s) for s in sparsities], rotation=90)
    axes.minorticks_off()


def save(figure: Figure, file: Path) -> Path:
    """Draws the figure into a PNG; returns its path."""
    with warnings.catch_warnings():  # a name in a script that the font lacks has boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(picture := io.BytesIO(), dpi=150)
    put(file, picture.getvalue())
    return file
