"""A copy of a model, or one line that says what in it has none."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

_ERRORS = (TypeError, RuntimeError, NotImplementedError, pickle.PicklingError)  # of copy.deepcopy


def copied(model: M) -> M:
    """A deep copy.  Errors: ValueError for a model that holds what cannot be copied: a lock, an open file."""
    with copying(model):
        return copy.deepcopy(model)


@contextmanager
def copying(model: nn.Module) -> Iterator[None]:
    """For a block that copies a model and does nothing else.  Errors: as `copied`."""
    try:
        yield
    except _ERRORS as error:
        found = _uncopied(model)
        at = f"its attribute {found}" if found else "what"
        raise ValueError(
            f"model: expected one that copy.deepcopy can copy, got {at} that it cannot ({str(error)[:200]}); delete "
            "what forward has left on it, or give the class a __deepcopy__"
        ) from None


def _uncopied(model: nn.Module) -> str:
    """The first attribute that cannot be copied, by name; "" for none by itself."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except _ERRORS:
                return f"{name}.{key}".lstrip(".")
    return ""
