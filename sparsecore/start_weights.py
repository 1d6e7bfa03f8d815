"""Start weights of one's own: a state_dict out of a file, or torchvision's trained weights."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .fits import oddity
from .torchvision_models import trained

TRAINED = "DEFAULT"  # torchvision's word for a model's best weights
_NESTED = ("state_dict", "model_state_dict", "model")  # where checkpoints keep them
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class WeightsWarning(UserWarning):
    """What of the start weights was not taken."""


def read_state(path: Path) -> dict[str, Tensor]:
    """A dense model's state_dict out of a safetensors file or one of `torch.save`; nothing in it is run.

    Errors: ValueError for a missing, damaged or foreign file.
    """
    if not path.is_file():
        there = "a pipe or device" if path.exists() else "nothing there"
        found = "a folder" if path.is_dir() else there
        raise ValueError(f"weights: expected a file or {TRAINED}, found {found}: {path}")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(
            f"weights: expected a file that can be read, got {path} ({error.strerror})"
        ) from None
    try:
        state: Any = load_file(path)
    except (SafetensorError, OSError, ValueError):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # readers let many kinds of error through
            raise ValueError(
                f"weights: expected {path} to be safetensors or a state_dict that torch.save wrote, got a damaged "
                "file or one with more than tensors"
            ) from None
    state = next(
        (
            state[k]
            for k in _NESTED
            if isinstance(state, Mapping) and isinstance(state.get(k), Mapping)
        ),
        state,
    )
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights: expected tensors by name in {path}; save model.state_dict()")
    for wrapper in _WRAPPERS:
        if state and all(str(name).startswith(wrapper) for name in state):
            state = {str(name).removeprefix(wrapper): value for name, value in state.items()}
    return {str(name): value for name, value in state.items()}


def start_from_(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a state_dict of the same names and shapes in place; floating point of any width becomes the model's own.

    Names may all have one more prefix, as where the model was part of another (a LightningModule's `model.`).

    Errors: ValueError for other names or shapes, for what are no plain numbers of the same kind (quantised, complex,
    sparse, without data) and for values that are not finite; nothing changes then.
    """
    own = model.state_dict()
    state = _unprefixed(state, own)
    missing, more = sorted(own.keys() - state), sorted(state.keys() - own)
    if pruned := [name for name in more if name.removesuffix("_orig") in missing]:
        raise ValueError(
            f"weights: expected plain weights in {source}, got {', '.join(pruned[:2])} of torch.nn.utils.prune; call "
            "prune.remove before saving, or keep the masks by Ticket.from_prune"
        )
    if missing or more:
        what = f"no {missing[0]}" if missing else f"{more[0]}, which it does not have"
        raise ValueError(
            f"weights: expected the {len(own)} tensors of the model, got {len(state)} in {source} with {what}; "
            "give weights of the same --model and --model-option"
        )
    for name, value in own.items():
        _check_numbers(f"{name} in {source}", state[name], value)
        if value.shape != state[name].shape:
            raise ValueError(
                f"weights: expected {name} of shape {tuple(value.shape)}, got {tuple(state[name].shape)} in {source}; "
                "give weights for the same classes and image size"
            )
        if value.is_floating_point() and not bool(state[name].to(value.dtype).isfinite().all()):
            raise ValueError(f"weights: {name} in {source} has values that are not finite")
    model.load_state_dict(dict(state))


def _unprefixed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without a prefix that all names have more than the model's, if there is one."""
    for name in next(iter(own)), next(iter(own)) + "_orig":
        for key in state:
            prefix = key.removesuffix(name)
            if (
                prefix
                and prefix.endswith(".")
                and key.endswith(name)
                and all(k.startswith(prefix) for k in state)
            ):
                return {k.removeprefix(prefix): value for k, value in state.items()}
    return state


def _check_numbers(what: str, value: Tensor, own: Tensor) -> None:
    """Errors: ValueError for a tensor that a plain copy would change, or could not read."""
    alike = value.dtype in _FLOATS if own.is_floating_point() else value.dtype == own.dtype
    found = oddity(value) or ("" if alike else str(value.dtype).removeprefix("torch."))
    if found:
        wanted = "floating-point numbers" if own.is_floating_point() else own.dtype
        raise ValueError(
            f"weights: expected plain {wanted} as {what}, got {found}; save the state_dict of a plain dense model"
        )


def start_trained_(
    model: nn.Module, name: str, shape: tuple[int, int, int], options: Mapping[str, Any]
) -> None:
    """Loads torchvision's trained weights in place; WeightsWarning names a head of other classes, which stays as it is.

    Errors: ValueError for a model of others, and weights that cannot be downloaded or do not fit.
    """
    family, _, short = name.partition(":")
    if family != "torchvision":
        raise ValueError(
            f"weights: expected a file, since {TRAINED} is of torchvision's models, and {name} is not"
        )
    own, state = model.state_dict(), trained(short, shape, **options)
    heads = [
        key for key, value in own.items()
        if key in state and value.shape != state[key].shape and value.shape[1:] == state[key].shape[1:]
    ]  # fmt: skip
    start_from_(model, state | {key: own[key] for key in heads}, TRAINED)
    if heads:
        warnings.warn(
            f"{', '.join(heads)}: freshly initialised, as the trained ones are of {len(state[heads[0]])} classes",
            WeightsWarning,
            stacklevel=2,
        )
