"""What the host does to launch a step: the bench of it runs, without a GPU and its interpreter."""

import csv
from pathlib import Path

from test_static import compiling

from bench.host import PLANS
from bench.rows import RESULTS


def test_the_host_bench_runs(tmp_path: Path) -> None:
    result = compiling("-m", "bench", "host", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "cpu-host-quick.csv").open()))
    committed = list(csv.DictReader((RESULTS / "cpu-host.csv").open()))
    assert [(r["case"], r["provider"]) for r in rows] == [
        (r["case"], r["provider"]) for r in committed
    ]
    assert {r["provider"] for r in rows} == {"dense", "masked", *PLANS}
    assert all(float(r["median"]) > 0 for r in rows)
