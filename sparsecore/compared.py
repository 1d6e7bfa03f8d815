"""What the finished cells of a comparison say: means over seeds, verdicts of controls, a table and a plot."""

from pathlib import Path
from statistics import mean, stdev

import matplotlib
from rich.table import Table

from .cells import Row
from .figures import save, shown
from .sanity import CHECKS, Verdict, verdict
from .setups import Setup

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Compared:
    """Rows by cell, in a folder."""

    folder: Path
    setup: Setup
    rows: dict[str, Row]

    def summary(self, what: str = "accuracy") -> dict[str, dict[float, list[float]]]:
        """A numeric field of all finished cells, accuracy in %, by method and sparsity."""
        found: dict[str, dict[float, list[float]]] = {}
        for row in self.rows.values():
            by_sparsity = found.setdefault(row["method"], {})
            by_sparsity.setdefault(float(row["sparsity"]), []).append(float(row[what]))
        return found

    def accuracies(self, method: str, sparsity: float) -> dict[int, float]:
        """Accuracy (%) by seed of a method's finished cells."""
        rows = self.rows.values()
        return {
            int(row["seed"]): float(row["accuracy"])
            for row in rows
            if row["method"] == method and float(row["sparsity"]) == sparsity
        }

    def verdicts(self, method: str, sparsity: float) -> list[Verdict]:
        """What the finished controls of a method say."""
        ticket = self.accuracies(method, sparsity)
        controls = {check: self.accuracies(f"{method}+{check}", sparsity) for check in CHECKS}
        return [verdict(check, ticket, found) for check, found in controls.items() if found]

    def table(self) -> Table:
        """Mean accuracy with its standard deviation over seeds, and mean seconds of search, a row per method."""
        summary, seconds = self.summary(), self.summary("search_seconds")
        sparsities = sorted({s for m, row in summary.items() if m != "dense" for s in row})
        dense = summary.get("dense", {}).get(0.0, [])
        title = f"{self.setup.model} on {self.setup.data}: test accuracy, % (seconds of search)"
        table = Table(title=title, caption=f"dense {_spread(dense)}" if dense else None)
        counts = {len(values) for row in summary.values() for values in row.values()}
        told = len(counts) > 1  # seeds that earlier runs had count too
        table.add_column("method")
        for s in sparsities:
            table.add_column(f"{100 * s:g} % sparse", justify="right")
        for method, row in summary.items():
            if method != "dense":
                cells = [
                    f"{_spread(row[s])}{f' of {len(row[s])}' if told else ''} ({mean(seconds[method][s]):.0f} s)"
                    if s in row
                    else "-"
                    for s in sparsities
                ]
                table.add_row(method, *cells)
        return table

    def plot(self) -> Path:
        """Draws accuracy against sparsity with error bars; returns the picture's path."""
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        summary = self.summary()
        dense = summary.pop("dense", {}).get(0.0)
        if dense:
            axes.axhline(mean(dense), color="grey", linestyle="--", linewidth=1, label="dense")
        for i, (method, row) in enumerate(summary.items()):
            points = sorted(row)
            means = [mean(row[s]) for s in points]
            errors = [stdev(row[s]) if len(row[s]) > 1 else 0.0 for s in points]
            kept = [100 * (1 - s) for s in points]
            # Controls of a method are dashed; colours begin again after ten.
            line = "--" if "+" in method else ("-", "-.", ":")[i // 10 % 3]
            label = shown(method)
            axes.errorbar(kept, means, yerr=errors, fmt="o" + line, ms=3, capsize=2, label=label)
        axes.set_xscale("log")
        axes.invert_xaxis()
        kept = sorted({100 * (1 - s) for row in summary.values() for s in row})
        axes.set_xticks(kept, [f"{100 - k:g}" for k in kept], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("sparsity, % of weights removed")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(shown(f"{self.setup.model} on {self.setup.data}"))
        axes.grid(alpha=0.3)
        if len(summary) > 8:
            figure.set_figwidth(8.4)
            figure.legend(loc="outside right upper", fontsize="small")
        else:
            axes.legend()
        path = self.folder / "accuracy.png"
        save(figure, path)
        plt.close(figure)
        return path


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values):.1f}"
