"""torchvision's classification models: built for the images at hand, and their trained weights."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from .outline import ModelTooLarge
from .process import seeded

# Further heads give outputs of their own while training.  `init_weights` says what is the default, which they warn of.
_ONE_HEAD = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
# What a model's builder is told by others than its user, and by whom.
TAKEN = {
    "name": "which --model gives",
    "num_classes": "which the data gives",
    "weights": "which are those of --weights",
    "progress": "since nothing is shown of it",
    "backend": "since all are of torchvision.models",
}
# Of options that are numbers; of all others 0.  What is less is rounded up to a width of eight, in silence.
LEAST = {"width_mult": 0.01, "alpha": 0.01}
_FURTHER_HEADS = ("aux1.", "aux2.", "AuxLogits.")


def names() -> list[str]:
    """All of them, by torchvision's names."""
    return torchvision.models.list_models(module=torchvision.models)


def builder(model: str) -> Callable[..., nn.Module]:
    """`build(shape, classes, **options)` of a model.  Errors: ValueError for an unknown name, listing all."""
    if model not in names():
        raise ValueError(f"model: torchvision has no {model!r}; it has {', '.join(names())}")

    def build(shape: tuple[int, int, int], classes: int, **options: Any) -> nn.Module:
        if shape[0] != 3:
            raise ValueError(
                f"torchvision:{model}: expected images with 3 channels, got {shape[0]}"
            )
        if options.get("aux_logits"):
            raise ValueError(
                f"torchvision:{model}: expected one head, got aux_logits={options['aux_logits']}; leave it out"
            )
        given = _ONE_HEAD.get(model, {}) | _sized(model, shape) | options
        try:
            return torchvision.models.get_model(model, weights=None, num_classes=classes, **given)
        except ModelTooLarge:
            raise
        except ValueError as error:
            raise ValueError(
                f"torchvision:{model}: expected images and options that it takes, got {shape[1]} x {shape[2]} (folder: "
                f"data has --image-size; 224 suits most models): {' '.join(str(error).split())[:200]}"
            ) from None

    return build


def trained(model: str, shape: tuple[int, int, int], **options: Any) -> dict[str, Tensor]:
    """The state_dict of torchvision's trained weights, as `builder`'s model has it but for a head of 1,000 classes.

    Errors: ValueError where the weights cannot be downloaded or torchvision has none.
    """
    weights = torchvision.models.get_model_weights(model)
    if not len(weights):
        raise ValueError(f"weights: torchvision has no trained weights of {model}")
    # Trained are the models with all their heads; torchvision refuses to be told so or otherwise.
    given = {k: v for k, v in options.items() if k not in _ONE_HEAD.get(model, {})}
    try:
        with seeded():  # heads are drawn before they are loaded
            state = torchvision.models.get_model(
                model, weights=weights.DEFAULT, progress=False, **given  # pyright: ignore[reportAttributeAccessIssue]
            ).state_dict()  # fmt: skip
    except Exception as error:  # downloads and files let many kinds of error through
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"weights: torchvision's of {model} could not be loaded: {reason}; give --weights FILE where there is "
            "no network"
        ) from None
    if model.startswith("vit_"):
        state = interpolate_embeddings(shape[1], _patch(model), OrderedDict(state))
    return {name: value for name, value in state.items() if not name.startswith(_FURTHER_HEADS)}


def _sized(model: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Options of models that are built for one size of images."""
    _, height, width = shape
    if model.startswith("vit_"):
        patch = _patch(model)
        if height != width or height % patch:
            raise ValueError(
                f"torchvision:{model}: expected square images with sides divisible by {patch}, got {height} x {width}; "
                f"give --image-size {max(patch, height // patch * patch)} (of folder: data) or another model"
            )
        return {"image_size": height}
    if model.startswith("maxvit"):
        return {"input_size": (height, width)}
    return {}


def _patch(model: str) -> int:
    found = re.search(r"_(\d+)$", model)
    assert found is not None, model
    return int(found[1])
