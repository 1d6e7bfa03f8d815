"""Models by name, each with its default training recipe."""

import copy
import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import torchvision_models
from .fields import held_as_float32
from .memory import free_bytes, require_bytes
from .models import BUILDERS
from .outline import MOST_MODULES, SMALLER, Outline, bounded, measured, sketched
from .process import seeded
from .recipe import Recipe

_CIFAR = Recipe(
    lr=0.1, weight_decay=1e-3, batch=512, epochs=160, milestones=(0.5, 0.75)
)  # arXiv 2512.07142

RECIPES: dict[str, Recipe] = {
    # Maene, Li & Moens 2021 (arXiv 2106.06955) for the optimiser and its rate.
    "lenet-300-100": Recipe(optimizer="adam", lr=1.2e-3, batch=128, epochs=14, milestones=(0.7,)),
    "conv-4": Recipe(optimizer="sgd", lr=0.01, batch=128, epochs=75, schedule="cosine"),
    "resnet-20": _CIFAR,
    "resnet-32": _CIFAR,
    "resnet-56": _CIFAR,
    "vgg-16-bn": _CIFAR,
    "vit-small": Recipe(
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        batch=256,
        epochs=100,
        schedule="cosine",
        warmup_epochs=5,
        label_smoothing=0.1,
    ),
}
# By the kind of an option's default: the kinds that it may have, in JSON's words.
_KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a text"),
}
_MOST_NUMBERS = 1_000  # of one option: builders make a layer of each
_TORCHVISION = Recipe(lr=0.1, weight_decay=1e-4, batch=256, epochs=90, milestones=(1 / 3, 2 / 3))


def model_names() -> list[str]:
    """What `build` accepts; any classification model of torchvision counts as well."""
    return [*BUILDERS, "torchvision:NAME"]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Errors: ValueError for an option of no such name, or one that the model takes from elsewhere: its images, say."""
    builder = _builder(name)
    taken = torchvision_models.TAKEN if builder not in BUILDERS.values() else {}
    known = [
        p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    for key in options:
        if key in taken:
            raise ValueError(f"model option: {name} expected no {key}, {taken[key]}")
        if not key.isidentifier() or key == "seed" or (not taken and key not in known):
            raise ValueError(
                f"model option: {name} expected options that it takes, {', '.join(known) or 'as torchvision has them'},"
                f" got {key!r}"
            )
        _check_numbers(name, key, options[key], torchvision=bool(taken))


def _count(value: Any) -> int:
    """Of what a list holds, in lists too."""
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _check_numbers(name: str, key: str, value: Any, torchvision: bool) -> None:
    numbers = value if isinstance(value, list) else [value]
    if (count := _count(value)) > _MOST_NUMBERS:
        raise ValueError(
            f"model option {key} of {name}: expected at most {_MOST_NUMBERS:,} values, got {count:,}"
        )
    for number in numbers:
        if not isinstance(number, int | float):
            continue
        if not held_as_float32(number):
            raise ValueError(
                f"model option {key} of {name}: expected a number that float32 holds, got {number}"
            )
        least = torchvision_models.LEAST.get(key, 0) if torchvision else -math.inf
        if number < least:
            raise ValueError(
                f"model option {key} of {name}: expected at least {least:g}, got {number}"
            )


def build(
    name: str, shape: tuple[int, int, int], classes: int, /, *, seed: int = 0, **options: Any
) -> nn.Module:
    """A freshly initialised dense model for images [C, H, W]; the global generator is left alone.

    Errors: ValueError for an unknown name, listing the valid ones, images or options that the model does not take, and
    more weights than there is memory for, before any is allocated.
    """
    known = outline_of(name, shape, classes, options)
    with seeded(seed, [torch.get_default_device()]):
        try:
            with bounded(modules=MOST_MODULES, memory=free_bytes()):
                model = _builder(name)(shape, classes, **options)
        except ValueError:
            raise
        except Exception as error:  # builders trust their arguments: whatever they trip over is one
            raise ValueError(f"{name}: expected {_tripped(error, options, shape)}") from None
    if known is None:
        _check_kinds(name, model, options)
        _measured(name, copy.deepcopy(model).to("meta"), shape, options)
    return model


def outline_of(
    name: str, shape: tuple[int, int, int], classes: int, options: Mapping[str, Any]
) -> Outline | None:
    """What `build` would make, in bytes; None where only building it tells.  Errors: as `build`."""
    check_options(name, options)
    try:
        text = json.dumps(options, sort_keys=True)
    except TypeError:  # a function, say
        text = ""
    if text and json.loads(text) == options:
        found = _remembered(name, tuple(shape), classes, text)
    else:
        found = _outlined(name, shape, classes, options)
    if found is not None:
        require_bytes(name, found.weights, SMALLER, of="in its weights")
    return found


@functools.lru_cache(maxsize=32)  # each command asks several times, a comparison in every cell
def _remembered(
    name: str, shape: tuple[int, int, int], classes: int, options: str
) -> Outline | None:
    return _outlined(name, shape, classes, json.loads(options))


def _outlined(
    name: str, shape: tuple[int, int, int], classes: int, options: Mapping[str, Any]
) -> Outline | None:
    sketch = sketched(_builder(name), shape, classes, options)
    if sketch is None:
        return None
    _check_kinds(name, sketch, options)
    return _measured(name, sketch, shape, options)


def _measured(
    name: str, sketch: nn.Module, shape: tuple[int, int, int], options: Mapping[str, Any]
) -> Outline:
    """Images that a model cannot take are told before anything is trained: two pass through its shapes alone."""
    try:
        return measured(sketch, shape)
    except Exception as error:
        what = _images(shape) + (f" with the options {dict(options)}" if options else "")
        raise ValueError(f"{name}: expected {what}: {_reason(error)}") from None


def _check_kinds(name: str, model: nn.Module, options: Mapping[str, Any]) -> None:
    """Options are of the kind that their defaults have: what merely passes for true or false is a slip."""
    known = inspect.signature(type(model).__init__).parameters
    for key, value in options.items():
        kind = type(known[key].default) if key in known else None
        if kind not in _KINDS:
            continue
        wanted, said = _KINDS[kind]
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"model option {key} of {name}: expected {said}, got {value!r}")


def _tripped(error: Exception, options: Mapping[str, Any], shape: tuple[int, int, int]) -> str:
    """What was expected, after an error of a builder's."""
    if not options:
        return f"{_images(shape)}: {_reason(error)}"
    if found := re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error)):
        return f"options that its name leaves open, got {found[1]}, which it sets itself"
    if found := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        return f"options that it takes, got {found[1]}, which it does not know"
    return f"options that it takes, got {dict(options)}: {_reason(error)}"


def _images(shape: tuple[int, int, int]) -> str:
    return (
        f"images of a size that it takes, got {shape[1]} x {shape[2]} (folder: data has --image-size; larger ones, "
        "such as 224, suit most models)"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def recipe_for(name: str) -> Recipe:
    """The default recipe of a model; flags override its fields."""
    _builder(name)
    return RECIPES.get(name, _TORCHVISION)


def stable(recipe: Recipe) -> Recipe:
    """The recipe under which weights can be rewound to initialisation (Maene, Li & Moens 2021, arXiv 2106.06955).

    SGD takes batches of at least 1024 at an unchanged learning rate - the least the paper finds stable for
    ResNet-20 at 0.1, where 128 is not and 512 is in between - and warms up over at least a twentieth of
    the run, since the paper names a longer warm-up as the other way.  Adam's recipes are as they were: the
    paper rewinds LeNet to initialisation under plain Adam.  The same again changes nothing.
    """
    if recipe.optimizer != "sgd":
        return recipe
    warmup = max(recipe.warmup_epochs, recipe.epochs / 20)
    return replace(recipe, batch=max(recipe.batch, 1024), warmup_epochs=warmup)


PRESETS: dict[str, Callable[[Recipe], Recipe]] = {"stable": stable}


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in BUILDERS:
        return BUILDERS[name]
    family, _, model = name.partition(":")
    if family == "torchvision":
        return torchvision_models.builder(model)
    raise ValueError(f"model: expected one of {', '.join(model_names())}, got {name!r}")
