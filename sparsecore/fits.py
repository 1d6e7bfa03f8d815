"""Whether a ticket fits a model: the same layers and weights, of the same shapes and kinds."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import schema
from .writing import FileError


class TicketError(FileError):
    """A ticket that cannot be used: what was expected, what was found."""


def oddity(value: Tensor) -> str:
    """What a tensor is that is no dense one with entries that are there, in an error's words; "" for a plain one."""
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return str(value.layout).removeprefix("torch.")
    if value.is_quantized:
        return str(value.dtype).removeprefix("torch.")
    return "no data (a tensor on meta)" if value.is_meta else ""


def check_plain(what: str, tensors: Mapping[str, Tensor], *, masks: bool = False) -> None:
    """Errors: TicketError for a tensor that is no plain one, and a mask that is not bool."""
    for name, value in tensors.items():
        found = oddity(value)
        if not found and masks and value.dtype is not torch.bool:
            found = str(value.dtype).removeprefix("torch.")
        if found:
            wanted = "dense bool tensors" if masks else "dense tensors with values"
            raise TicketError(f"{what}: expected {wanted}, got {found} for {name}")


def check_names(
    what: str, ticket: Mapping[str, Any], model: Mapping[str, Any], *, subset: bool = False
) -> None:
    missing = sorted(set(ticket) - set(model))
    extra = [] if subset else sorted(set(model) - set(ticket))
    if missing or extra:
        raise TicketError(
            f"the ticket is for another model: its {what} are {_some(ticket)}, "
            f"the model's are {_some(model)} (differing: {_some(missing + extra)})"
        )


def check_shapes(pairs: Mapping[str, tuple[Tensor, torch.Size]]) -> None:
    for name, (ticket, shape) in pairs.items():
        if ticket.shape != shape:
            raise TicketError(
                f"the ticket is for another model: {name} has shape {tuple(ticket.shape)}, "
                f"the model's is {tuple(shape)}"
            )


def check_values(state: Mapping[str, Tensor]) -> None:
    bare = [key for key, value in state.items() if value.is_meta]
    if bare:
        raise TicketError(
            f"expected parameters with values to load the ticket's weights into, got the meta device in "
            f"{', '.join(bare[:4])}; call model.to_empty(device=...) first, or apply_(..., weights=False) and load a "
            "state_dict afterwards"
        )


def check_castable(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Errors: TicketError for numbers of another kind than the model's, or that are not finite where its are."""
    for key, value in weights.items():
        try:
            schema.castable(value, own[key], f"the ticket's weight {key}")
        except FileError as error:
            raise TicketError(str(error)) from None


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
