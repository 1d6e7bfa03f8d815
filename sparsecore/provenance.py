"""What a ticket says of how it was found: checked as the file of a stranger, and no reason to read or fetch anything.

Only a user names data to download, folders and files to read.  What a ticket alone names is used where it lies already:
data in the given or the default folder.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from . import data as datasets
from . import schema
from .data import DataError, Dataset, DataWarning, folder_of
from .needs import check_image_size
from .recipe import Recipe
from .setups import Setup
from .start_weights import TRAINED
from .tickets import Ticket, TicketError

T = TypeVar("T")


def setup_of(ticket: Ticket) -> Setup:
    """The setup a ticket was found in.

    Errors: TicketError if its provenance does not say, or says what this version cannot build: fields that are missing,
    unknown, of another kind or out of range.
    """
    try:
        stored = ticket.meta.get("setup")
        if not isinstance(stored, dict):
            raise ValueError("no setup")
        own = {key: value for key, value in stored.items() if key != "recipe"}
        recipe = _values(Recipe, stored.get("recipe"), "recipe")
        return Setup(recipe=Recipe(**recipe), **_values(Setup, own, "setup", but="recipe"))
    except ValueError as error:
        raise TicketError(
            "the ticket's provenance does not name a model, data set and recipe this version can "
            f"build ({error}); build the model yourself and use Ticket.apply_(model)"
        ) from None


def _values(kind: type, stored: Any, what: str, but: str = "") -> dict[str, Any]:
    """Fields of a frozen value, each of its kind, as they are; a tuple's are a list in JSON.  Errors: ValueError."""
    if not isinstance(stored, dict):
        raise ValueError(f"no {what}")
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind) if f.name != but}
    for name in stored:
        if name not in known:
            raise ValueError(f"{what}: unknown field {name[:80]!r}")
    for name, field in known.items():
        if name not in stored and field.default is field.default_factory is MISSING:
            raise ValueError(f"{what}: no {name}")
    found = {}
    for name, given in stored.items():
        value = list(given) if isinstance(given, tuple) else given  # a ticket's that is no file yet
        checked = schema.facts(value, hints[name], f"{what} {name}")
        found[name] = checked if isinstance(checked, tuple) else value
    return found


def with_data(setup: Setup, data: str | None, image_size: int | None) -> Setup:
    """A ticket's setup on other data, or on its own where `data` is None; its image size is that of folders alone.

    Errors: DataError for a folder that the ticket alone names, which is not even looked at.
    """
    if data is None and folder_of(setup.data) is not None:
        raise DataError(
            f"data: the ticket says that it was found on {setup.data}, and a folder is read where you name it; give "
            "--data folder:PATH"
        )
    name = setup.data if data is None else data
    own = setup.image_size if folder_of(name) is not None else None
    return replace(setup, data=name, image_size=own if image_size is None else image_size)


def data_of_ticket(setup: Setup, data: str | None, data_dir: Path | None) -> Dataset:
    """The data of `with_data`'s setup: downloaded where a user names it (`data`), otherwise only from where it lies.

    Errors: `data.DataError`.
    """
    if data is None and not datasets.lies_in(setup.data, data_dir):
        where = datasets.default_folder() if data_dir is None else data_dir
        mend = f"give --data {setup.data} to download it, or --data-dir a folder that holds it"
        if setup.data not in datasets.NAMED:
            mend = f"give --data, one of {', '.join(datasets.NAMES)}"
        raise DataError(
            f"data: the ticket says that it was found on {setup.data[:200]}, which is not in {where}; {mend}"
        )
    check_image_size(setup)
    found = datasets.load(
        setup.data, data_dir, download=data is not None, image_size=setup.image_size
    )
    return datasets.limited(found, setup.train_samples)


def with_weights(setup: Setup, weights: str | None) -> Setup:
    """A ticket's setup, to be searched again from the start weights that a user names.

    Errors: ValueError for weights that the ticket alone names.
    """
    if weights is None and setup.weights is not None:
        raise ValueError(
            f"weights: the ticket says that its search began from {setup.weights[:200]}, and weights are read where "
            f"you name them; give --weights FILE, or --weights {TRAINED} for torchvision's"
        )
    return replace(setup, weights=weights)


def tell_other_data(ticket: Ticket, setup: Setup, dataset: Dataset) -> None:
    """Warns, by a DataWarning, where the ticket's own data is no longer what it was found on."""
    found: Mapping[str, Any] | Any = ticket.meta.get("setup")
    same = isinstance(found, dict) and _place(found.get("data")) == _place(setup.data)
    if same and ticket.meta.get("data_digest", dataset.digest) != dataset.digest:
        warnings.warn(
            f"{setup.data}: these are other images, labels or sizes than those that the ticket was found on",
            DataWarning,
            stacklevel=2,
        )


def _place(data: Any) -> Any:
    """Data by its name, a folder by its path, which nothing is asked about."""
    folder = folder_of(data) if isinstance(data, str) and data != "folder:" else None
    return data if folder is None else os.path.abspath(folder)  # noqa: PTH100  resolve() would follow links
