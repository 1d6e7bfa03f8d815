"""`python -m bench run --suite step` measures; `python -m bench table` prints what is committed."""

import argparse
import csv
import datetime
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from .cases import STEP_CASES, StepBench
from .measure import large_allocations, times

RESULTS = Path(__file__).parent / "results"
FIELDS: tuple[str, ...] = (
    "suite", "case", "provider", "mode", "metric", "unit", "median", "q20", "q80",
    "device", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip


def environment(device: torch.device) -> dict[str, str]:
    """Where a number was measured."""
    name, driver = f"{platform.machine()} {torch.get_num_threads()} threads", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def step_suite(device: torch.device) -> list[dict[str, str]]:
    """Search steps against the dense step of the same model and batch, and against plain autograd."""
    rows = []
    for case in STEP_CASES:
        print(case.name, file=sys.stderr)
        bench = StepBench(case, device)
        bench.check()
        bench.prepare_plain()
        common = {"suite": "step", "case": case.name, "mode": "full step"} | environment(device)
        spreads = times(bench.providers(), case.rounds)
        dense = spreads["dense forward-backward"].median
        for provider, spread in spreads.items():
            found = dict(
                zip(("median", "q20", "q80"), (f"{1e3 * s:.3f}" for s in spread), strict=True)
            )
            rows.append(common | {"provider": provider, "metric": "time", "unit": "ms"} | found)
            ratio = {
                "metric": "time over dense",
                "unit": "x",
                "median": f"{spread.median / dense:.2f}",
            }
            rows.append(common | {"provider": provider} | ratio)
        if "search step, later epochs" in spreads:
            parts = [("search step", 1), ("search step, later epochs", 9)]
            mean = sum(spreads[name].median * n for name, n in parts) / 10
            rows.append(
                common
                | {"provider": "search step, mean of 10 epochs", "metric": "time over dense"}
                | {"unit": "x", "median": f"{mean / dense:.2f}"}
            )
        largest = max(w.numel() for w in bench.weights)
        layers = sum(w.numel() == largest for w in bench.weights)
        for provider, step in bench.providers().items():
            count = large_allocations(step, largest) / layers
            metric = {"metric": "allocations of the largest weight's size", "unit": "a layer"}
            rows.append(common | {"provider": provider, "median": f"{count:g}"} | metric)
        bench.close()
    return rows


def show(rows: list[dict[str, str]]) -> None:
    """Prints rows as a table."""
    table = Table("case", "provider", "metric", "median", "q20", "q80", "unit")
    for row in rows:
        table.add_row(
            *(
                row.get(c, "")
                for c in ("case", "provider", "metric", "median", "q20", "q80", "unit")
            )
        )
    Console(width=140).print(table)


SUITES = {"step": step_suite}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a suite and write its rows")
    run.add_argument("--suite", choices=SUITES, default="step")
    run.add_argument("--device", default="cpu")
    commands.add_parser("table", help="print the committed rows")
    arguments = parser.parse_args()
    if arguments.command == "table":
        for path in sorted(RESULTS.glob("*-step.csv")):
            print(path.name)
            show(list(csv.DictReader(path.open())))
        return
    device = torch.device(arguments.device)
    rows = SUITES[arguments.suite](device)
    place = (
        "cpu"
        if device.type == "cpu"
        else torch.cuda.get_device_name(device).lower().replace(" ", "-")
    )
    path = RESULTS / f"{place}-{arguments.suite}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    show(rows)
    print(f"rows  {path}")


if __name__ == "__main__":
    main()
