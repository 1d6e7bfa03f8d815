"""`sparsecore analyze ...`: what explains a ticket, as a table, a CSV file and a figure."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import figures, schema
from .analysed import Case, Results, labels_of, with_case, with_results
from .connectivity import (
    LinearPath,
    barrier,
    instability,
    is_stable,
    path_errors,
    rewind_by_instability,
)
from .console import console
from .experiment import Setup, batches_of_setup, data_of, start_model
from .interrupts import goes_on, kept_in, signals_later
from .layer import weight_key
from .needs import check_memory
from .options import Device, Seed, device_of, numbers, with_setup
from .plain import require_plain
from .progress import Progress
from .recipe import Recipe
from .regions import angular_distances, round_paths
from .rounds import load_rounds
from .ticket_analyses import gates, layers, progress, sanity, width
from .tickets import Ticket

app = typer.Typer(no_args_is_help=True, help="Explain tickets: figures and CSV files.")

Points = Annotated[
    int, typer.Option(help="Points on a path, its ends included.", min=2, max=10_000)
]


def _told(path: LinearPath) -> str:
    kind = "stable" if is_stable(path) else "unstable"
    return (
        f"error {path.errors[0]:.2f} % and {path.errors[-1]:.2f} % at the ends, barrier "
        f"{barrier(path):.2f} points: {kind}"
    )


def _run_of(ticket: Ticket, path: Path) -> dict[str, torch.Tensor]:
    """Weights that the ticket was trained to.  Errors: ValueError for others."""
    require_plain(path)
    try:
        with signals_later():
            state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected weights that `train --save` wrote, got {error}"
        ) from None
    for key, start in ticket.weights.items():
        if key not in state or state[key].shape != start.shape:
            found = tuple(state[key].shape) if key in state else "none"
            raise ValueError(
                f"{path}: expected weights that `train --save` wrote of this ticket, {key} of shape "
                f"{tuple(start.shape)}, got {found}"
            )
        schema.castable(state[key], start, f"{path}: {key}")
    for name, mask in ticket.masks.items():
        if bool(state[weight_key(name, state)][~mask].any()):
            raise ValueError(
                f"{path}: expected a run of this ticket, got weights where it has none in {name}; give the ticket that "
                "it was trained from"
            )
    return state


@app.command()
@with_case
def path(
    case: Case,
    first: Annotated[Path, typer.Argument(help="Weights of one run, from `train --save`.")],
    second: Annotated[Path, typer.Argument(help="Weights of the other.")],
    points: Points = 30,
) -> None:
    """Test error on the straight line between two trained runs of a ticket (linear mode connectivity)."""
    case.check({"the ticket": case.path, "the first weights": first, "the second weights": second})
    ends = [_run_of(case.ticket, file) for file in (first, second)]
    with Progress() as progress:
        found = path_errors(
            case.model, ends[0], ends[1], case.test, points=points,
            train_batches=case.batches(0), progress=progress,
        )  # fmt: skip
    console.print(_told(found))
    labels = labels_of([first, second])
    case.wrote(
        {"barrier": barrier(found), "stable": is_stable(found), "path": found.rows},
        figures.write_csv(case.file("path.csv"), found.rows),
        figures.draw_paths(case.file("path.png"), {f"{labels[first]} - {labels[second]}": found}),
    )


def _alike(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _to_the_end(setup: Setup) -> Recipe:
    """The recipe of a training in whole epochs.  Errors: ValueError for none, or an end before the rewind point."""
    epochs = round(setup.total_epochs)
    if epochs < max(1, setup.rewind_epochs):
        raise ValueError(
            f"epochs: expected a training that ends with a whole epoch after the rewind point, got "
            f"{setup.rewind_epochs:g} rewind epochs and {setup.train_epochs:g} after them; take more --epochs"
        )
    return replace(setup.recipe, epochs=epochs)


@app.command("instability")
@with_case
def instability_(
    case: Case,
    points: Points = 30,
    seed: Seed = 0,
) -> None:
    """Train a ticket twice with different data orders: do the runs stay linearly connected?"""
    setup, recipe = case.setup, _to_the_end(case.setup)
    if recipe.epochs == setup.rewind_epochs:
        warnings.warn(
            f"instability: no step between the rewind point and the end, epoch {recipe.epochs}, so both runs are one",
            stacklevel=2,
        )
    name = f"instability-{case.ticket.hash[:12]}-{seed}"
    with goes_on(kept_in(case.out / name)), Progress() as progress:
        found = instability(
            case.model, recipe, case.batches,
            case.test, seeds=(seed + 1, seed + 2), start_epoch=setup.rewind_epochs, points=points,
            folder=case.file(name), progress=progress,
        ).path  # fmt: skip
    console.print(_told(found))
    case.wrote(
        {"instability": barrier(found), "stable": is_stable(found), "path": found.rows},
        figures.write_csv(case.file("instability.csv"), found.rows),
        figures.draw_paths(case.file("instability.png"), {case.path.stem: found}),
    )


@app.command()
@with_results
@with_setup
def rewind(
    results: Results,
    setup: Setup,
    data_dir: Path | None,
    candidates: Annotated[
        str, typer.Option(help="Rewind epochs with commas, fractions too.")
    ] = "0,0.5,1,2,4",
    points: Points = 30,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Instability of dense training from several rewind points: the first stable one is where to rewind to."""
    target, epochs = device_of(device), numbers(candidates, "candidates")
    recipe = _to_the_end(setup)
    if not all(0 <= epoch <= recipe.epochs for epoch in epochs):
        raise ValueError(
            f"candidates: expected rewind epochs of 0 to {recipe.epochs}, the end, got {candidates}"
        )
    results.check({"--weights": setup.weights_file}, setup.data)
    data = data_of(setup, data_dir)
    check_memory(setup, data, target)
    with goes_on(kept_in(results.out / f"rewind-{seed}")), Progress() as progress:
        scan = rewind_by_instability(
            start_model(setup, data, seed).to(target), recipe,
            lambda s: batches_of_setup(setup, data, recipe, s, target)[0],
            batches_of_setup(setup, data, recipe, 0, target)[1], epochs, seed=seed,
            seeds=(seed + 1, seed + 2), points=points, folder=results.file(f"rewind-{seed}"), progress=progress,
        )  # fmt: skip
    rows = [{"rewind_epoch": e, "instability": v} for e, v in scan.instabilities.items()]
    for row in rows:
        console.print(f"rewind epoch {row['rewind_epoch']:g}: {row['instability']:.2f} points")
    first = scan.earliest
    console.print(
        "no candidate is stable" if first is None else f"first stable rewind epoch: {first:g}"
    )
    results.wrote(
        {"rows": rows, "earliest": first},
        figures.write_csv(results.file("rewind.csv"), rows),
        figures.draw_instabilities(results.file("rewind.png"), {setup.model: scan.instabilities}),
    )


@app.command("rounds")
@with_case
def rounds_(
    case: Case,
    folder: Annotated[Path, typer.Argument(help="What `search --rounds` has kept.")],
    points: Points = 20,
) -> None:
    """Do the rounds of rewinding end in one region?  Barriers between successive ones, angles between all."""
    case.check({"the ticket": case.path, "the rounds": folder})
    rounds = load_rounds(folder)
    own = case.ticket.weights
    ends = [
        state for r in rounds for state in (r.start, r.trained)
    ]  # learning rates are rewound to the latter
    if not any(_alike(own, state) for state in ends):
        raise ValueError(
            f"{folder}: expected the rounds that led to this ticket, got those of other weights; give the ticket "
            "and the folder of one search"
        )
    sparsities = [1 - r.density for r in rounds]
    name = f"rounds-{rounds[0].run[:12]}"
    with goes_on(kept_in(case.out / name)), Progress() as progress:
        paths = round_paths(
            case.model, rounds, case.test, points=points, train_batches=case.batches(0),
            folder=case.file(name), progress=progress,
        )  # fmt: skip
    angles = angular_distances(rounds)
    barriers = [barrier(p) for p in paths]
    table = Table(title=f"{len(rounds)} rounds of {folder}")
    for column in ("sparsity", "accuracy", "barrier from the round before", "angle"):
        table.add_column(column, justify="right")
    rows = []
    for i, (r, s) in enumerate(zip(rounds, sparsities, strict=True)):
        row = {
            "round": i,
            "sparsity": s,
            "accuracy": r.accuracy,
            "barrier": barriers[i - 1] if i else None,
            "angle": float(angles[i - 1, i]) if i else None,
        }
        rows.append(row)
        shown = (row["accuracy"], row["barrier"], row["angle"])
        table.add_row(f"{100 * s:.2f} %", *("" if v is None else f"{v:.2f}" for v in shown))
    console.print(table)
    case.wrote(
        {"rows": rows, "angles": angles.tolist()},
        figures.write_csv(case.file("rounds.csv"), rows),
        figures.draw_barriers(
            case.file("barriers.png"),
            {folder.name: dict(zip(sparsities[1:], barriers, strict=True))},
        ),
        figures.draw_angles(case.file("angles.png"), angles, sparsities),
    )


for command in (sanity, progress, layers, gates, width):
    app.command()(command)
