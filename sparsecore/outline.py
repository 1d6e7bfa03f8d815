"""A model on the meta device, which has shapes and no memory: what it takes is known before it is built."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .memory import require_bytes
from .process import seeded

# Twice those of torchvision's deepest; each takes its time, whatever its size.
MOST_MODULES = 3_000
SMALLER = "take a smaller model, by other options, or --image-size"


class ModelTooLarge(ValueError):
    """More modules than can be meant, or more memory than there is."""


@dataclass(frozen=True)
class Outline:
    """What a model needs, in bytes; all but weights are least values.

    Args:
        weights: of parameters and buffers.
        parameters: of parameters alone.
        activations: what a forward pass keeps for its backward, an image; 0 where that is not known.
        largest: of them the largest tensor, an image.
    """

    weights: int
    parameters: int
    activations: int = 0
    largest: int = 0


def sketched(
    build: Callable[..., nn.Module],
    shape: tuple[int, int, int],
    classes: int,
    options: Mapping[str, Any],
) -> nn.Module | None:
    """`build(shape, classes, **options)` on the meta device, which takes neither memory nor long.

    None: its sizes are computed by tensors, or `build` refuses otherwise than by ValueError.

    Errors: ModelTooLarge for more than 3,000 modules, or a layer of more bytes than can be counted; ValueError as
    `build`.
    """
    with seeded(), torch.device("meta"), bounded(modules=MOST_MODULES):
        try:
            return build(shape, classes, **options)
        except ValueError:
            raise
        except RuntimeError as error:
            if "overflow" in str(error):  # of the product of sizes
                raise ModelTooLarge(
                    f"model: expected layers of less than 2**63 bytes, got more; {SMALLER}"
                ) from None
            return None
        except Exception:  # the model itself will tell, or mind no more
            return None


def measured(model: nn.Module, shape: tuple[int, int, int]) -> Outline:
    """The outline of a model on the meta device.

    Errors: what the model says to two images [2, C, H, W] of `shape`, but NotImplementedError, that of operations that
    know no shapes: its activations are 0.
    """
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    weights = sum(map(_bytes, held.values()))
    parameters = sum(map(_bytes, model.parameters()))
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    own = {t.untyped_storage()._cdata for t in held.values()}
    try:
        with (
            seeded(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        ):
            out = model(torch.empty(2, *shape, device="meta"))
        del out
    except NotImplementedError:
        return Outline(weights, parameters)
    sizes = [t.untyped_storage().nbytes() // 2 for key, t in saved.items() if key not in own]
    return Outline(weights, parameters, sum(sizes), max(sizes, default=0))


@contextmanager
def bounded(*, modules: int, memory: int | None = None) -> Iterator[None]:
    """Models that are built inside, by this thread, end early where they have too many modules or bytes.

    Errors: ModelTooLarge.
    """
    count, size, thread, seen = 0, 0, threading.get_ident(), set[int]()

    def note_module(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > modules:
            raise ModelTooLarge(
                f"model: expected at most {modules:,} modules, got more; take fewer layers, by other options"
            )

    def note_tensor(_: Any, __: str, tensor: Tensor | None) -> None:
        nonlocal size
        if (
            tensor is None
            or memory is None
            or threading.get_ident() != thread
            or id(tensor) in seen
        ):
            return
        seen.add(id(tensor))
        size += _bytes(tensor)
        try:
            require_bytes("model", size, SMALLER, free=memory)
        except ValueError as error:
            raise ModelTooLarge(str(error)) from None

    handles = [
        hooks.register_module_module_registration_hook(note_module),
        hooks.register_module_parameter_registration_hook(note_tensor),
        hooks.register_module_buffer_registration_hook(note_tensor),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
