"""What the commands share: option types, and the values behind their texts."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import typer

from .experiment import Setup, choose
from .recipes import recipe_for
from .training import Recipe

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights, data order and gate noise.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this JSON file.")]
ModelName = Annotated[str, typer.Option(help="A built-in model or torchvision:NAME.")]
DataName = Annotated[
    str, typer.Option(help="digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Where the data lies; without it, it is downloaded.")
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="KEY=VALUE for the model, e.g. shortcut=3x3."),
]
RecipeOption = Annotated[
    list[str] | None,
    typer.Option("--recipe", help="KEY=VALUE over the model's training recipe, e.g. lr=0.05."),
]
Objective = Annotated[str, typer.Option(help="What CTS minimises.")]
Control = Annotated[str, typer.Option(help="gradbalance, lagrangian or fixed.")]
GranularityName = Annotated[
    str, typer.Option("--granularity", help="weight, block:HxW, vector:V, channel or N:M.")
]
RewindEpochs = Annotated[int, typer.Option(help="Dense epochs before the search.")]
SearchEpochs = Annotated[int, typer.Option(help="Passes over the data in a CTS search.")]
SearchBatch = Annotated[int, typer.Option(help="Batch of a CTS search.")]
SearchLr = Annotated[float, typer.Option(help="Of the gates' Adam; 0.4 for ImageNet.")]
GainLr = Annotated[
    float,
    typer.Option(help="Of a gain per layer in a CTS search; 0, as in the paper: none."),
]
Tau = Annotated[float, typer.Option(help="The gates' temperature; 0.6667 in the paper.")]
SearchDtype = Annotated[
    str, typer.Option(help="fp32, bf16 or fp16: in which a CTS search computes.")
]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="Convolutions of a CTS search in that layout.")
]
LayersGlob = Annotated[
    str | None, typer.Option("--layers", help="Glob of the layers to prune; default all.")
]
PlanName = Annotated[
    str,
    typer.Option(
        "--plan",
        help="auto (the fastest), mask, state, csr, compact, block, block:HxW, panel, panel:V or semi.",
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
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device: {name} asked for, this machine has {count} usable GPUs; use --device cpu"
        )
    return device


def parse_options(pairs: list[str] | None, what: str) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it parses, else a string."""
    options = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{what}: expected KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(text)
        except json.JSONDecodeError:
            options[key] = text
    return options


def recipe_with(recipe: Recipe, pairs: list[str] | None) -> Recipe:
    """The recipe with --recipe's fields replaced."""
    options = parse_options(pairs, "recipe")
    hints = get_type_hints(type(recipe))
    for key, value in options.items():
        kind = hints[choose("recipe field", key, sorted(hints))]
        if not _fits(value, kind):
            name = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"recipe {key}: expected {name}, got {value!r}")
    if "milestones" in options:
        options["milestones"] = tuple(options["milestones"])
    return dataclasses.replace(recipe, **options)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type; a tuple's is a list of numbers."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(v, float) for v in value)
    if get_args(kind):
        return any(_fits(value, k) for k in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def setup_from(
    model: str, recipe: list[str] | None, model_option: list[str] | None, **rest: Any
) -> Setup:
    """The setup that options describe; `rest` are fields of Setup as they are."""
    return Setup(
        model=model,
        recipe=recipe_with(recipe_for(model), recipe),
        model_options=parse_options(model_option, "model option"),
        **rest,
    )


def numbers(text: str, what: str) -> list[float]:
    """Numbers with commas between."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{what}: expected numbers with commas between, got {text!r}") from None
