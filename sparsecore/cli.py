"""The command line: `sparsecore demo | search | train | plan | info | compare | analyze`."""

import dataclasses
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save as to_bytes

from . import analyses
from . import data as datasets
from .checkpoints import OtherRunError
from .checkpoints import read as read_checkpoint
from .cli_compare import compare, demo
from .console import command, console, run, show, warnings_at_the_end, write_json
from .describe import covered_of, layers_of, plans_of, provenance_of
from .descriptors import open_closed
from .engine import check_engine
from .experiment import (
    SANITIES,
    apply_sanity,
    check_found,
    data_of,
    find_ticket,
    model_of,
    new_model,
    rewind_point,
    train_on,
)
from .fields import choose
from .interrupts import Stop, goes_on, kept_by_training, kept_in, stopped_by_signals
from .locks import held
from .methods import METHODS
from .metrics_file import lines_of
from .needs import check_memory
from .options import (
    DataDir,
    Device,
    EngineName,
    ImageSize,
    Json,
    PlanCache,
    PlanName,
    RecipeOption,
    Seed,
    TicketData,
    Version,
    device_of,
    recipe_with,
    with_setup,
)
from .paths import check_cache, check_file_name, check_paths, require_room
from .plans import check_plan
from .printable import tell
from .progress import Progress
from .provenance import data_of_ticket, setup_of, tell_other_data, with_data
from .search import Rewinding
from .setups import Setup, check_epochs, unused_options
from .sparsities import check_sparsity
from .telling import of_masks, short_search
from .tickets import Ticket, dense_state
from .training_plan import plan_for
from .writing import put

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find a sparse ticket in a network and train it.",
)
app.add_typer(analyses.app, name="analyze")


@app.callback()
def sparsecore(version: Version = False) -> None:
    """Find a sparse ticket in a network and train it."""


@app.command()
@with_setup
def search(
    setup: Setup,
    data_dir: Path | None,
    out: Annotated[Path, typer.Option(help="The ticket file to write.")],
    method: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(METHODS)}; its own fields as METHOD:KEY=VALUE."),
    ] = "cts",
    sparsity: Annotated[float, typer.Option(help="Fraction of weights removed, in [0, 1).")] = 0.99,
    rounds: Annotated[
        Path | None, typer.Option(help="Keep the networks that rewinding trains in this folder.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Note test accuracy as the search progresses.")
    ] = False,
    engine: EngineName = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Train briefly, search there, write the ticket.  Run again after a kill to go on."""
    target = device_of(device)
    check_engine(engine, target)
    setup.search(method, seed)
    check_sparsity(sparsity)
    own = setup.start_of(method)
    check_file_name("--out", out)
    dense_part, search_part = out.with_name(out.name + ".dense"), out.with_name(out.name + ".part")
    check_paths(
        {"--weights": setup.weights_file, "the search's checkpoint": search_part},
        written={"--json": json_file},
        replaced={"--out": out, "the rewind point's checkpoint": dense_part},
        folders={"--rounds": rounds},
        made={} if rounds is None else {"the rounds": (rounds, "round-*")},
        data=datasets.folder_of(setup.data),
    )
    data = data_of(setup, data_dir)
    unused = [*unused_options(setup, method), *_unused_rounds(setup, method, rounds)]
    if unused:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        warnings.warn(f"not used by {method}: {names}", stacklevel=2)
    check_memory(own, data, target, methods=[method])
    fresh = new_model(own, data, seed)
    require_room(out, fresh.state_dict())
    if own.rewind_epochs:
        check_found(setup, fresh, data, method, sparsity)
    del fresh
    kept = (dense_part, search_part, *([] if rounds is None else [rounds]))
    with held(out), goes_on(kept_in(*kept)), Progress() as progress:
        try:
            start = rewind_point(own, data, seed, target, progress, dense_part, engine)
        except OtherRunError:
            raise ValueError(
                f"{dense_part}: expected the rewind point of this search, got that of an earlier one with other "
                "options or data; remove it, or give another --out"
            ) from None
        ticket, seconds = find_ticket(
            setup, start, data, method, sparsity, seed, target, progress, search_part,
            rounds=rounds, watched=watch, engine=engine,
        )  # fmt: skip
        ticket.save(out)
    if own.rewind_epochs:
        dense_part.unlink(missing_ok=True)
    result = {"ticket": str(out), "method": method, "seconds": seconds}
    console.line(f"{method}: {100 * ticket.sparsity:.3f} % sparse, {seconds:.1f} s of search")
    show(covered_of(ticket))
    if (told := short_search(ticket)) is not None:
        console.line(told)
    named = [] if datasets.folder_of(setup.data) is None else ["--data", setup.data]
    there = [] if data_dir is None else ["--data-dir", str(data_dir)]
    show([f"ticket  {out}", f"next    {command('train', out, *named, *there)}"])
    write_json(json_file, result | {"sparsity": ticket.sparsity, "hash": ticket.hash})


def _unused_rounds(setup: Setup, method: str, rounds: Path | None) -> list[str]:
    return ["rounds"] if rounds and not isinstance(setup.search(method, 0), Rewinding) else []


@app.command()
def train(
    ticket: Annotated[Path, typer.Argument(help="A ticket file.")],
    epochs: Annotated[
        float | None,
        typer.Option(help="After the rewind point; default the ticket's own, 0 if it is finished."),
    ] = None,
    plan: PlanName = "mask",
    cache: PlanCache = None,
    sanity: Annotated[
        str | None, typer.Option(help=f"Train a control instead: {', '.join(SANITIES)}.")
    ] = None,
    data: TicketData = None,
    data_dir: DataDir = None,
    recipe: RecipeOption = None,
    metrics: Annotated[Path | None, typer.Option(help="Append one JSON line an epoch.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Written each epoch; run again to go on from it.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the trained weights, pruned ones zero, here.")
    ] = None,
    image_size: ImageSize = None,
    engine: EngineName = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Train a ticket from its start weights and report test accuracy."""
    target = device_of(device)
    check_engine(engine, target)
    check_plan(plan)
    if sanity is not None:
        choose("sanity", sanity, SANITIES)
    if epochs is not None:
        check_epochs("epochs", epochs)
    loaded = Ticket.load(ticket)
    setup = with_data(setup_of(loaded), data, image_size)
    check_paths(
        {"the ticket": ticket},
        written={"--json": json_file, "--metrics": metrics},
        replaced={"--checkpoint": checkpoint, "--save": save},
        data=datasets.folder_of(setup.data),
    )
    others = {"--json": json_file, "--metrics": metrics, "--checkpoint": checkpoint, "--save": save}
    check_cache(cache, {"the ticket": ticket, **others})
    if metrics is not None:
        lines_of(metrics)  # are there others than those of runs?
    if checkpoint is not None and checkpoint.exists():
        read_checkpoint(checkpoint)  # of this run or not, which training tells
    if epochs is None:
        epochs = 0 if loaded.finished else setup.train_epochs
    chosen = recipe_with(setup.recipe, recipe)
    dataset = data_of_ticket(setup, data, data_dir)
    tell_other_data(loaded, setup, dataset)
    check_memory(setup, dataset, target, recipe=chosen, ticket=loaded)
    if sanity is not None:
        loaded = apply_sanity(loaded, sanity, dataset, seed)
    with held(save), goes_on(kept_by_training(checkpoint)), Progress() as progress:
        model = model_of(loaded, dataset, target)
        for file in (save, checkpoint):
            require_room(file, loaded.weights)
        planned = plan_for(model, plan, dataset, chosen, cache, engine)
        history = train_on(
            planned.model,
            setup,
            dataset,
            epochs,
            recipe=chosen,
            seed=seed,
            metrics=metrics,
            checkpoint=checkpoint,
            progress=progress,
            engine=engine,
        )
    console.print(
        f"{history.accuracy:.2f} % test accuracy at {100 * loaded.sparsity:.3f} % sparsity, "
        f"{history.seconds:.1f} s"
    )
    result = {
        "accuracy": history.accuracy,
        "sparsity": loaded.sparsity,
        "seconds": history.seconds,
        "sanity": sanity,
        "plan": plan,
        "engine": history.engine,
        "epochs": history.epochs,
    }
    with ExitStack() as stack:  # where one cannot be written, the other still is
        stack.callback(write_json, json_file, result)
        if save is not None:
            put(save, to_bytes(dense_state(planned.restored())))


@app.command()
def info(
    ticket: Annotated[Path, typer.Argument(help="A ticket file.")],
    device: Device = "cpu",
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Show a ticket's layers, live rows and columns, and where it comes from; --json has all of it."""
    device_of(device)  # the file alone is looked at; one that is not there is a slip all the same
    check_paths({"the ticket": ticket}, written={"--json": json_file})
    loaded = Ticket.load(ticket)
    table, rows = layers_of(loaded, str(ticket))
    console.print(table)
    console.print(provenance_of(loaded))
    show(covered_of(loaded))
    show([*of_masks(loaded.masks), *filter(None, [short_search(loaded)])])
    console.line(f"mask hash {loaded.hash}")
    write_json(
        json_file,
        {"sparsity": loaded.sparsity, "hash": loaded.hash, "layers": rows, "meta": loaded.meta},
    )


@app.command()
def plan(
    ticket: Annotated[Path, typer.Argument(help="A ticket file.")],
    batch: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
    plan: PlanName = "auto",
    cache: PlanCache = None,
    data: TicketData = None,
    data_dir: DataDir = None,
    recipe: RecipeOption = None,
    image_size: ImageSize = None,
    engine: EngineName = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Show how each layer of a ticket would train fastest here, and why: measured, and remembered."""
    target = device_of(device)
    check_engine(engine, target)
    check_plan(plan)
    loaded = Ticket.load(ticket)
    setup = with_data(setup_of(loaded), data, image_size)
    check_paths({"the ticket": ticket}, written={"--json": json_file})
    check_cache(cache, {"the ticket": ticket, "--json": json_file})
    chosen = recipe_with(setup.recipe, recipe)
    if batch is not None:
        chosen = dataclasses.replace(chosen, batch=batch)
    dataset = data_of_ticket(setup, data, data_dir)
    check_memory(setup, dataset, target, recipe=chosen, ticket=loaded)
    model = model_of(loaded, dataset, target)
    planned = plan_for(model, plan, dataset, chosen, cache, engine)
    taken = min(chosen.batch, len(dataset.train))  # what there is to measure on
    table, lines, rows = plans_of(planned, f"{ticket}, batch {taken}, {target}")
    show([*planned.told.split("\n"), ""])
    console.print(table)
    show(lines)
    write_json(json_file, {"plan": plan, "batch": taken, "layers": rows})


app.command()(compare)
app.command()(demo)


def main(argv: list[str] | None = None) -> int:
    """Runs a command.  Exit code 2 and one line for bad input, 130 and 143 after Ctrl-C and SIGTERM."""
    open_closed()
    try:
        with stopped_by_signals(), warnings_at_the_end():
            return run(app, argv)
    except Stop as stop:  # before a command began, or after its end
        tell(str(stop))
        return stop.code


if __name__ == "__main__":
    sys.exit(main())
