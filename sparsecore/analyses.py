"""`sparsecore analyze ...`: what explains a ticket, as a table, a CSV file and a figure."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from typing_extensions import TypedDict

from . import figures, schema
from .analysed import Case, Results, TicketFile, with_case, with_results
from .compare import Comparison, comparison_kept
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
from .fields import choose
from .gates import GATES, AbstractGate
from .interrupts import goes_on, kept_in
from .layer import weight_key
from .needs import check_memory
from .options import Device, Seed, StartWeights, device_of, listed, numbers, seeds_from, with_setup
from .progress import Progress
from .provenance import with_weights
from .regions import angular_distances, round_paths
from .rounds import load_rounds
from .sanity import CHECKS, table_of
from .sparsities import check_sparsity
from .tickets import Ticket, TicketError


class _Epoch(TypedDict):
    epoch: float


class _Record(_Epoch, total=False):
    sparsity: float | None
    accuracy: float | None
    hard_accuracy: float | None
    layers: dict[str, float | None]


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
    try:
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
    case.wrote(
        {"barrier": barrier(found), "stable": is_stable(found), "path": found.rows},
        figures.write_csv(case.file("path.csv"), found.rows),
        figures.draw_paths(case.file("path.png"), {f"{first.stem} - {second.stem}": found}),
    )


def _alike(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@app.command("instability")
@with_case
def instability_(
    case: Case,
    points: Points = 30,
    seed: Seed = 0,
) -> None:
    """Train a ticket twice with different data orders: do the runs stay linearly connected?"""
    setup = case.setup
    name = f"instability-{case.ticket.hash[:12]}-{seed}"
    with goes_on(kept_in(case.out / name)), Progress() as progress:
        found = instability(
            case.model, replace(setup.recipe, epochs=round(setup.total_epochs)), case.batches,
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
    recipe = replace(setup.recipe, epochs=round(setup.total_epochs))
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
    barriers = {s: barrier(p) for s, p in zip(sparsities[1:], paths, strict=True)}
    table = Table(title=f"{len(rounds)} rounds of {folder}")
    for column in ("sparsity", "accuracy", "barrier from the round before", "angle"):
        table.add_column(column, justify="right")
    rows = []
    for i, (r, s) in enumerate(zip(rounds, sparsities, strict=True)):
        row = {
            "round": i,
            "sparsity": s,
            "accuracy": r.accuracy,
            "barrier": barriers.get(s),
            "angle": float(angles[i - 1, i]) if i else None,
        }
        rows.append(row)
        shown = (row["accuracy"], row["barrier"], row["angle"])
        table.add_row(f"{100 * s:.2f} %", *("" if v is None else f"{v:.2f}" for v in shown))
    console.print(table)
    case.wrote(
        {"rows": rows, "angles": angles.tolist()},
        figures.write_csv(case.file("rounds.csv"), rows),
        figures.draw_barriers(case.file("barriers.png"), {folder.name: barriers}),
        figures.draw_angles(case.file("angles.png"), angles, sparsities),
    )


@app.command()
@with_case
def sanity(
    case: Case,
    checks: Annotated[str, typer.Option(help="With commas.")] = ",".join(CHECKS),
    seeds: Annotated[int, typer.Option(help="How many pairs, counted up from --seed.")] = 3,
    weights: StartWeights = None,
    seed: Seed = 0,
) -> None:
    """Search as the ticket was searched, with several seeds, and compare with controls: one-sided paired tests."""
    method, sparsity = case.ticket.meta.get("search"), case.ticket.meta.get("sparsity")
    if not (isinstance(method, str) and isinstance(sparsity, float)):
        raise TicketError("the ticket's provenance does not name its search; find it again")
    chosen = [choose("checks", c, CHECKS) for c in listed(checks, "checks")]
    wanted = seeds_from(seed, seeds)
    if not chosen:
        raise ValueError(f"checks: expected some of {', '.join(CHECKS)}, got none")
    setup = with_weights(case.setup, weights)
    case.check({"the ticket": case.path, "--weights": setup.weights_file})
    comparison = Comparison(case.file("sanity"), setup)
    with goes_on(comparison_kept(case.out / "sanity")), Progress() as progress:
        comparison.run(
            case.dataset, [method, *(f"{method}+{c}" for c in chosen)], [sparsity],
            wanted, case.device, progress,
        )  # fmt: skip
    found = [v for v in comparison.verdicts(method, sparsity) if v.check in chosen]
    console.print(table_of(found, f"{method} at {100 * sparsity:g} % sparsity"))
    rows = [
        {"check": v.check, "loss": v.loss, "spread": v.spread, "p": v.p, "seeds": v.seeds, "verdict": v.text}
        for v in found
    ]  # fmt: skip
    clean = [{k: None if v != v else v for k, v in row.items()} for row in rows]  # JSON has no NaN
    case.wrote({"rows": clean}, figures.write_csv(case.file("sanity.csv"), clean))


@app.command()
@with_results
def progress(results: Results, ticket: TicketFile) -> None:
    """Sparsity, and accuracy if the search was run with --watch, by epoch or round; by layer in the CSV."""
    results.check({"the ticket": ticket})
    records = _records(Ticket.load(ticket), ticket)
    rows = [
        {k: v for k, v in r.items() if k != "layers"} | {f"sparsity {k}": v for k, v in r.get("layers", {}).items()}
        for r in records
    ]  # fmt: skip
    results.wrote(
        {"rows": rows},
        figures.write_csv(results.file("progress.csv"), rows),
        figures.draw_search(results.file("progress.png"), records, ticket.stem),
    )


def _records(ticket: Ticket, path: Path) -> list[dict[str, Any]]:
    """What a search noted as it went on.  Errors: TicketError for other facts, or none."""
    records = ticket.meta.get("progress")
    if not (isinstance(records, list) and records):
        raise TicketError(
            f"{path}: expected a ticket of a search that goes by epochs or rounds; this one notes nothing"
        )
    what = f"{path}: progress"
    schema.facts(records, list[_Record], what)
    for record in records:
        others = {k: v for k, v in record.items() if k != "layers"}
        schema.facts(others, dict[str, float | bool | str | None], what)
    return records


@app.command()
@with_results
def layers(
    results: Results,
    tickets: Annotated[list[Path], typer.Argument(help="Ticket files.")],
) -> None:
    """The sparsity of each layer, tickets side by side."""
    results.check({f"the ticket {path}": path for path in tickets})
    found = {path.stem: Ticket.load(path).layer_sparsities() for path in tickets}
    rows = [
        {"ticket": name, "layer": layer, "sparsity": sparsity}
        for name, by_layer in found.items()
        for layer, sparsity in by_layer.items()
    ]
    results.wrote(
        {"rows": rows},
        figures.write_csv(results.file("layers.csv"), rows),
        figures.draw_layers(results.file("layers.png"), found),
    )


@app.command()
@with_results
def gates(results: Results, ticket: TicketFile) -> None:
    """A histogram of where each layer's gates ended, and how many are undecided."""
    results.check({"the ticket": ticket})
    loaded = Ticket.load(ticket)
    gate = _gate_of(loaded, ticket)
    assert loaded.scores is not None
    values = {name: gate.mean(score) for name, score in loaded.scores.items()}
    rows = [
        {
            "layer": name,
            "gates": v.numel(),
            "closed": float((v <= 0.05).float().mean()),
            "undecided": float(((v > 0.05) & (v < 0.95)).float().mean()),
            "open": float((v >= 0.95).float().mean()),
        }
        for name, v in values.items()
    ]
    results.wrote(
        {"rows": rows},
        figures.write_csv(results.file("gates.csv"), rows),
        figures.draw_gates(results.file("gates.png"), values, title=ticket.stem),
    )


def _gate_of(ticket: Ticket, path: Path) -> AbstractGate:
    """The gate a ticket was searched with, from its name and numbers in the provenance."""
    text = str(ticket.meta.get("gate", ""))
    name, _, rest = text.partition("(")
    kind = {k.__name__: k for k in GATES.values()}.get(name)
    if kind is None or ticket.scores is None:
        raise TicketError(
            f"{path}: expected a ticket of a search by gates, got one of {ticket.meta.get('method')}"
        )
    pairs = (part.partition("=") for part in rest.rstrip(")").split(",") if part)
    try:
        return kind(**{key.strip(): float(value) for key, _, value in pairs})
    except (TypeError, ValueError) as error:
        raise TicketError(
            f"{path}: expected a gate's numbers, got {text[:80]!r} ({error})"
        ) from None


@app.command()
@with_results
@with_setup
def width(
    results: Results,
    setup: Setup,
    data_dir: Path | None,
    method: Annotated[str, typer.Option(help="As `search` takes it.")] = "strong",
    sparsity: Annotated[float, typer.Option(help="Fraction of weights removed.")] = 0.5,
    widths: Annotated[
        str, typer.Option(help="Factors on the hidden sizes, with commas.")
    ] = "0.2,0.5,1",
    seeds: Annotated[int, typer.Option(help="How many, counted up from --seed.")] = 1,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Are there still tickets when the base network is smaller?  For models with the option `width`."""
    target, factors = device_of(device), numbers(widths, "widths")
    check_sparsity(sparsity)
    setup.search(method, seed)
    wanted = seeds_from(seed, seeds)
    base = setup.model_options
    sized = {f: replace(setup, model_options=base | {"width": f}) for f in factors}
    results.check({"--weights": setup.weights_file}, setup.data)
    data = data_of(setup, data_dir)
    for own in sized.values():  # refuses a width that is none
        check_memory(own, data, target, methods=[method])
    found: dict[float, list[float]] = {}
    rows = []
    kept = (comparison_kept(results.out / f"width-{factor:g}") for factor in factors)
    with goes_on(lambda: min((advice() for advice in kept), key=len)), Progress() as bars:
        for factor, own in sized.items():
            comparison = Comparison(results.file(f"width-{factor:g}"), own)
            comparison.run(data, [method], [sparsity], wanted, target, bars)
            by_seed = comparison.accuracies(method, sparsity)
            found[factor] = list(by_seed.values())
            rows += [{"width": factor, "seed": s, "accuracy": a} for s, a in by_seed.items()]
    for factor, accuracies in found.items():
        console.print(f"width {factor:g}: {sum(accuracies) / len(accuracies):.2f} %")
    results.wrote(
        {"rows": rows},
        figures.write_csv(results.file("width.csv"), rows),
        figures.draw_widths(results.file("width.png"), {f"{method}, {100 * sparsity:g} %": found}),
    )
