"""What the commands share: option types, and the values behind their texts."""

import functools
import inspect
import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .engine import ENGINES
from .experiment import Setup
from .fields import pairs, replaced
from .objectives import OBJECTIVES
from .recipe import Recipe
from .recipes import PRESETS, recipe_for


def _told_version(asked: bool) -> None:
    if asked:
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "none"
        typer.echo(
            f"sparsecore {version('sparsecore-engine')}, torch {torch.__version__}, triton {triton}"
        )
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_told_version, is_eager=True, help="Show versions and end."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
SEEDS = (-(2**63), 2**63 - 1)  # what torch.Generator takes, and a gate's noise
_MOST_SEEDS = 10_000
_MOST_LISTED = 1_000
Seed = Annotated[
    int,
    typer.Option(
        help="Of the initial weights, data order and gate noise.", min=SEEDS[0], max=SEEDS[1]
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this JSON file.")]
ModelName = Annotated[str, typer.Option(help="A built-in model or torchvision:NAME.")]
DataName = Annotated[
    str, typer.Option(help="digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where the data lies; without it, it is downloaded.")
]
TicketData = Annotated[
    str | None,
    typer.Option(
        help="As search takes it; default: what the ticket names, if it lies in --data-dir or the default folder."
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="KEY=VALUE for the model, e.g. shortcut=3x3."),
]
RecipeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe", help="KEY=VALUE over the model's training recipe, e.g. lr=0.05; or stable."
    ),
]
Objective = Annotated[
    str | None, typer.Option(help=f"What a search by gates minimises: {', '.join(OBJECTIVES)}.")
]
Control = Annotated[
    str | None,
    typer.Option(
        help="gradbalance, band (=PERCENT), lagrangian, fixed=LAMBDA or fixed (looks for it): how sparsity pulls."
    ),
]
GranularityName = Annotated[
    str, typer.Option("--granularity", help="weight, block:HxW, vector:V, channel or N:M.")
]
RewindEpochs = Annotated[
    float, typer.Option(help="Dense epochs before the search, fractions too: where tickets start.")
]
TrainEpochs = Annotated[
    float, typer.Option("--epochs", help="Epochs of training after the rewind point.")
]
SearchEpochs = Annotated[
    int | None, typer.Option(help="Passes over the data in a search by gates.")
]
SearchBatch = Annotated[int, typer.Option(help="Batch of a search by gates or scores.")]
SearchLr = Annotated[float | None, typer.Option(help="Of the gates' Adam; 0.4 for ImageNet.")]
GainLr = Annotated[
    float | None,
    typer.Option(help="Of a gain per layer in a search by gates; 0, as in the papers: none."),
]
Tau = Annotated[float | None, typer.Option(help="Of Concrete gates; 0.6667 in the paper.")]
SearchDtype = Annotated[
    str, typer.Option(help="fp32, bf16 or fp16: in which a search by gates computes.")
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option(
        "--channels-last/--no-channels-last",
        help="Memory format of such a search; default: what measures faster.",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help=f"How steps are launched: {', '.join(ENGINES)}; auto tries and takes the fastest.",
    ),
]
TrainSamples = Annotated[
    int | None, typer.Option(help="Use so many of the training data, for reduced runs.")
]
LayersGlobs = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="Glob of layers to prune, '!GLOB' of layers to leave dense; repeatable; default all.",
    ),
]
StartWeights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Start from a state_dict: a file (safetensors or torch.save), or DEFAULT, torchvision's trained weights.",
    ),
]
DropLast = Annotated[
    bool, typer.Option("--drop-last", help="Leave out a last, smaller batch of training.")
]
PlanName = Annotated[
    str,
    typer.Option(
        "--plan",
        help="auto (the fastest), mask, state, csr, compact, block or block:HxW.",
    ),
]
PlanCache = Annotated[
    Path | None, typer.Option("--plan-cache", help="File of remembered measurements.")
]
ImageSize = Annotated[int | None, typer.Option(help="Side of folder images, in pixels.")]


def device_of(name: str) -> torch.device:
    """The device behind --device; ValueError if this machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device: {name} asked for, this machine has {count} usable GPUs; use --device cpu"
        )
    return device


def recipe_with(recipe: Recipe, texts: list[str] | None) -> Recipe:
    """The recipe as --recipe changes it: `stable`, or fields as KEY=VALUE."""
    presets = [text for text in texts or [] if text in PRESETS]
    for preset in presets:
        recipe = PRESETS[preset](recipe)
    return replaced(recipe, pairs([t for t in texts or [] if t not in presets], "recipe"), "recipe")


def setup_of_options(
    model: ModelName = "lenet-300-100",
    data: DataName = "fashion-mnist",
    data_dir: DataDir = None,
    objective: Objective = None,
    control: Control = None,
    granularity: GranularityName = "weight",
    rewind_epochs: RewindEpochs = 2,
    epochs: TrainEpochs = 12,
    search_epochs: SearchEpochs = None,
    search_batch: SearchBatch = 512,
    search_lr: SearchLr = None,
    gain_lr: GainLr = None,
    tau: Tau = None,
    search_dtype: SearchDtype = "fp32",
    channels_last: ChannelsLast = None,
    train_samples: TrainSamples = None,
    layers: LayersGlobs = None,
    weights: StartWeights = None,
    drop_last: DropLast = False,
    model_option: ModelOption = None,
    recipe: RecipeOption = None,
    image_size: ImageSize = None,
) -> tuple[Setup, Path | None]:
    """The setup that options describe, and where its data lies."""
    setup = Setup(
        model=model,
        data=data,
        recipe=recipe_with(recipe_for(model), recipe),
        model_options=pairs(model_option, "model option"),
        rewind_epochs=rewind_epochs,
        train_epochs=epochs,
        search_epochs=search_epochs,
        search_batch=search_batch,
        search_lr=search_lr,
        gain_lr=gain_lr,
        tau=tau,
        search_dtype=search_dtype,
        channels_last=channels_last,
        objective=objective,
        control=control,
        granularity=granularity,
        train_samples=train_samples,
        sparse_layers=layers[0] if layers and len(layers) == 1 else tuple(layers or ()) or None,
        weights=weights,
        drop_last=drop_last,
        image_size=image_size,
    )
    return setup, data_dir


def given(provider: Callable[..., Any], *names: str) -> Callable[[Callable], Callable[..., None]]:
    """A decorator for commands: all options of `provider` become the command's, which gets what `provider`
    makes of them as its arguments `names` instead."""
    shared = inspect.signature(provider).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        # Typer reads a command's options from its signature.
        kept = {name: p for name, p in own.items() if name not in names}
        parameters = [p.replace(kind=keyword) for p in (shared | kept).values()]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = provider(**{name: values.pop(name) for name in shared})
            made = made if len(names) > 1 else (made,)
            command(**dict(zip(names, made, strict=True)), **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


with_setup = given(setup_of_options, "setup", "data_dir")


def listed(text: str, what: str) -> list[str]:
    """Texts with commas between, without blanks and empty ones.  Errors: ValueError for more than 1,000, which nobody
    has the time for."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if len(found) > _MOST_LISTED:
        raise ValueError(f"{what}: expected at most {_MOST_LISTED:,}, got {len(found):,}")
    return found


def numbers(text: str, what: str) -> list[float]:
    """Finite numbers with commas between, at least one and at most 1,000.  Errors: ValueError otherwise."""
    parts = listed(text, what)
    try:
        found = [float(part) for part in parts]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"{what}: expected numbers with commas between, got {text!r}")
    return found


def seeds_from(seed: int, count: int) -> range:
    """So many seeds, counted up.  Errors: ValueError for none, too many, or one that is out of range."""
    most = min(_MOST_SEEDS, SEEDS[1] - seed + 1)
    if not 1 <= count <= most:
        raise ValueError(f"seeds: expected 1 to {most:,} from seed {seed} on, got {count}")
    return range(seed, seed + count)
