"""Measurements as rows of a CSV: one number a row, with where it was measured, written as it is found."""

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parent / "results"
FIELDS: tuple[str, ...] = (
    "suite", "case", "provider", "mode", "metric", "unit", "median", "q20", "q80",
    "device", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip

Row = dict[str, str]


def environment(device: torch.device) -> Row:
    """Where and with what a number was measured.

    BENCH_COMMIT names the commit of a copy of the files, which may lie in another repository.
    """
    name, driver = f"{platform.machine()} {torch.get_num_threads()} threads", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def commit() -> str:
    """What is measured, `-dirty` where files differ from their commit; empty where nothing says."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    git = ("git", "-C", str(Path(__file__).parent))
    head = _said_by(*git, "rev-parse", "--short", "HEAD")
    # Rows that were just measured change nothing of what is measured next.
    where = ("--", ":/", f":!{RESULTS.name}")
    dirty = head and _said_by(*git, "status", "--porcelain", "--untracked-files=no", *where)
    return f"{head}-dirty" if dirty else head


def _said_by(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def path_of(folder: Path, device: torch.device, suite: str) -> Path:
    """`<device>-<suite>.csv`."""
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return folder / f"{name}-{suite}.csv"


def number(value: float) -> str:
    """Four significant digits, never in exponents."""
    digits = max(0, 3 - (len(f"{abs(value):.0f}") - 1)) if abs(value) >= 1 else 4
    return f"{value:.{digits}f}"


class Rows:
    """A suite's CSV file.  Every row is on disk before the next number is measured.

    Args:
        fresh: begin anew; otherwise go on with the rows that are there (half a row, from a kill, is cut).
    """

    def __init__(self, path: Path, suite: str, device: torch.device, *, fresh: bool = True) -> None:
        self.path, self.suite = path, suite
        self.common = environment(device)
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if not fresh and path.exists():
            text = path.read_text()
            lines = text[: text.rfind("\n") + 1].splitlines()
            self.rows = [r for r in csv.DictReader(lines) if None not in r.values()]
        whole = path.with_name(path.name + ".new")
        with whole.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        whole.replace(path)  # a kill meanwhile leaves the rows that were there

    def add(
        self, case: str, provider: str, mode: str, metric: str, unit: str, median: str,
        q20: str = "", q80: str = "",
    ) -> None:  # fmt: skip
        """Appends one measurement."""
        row = {
            "suite": self.suite, "case": case, "provider": provider, "mode": mode, "metric": metric,
            "unit": unit, "median": median, "q20": q20, "q80": q80,
        } | self.common  # fmt: skip
        self.rows.append(row)
        with self.path.open("a", newline="") as file:  # closed, hence flushed, after each row
            csv.DictWriter(file, FIELDS, restval="", lineterminator="\n").writerow(row)

    def find(self, **where: str) -> Row | None:
        """The row whose columns have these values."""
        fits = (r for r in self.rows if all(r[k] == v for k, v in where.items()))
        return next(fits, None)


def read(path: Path) -> list[Row]:
    """The rows of a file.  Errors: ValueError for a file of another kind."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: expected the columns {', '.join(FIELDS)}")
        return list(reader)


Times = tuple[float, float, float]  # median, 20 % and 80 % quantiles, in seconds


def add_times(
    rows: Rows, case: str, mode: str, spreads: Mapping[str, Times], *against: str
) -> None:
    """A time row a provider, and its speed-up over each provider `against` that was timed with it.

    These have the same mode on both sides; below 1 they are losses, and stay.
    """
    for provider, spread in spreads.items():
        rows.add(case, provider, mode, "time", "ms", *(number(1e3 * s) for s in spread))
        for other in against:
            if other in spreads:
                add_speed_up(rows, case, provider, mode, other, spreads[other], spread)


def add_speed_up(
    rows: Rows, case: str, provider: str, mode: str, over: str, other: Times, spread: Times
) -> None:
    """How many times faster it is than something `other` in the same run."""
    rows.add(case, provider, mode, f"speed-up over {over}", "x", f"{other[0] / spread[0]:.2f}")
