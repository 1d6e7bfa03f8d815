"""The commands `compare` and `demo`: methods side by side, in a folder that goes on."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import data as datasets
from .compare import FILES, MADE, Comparison, check_method, comparison_kept
from .console import command, console, show, write_json
from .describe import covered_of
from .engine import check_engine
from .experiment import (
    data_of,
)
from .interrupts import goes_on
from .needs import check_memory
from .options import (
    Device,
    EngineName,
    Json,
    Seed,
    device_of,
    listed,
    numbers,
    seeds_from,
    with_setup,
)
from .paths import check_paths
from .progress import Progress
from .recipes import recipe_for
from .setups import Setup
from .sparsities import check_sparsity
from .tickets import Ticket
from .writing import FileError

_MOST_RUNS = 100_000  # of a comparison


@with_setup
def compare(
    setup: Setup,
    data_dir: Path | None,
    methods: Annotated[
        str,
        typer.Option(
            help="With commas; METHOD:KEY=VALUE sets its own fields, METHOD+shuffle, +reinit or +invert "
            "is a control."
        ),
    ] = "joint,cts,snip,magnitude,random",
    sparsities: Annotated[str, typer.Option(help="With commas.")] = "0.95,0.98,0.99",
    seeds: Annotated[int, typer.Option(help="How many, counted up from --seed.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the results; run again to go on.")] = Path(
        "runs/compare"
    ),
    engine: EngineName = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Compare methods over sparsities and seeds: a table, a CSV and a plot."""
    target = device_of(device)
    check_engine(engine, target)
    chosen = [check_method(setup, method) for method in listed(methods, "methods")]
    wanted = [check_sparsity(s) for s in numbers(sparsities, "sparsities")]
    if not chosen:
        raise ValueError("compare: expected at least one method, got none")
    counted = seeds_from(seed, seeds)
    if (runs := len(chosen) * len(wanted) * len(counted)) > _MOST_RUNS:
        raise ValueError(
            f"compare: expected at most {_MOST_RUNS:,} runs, got {runs:,}; take fewer methods, sparsities or seeds"
        )
    report(setup, data_dir, chosen, wanted, counted, out, target, json_file, engine)


def report(
    setup: Setup,
    data_dir: Path | None,
    methods: list[str],
    sparsities: list[float],
    seeds: range,
    out: Path,
    device: torch.device,
    json_file: Path | None,
    engine: str = "auto",
) -> None:
    """Runs a comparison and shows where everything is."""
    check_paths(
        {"--weights": setup.weights_file},
        written={"--json": json_file, **{f"the comparison's {name}": out / name for name in FILES}},
        folders={"--out": out, "the comparison's tickets": out / "tickets"},
        made={what: (out, pattern) for what, pattern in MADE.items()},
        data=datasets.folder_of(setup.data),
    )
    dataset = data_of(setup, data_dir)
    check_memory(
        setup, dataset, device, methods=list(dict.fromkeys(m.partition("+")[0] for m in methods))
    )
    comparison = Comparison(out, setup, engine)
    with goes_on(comparison_kept(out)), Progress() as progress:
        comparison.run(dataset, methods, sparsities, seeds, device, progress)
    picture = comparison.plot()
    console.print(comparison.table())
    for cells, told in comparison.caveats.items():
        console.line(f"{cells}: {told}")
    tickets = sorted((out / "tickets").glob("*.safetensors"))
    with suppress(FileError):  # a damaged one; the rows are what was asked for
        show(covered_of(Ticket.load(tickets[0])) if tickets else [])
    for what, path in (
        ("rows", out / "results.csv"),
        ("tickets", out / "tickets"),
        ("plot", picture),
    ):
        console.line(f"{what:8}{path}")
    write_json(json_file, {"rows": list(comparison.rows.values())})


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("demo"),
    device: Device = "cpu",
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """A comparison on scikit-learn's handwritten digits, in a minute or two on two cores."""
    target = device_of(device)
    # Such small batches gain a tenth from a second core, and lose tenfold where another program has that core.
    torch.set_num_threads(1)
    setup = Setup(
        model="lenet-300-100",
        data="digits",
        recipe=dataclasses.replace(recipe_for("lenet-300-100"), batch=64),
        rewind_epochs=2,
        train_epochs=40,
        search_epochs=40,  # 23 steps each: the set is small
        search_batch=64,
    )
    methods = ["joint", "cts", "cts+shuffle", "snip", "magnitude", "random"]
    report(setup, None, methods, [0.95, 0.98, 0.99], seeds_from(seed, 2), out, target, json_file)
    best = out / "tickets" / f"joint-0.99-{seed}.safetensors"
    show(
        [
            "",
            "Try next:",
            f"  {command('info', best)}",
            f"  {command('train', best)} --epochs 40 --sanity shuffle",
            "  sparsecore compare --data fashion-mnist --sparsities 0.98,0.99,0.995",
        ]
    )
