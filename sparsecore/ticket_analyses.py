"""What a ticket itself says, and its method again: the commands of `sparsecore analyze` that train no path."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typing_extensions import TypedDict

from . import figures, schema
from .analysed import Case, Results, TicketFile, labels_of, with_case, with_results
from .cells import short
from .compare import Comparison, comparison_kept
from .console import console
from .experiment import Setup, data_of
from .fields import choose
from .gates import GATES, AbstractGate
from .interrupts import goes_on
from .needs import check_memory
from .options import Device, Seed, StartWeights, device_of, listed, numbers, seeds_from, with_setup
from .progress import Progress
from .provenance import with_weights
from .sanity import CHECKS, table_of
from .sparsities import check_sparsity
from .tickets import Ticket, TicketError

_MOST_RECORDS = 100_000


class _Epoch(TypedDict):
    epoch: float


class _Record(_Epoch, total=False):
    sparsity: float | None
    accuracy: float | None
    hard_accuracy: float | None
    layers: dict[str, float | None]


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
    if len(records) > _MOST_RECORDS:
        raise TicketError(
            f"{path}: expected at most {_MOST_RECORDS:,} records of a search's progress, got {len(records):,}"
        )
    what = f"{path}: progress"
    schema.facts(records, list[_Record], what)
    for record in records:
        others = {k: v for k, v in record.items() if k != "layers"}
        schema.facts(others, dict[str, float | bool | str | None], what)
    return records


@with_results
def layers(
    results: Results,
    tickets: Annotated[list[Path], typer.Argument(help="Ticket files.")],
) -> None:
    """The sparsity of each layer, tickets side by side."""
    results.check({f"the ticket {path}": path for path in tickets})
    files = {label: path for path, label in labels_of(tickets).items()}
    found = {label: Ticket.load(path).layer_sparsities() for label, path in files.items()}
    rows = [
        {"ticket": name, "layer": layer, "sparsity": sparsity}
        for name, by_layer in found.items()
        for layer, sparsity in by_layer.items()
    ]
    picture = figures.draw_layers(results.file("layers.png"), found)  # or neither is written
    results.wrote({"rows": rows}, figures.write_csv(results.file("layers.csv"), rows), picture)


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
    picture = figures.draw_gates(results.file("gates.png"), values, title=ticket.stem)
    results.wrote({"rows": rows}, figures.write_csv(results.file("gates.csv"), rows), picture)


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
    kept = (comparison_kept(results.out / f"width-{short(factor)}") for factor in factors)
    with goes_on(lambda: min((advice() for advice in kept), key=len)), Progress() as bars:
        for factor, own in sized.items():
            comparison = Comparison(results.file(f"width-{short(factor)}"), own)
            comparison.run(data, [method], [sparsity], wanted, target, bars)
            by_seed = comparison.accuracies(method, sparsity)
            found[factor] = list(by_seed.values())
            rows += [{"width": factor, "seed": s, "accuracy": a} for s, a in by_seed.items()]
    for factor, accuracies in found.items():
        console.print(f"width {short(factor)}: {sum(accuracies) / len(accuracies):.2f} %")
    results.wrote(
        {"rows": rows},
        figures.write_csv(results.file("width.csv"), rows),
        figures.draw_widths(results.file("width.png"), {f"{method}, {100 * sparsity:g} %": found}),
    )
