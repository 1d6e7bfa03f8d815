"""Measures and shows: `python -m bench run | table | plot | tickets | static | host | gpu | compare`.

`python bench` too.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # the folder is run as a script: its own files are no top-level names
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

try:
    import torch
except ModuleNotFoundError as error:
    print(f"error: {sys.executable}: {error}; name a Python that has the packages", file=sys.stderr)
    sys.exit(2)

from bench import host, report, static, supervise
from bench.engine_suite import engine_suite
from bench.rows import RESULTS, Rows, commit, path_of
from bench.search_suite import PARTS, search_suite
from bench.stages import Setting
from bench.step_suite import step_suite
from bench.ticket_suite import parts_on, ticket_suite
from bench.tickets import LENGTHS, PAPER, QUICK, tickets

QUICK_RESULTS = Path("build") / "bench"
SLICES = {"gpu": "bench.evidence", "compare": "bench.comparison"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    run = command("run", "measure a suite and write its rows")
    run.add_argument("--suite", choices=("step", "search", "ticket", "engine"), default="step")
    run.add_argument("--parts", help="of the search and ticket suites, with commas; all by default")
    table = command("table", "print committed rows")
    table.add_argument("--suite", choices=report.SUITES)
    table.add_argument("--markdown", action="store_true")
    table.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name has it")
    plot = command("plot", "draw speed-ups")
    plot.add_argument("--suite", default="search")
    plot.add_argument("--out", type=Path, help="picture; next to the rows by default")
    for made in (table, plot):
        made.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    found = command("tickets", "search and train the tickets of a suite")
    found.add_argument("--suite", choices=("cts-resnet20",), default="cts-resnet20")
    found.add_argument("--data-dir", help="where the data lie; otherwise they are downloaded")
    found.add_argument("--lengths", default=",".join(LENGTHS), help="searches, with commas")
    found.add_argument("--seeds", type=int, default=1)
    found.add_argument(
        "--amp", choices=("bf16", "none"), default="bf16", help="of training on a GPU"
    )
    found.add_argument("--keep", type=Path, help="folder of tickets; --out by default")
    slices = (
        command("gpu", "all that needs a GPU, in slices: run it again to go on"),
        command("compare", "methods on ResNet-20, in slices: run it again to go on"),
    )
    for made in slices:
        made.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
        made.add_argument("--cache", type=Path, help="folder of an archive of compiled kernels")
        made.add_argument("--data-dir", type=Path, help="where the data lie")
    for made in (run, found, *slices):
        made.add_argument("--out", type=Path, help="folder; bench/results, build/bench if quick")
        made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        made.add_argument("--quick", action="store_true", help="tiny, to try every path out")
    idle = command("host", "what launching costs the host, without a GPU")
    idle.add_argument("--out", type=Path, help="folder; bench/results, build/bench if quick")
    idle.add_argument("--quick", action="store_true", help="tiny, to try every path out")
    check = command("static", "compile every kernel and read what it costs")
    check.add_argument("--check", action="store_true", help="compare with the committed rows")
    arguments = parser.parse_args(argv)
    if "device" in arguments:
        if problem := unusable(arguments.device):
            parser.exit(2, f"error: --device {arguments.device}: {problem}\n")
    if arguments.command == "run":
        known = PARTS
        if arguments.suite == "ticket":
            known = parts_on(torch.device(arguments.device), quick=arguments.quick)
        arguments.parts = arguments.parts.split(",") if arguments.parts else list(known)
        if unknown := set(arguments.parts) - set(known):
            run.error(f"--parts: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        if arguments.suite == "search" and arguments.device == "cpu" and not arguments.quick:
            run.error("the search suite measures a GPU: expected --device cuda, or --quick")
    if arguments.command == "tickets":
        arguments.lengths = arguments.lengths.split(",")
        if unknown := set(arguments.lengths) - set(LENGTHS):
            found.error(f"--lengths: expected some of {', '.join(LENGTHS)}, got {unknown}")
    return arguments


def unusable(name: str) -> str:
    """What is wrong with a device; empty if nothing is."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return "expected cpu or cuda, perhaps with an index"
    if device.type not in ("cpu", "cuda"):
        return "expected cpu or cuda"
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        return f"expected an index below {count}" if count else "expected a usable GPU, found none"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if anything that should have been measured was not."""
    arguments = parse(argv)
    if arguments.command == "static":
        return static.main(["--check"] if arguments.check else [])
    if arguments.command == "host":
        folder = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
        return host.main(folder, quick=arguments.quick)
    if arguments.command == "table":
        suites = [arguments.suite] if arguments.suite else report.SUITES
        report.table(arguments.results, suites, markdown=arguments.markdown, only=arguments.cases)
        return 0
    if arguments.command == "plot":
        made = report.plot(arguments.results, arguments.suite, arguments.out)
        sys.stdout.writelines(f"picture  {path}\n" for path in made)
        return int(not made)
    if arguments.command in SLICES:
        return in_slices(arguments)
    device = torch.device(arguments.device)
    quick = arguments.quick
    folder = arguments.out or (QUICK_RESULTS if quick else RESULTS)
    if arguments.command == "tickets":
        plan = (QUICK if quick else PAPER).on(device, amp=arguments.amp)
        return tickets(
            plan, folder, device, lengths=arguments.lengths, seeds=arguments.seeds,
            data_dir=arguments.data_dir, keep=arguments.keep,
        )  # fmt: skip
    suite = f"{arguments.suite}-quick" if quick else arguments.suite
    rows = Rows(path_of(folder, device, suite), suite, device)
    if arguments.suite == "step":
        failed = step_suite(rows, device, quick=quick)
    elif arguments.suite == "engine":
        failed = engine_suite(rows, device, quick=quick)
    elif arguments.suite == "ticket":
        failed = ticket_suite(rows, device, quick=quick, parts=arguments.parts)
    else:
        failed = search_suite(rows, device, quick=quick, parts=arguments.parts)
    print(f"rows  {rows.path}")
    return int(failed > 0)


def in_slices(arguments: argparse.Namespace) -> int:
    """Returns 0 when all is done and passed, 1 if anything failed, 3 if anything is left, 2 for bad input."""
    setting = Setting(
        (arguments.out or Path("build") / arguments.command).absolute(), arguments.device, arguments.quick,
        str(arguments.data_dir.absolute()) if arguments.data_dir else None,
    )  # fmt: skip
    try:
        if not (what := commit()):
            raise ValueError("no repository says which commit this is: name it by BENCH_COMMIT")
        code = supervise.run(
            SLICES[arguments.command], setting, budget=arguments.budget, commit=what,
            cache=arguments.cache and arguments.cache.absolute(),
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((setting.out / "summary.md").read_text())
    return code


if __name__ == "__main__":
    sys.exit(main())
