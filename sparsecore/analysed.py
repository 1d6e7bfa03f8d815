"""What an analysis looks at, a ticket with its data on a device, and where its results go."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from .console import console, write_json
from .data import Batches, Dataset, folder_of
from .experiment import Setup, batches_of_setup, model_of
from .needs import check_memory
from .options import DataDir, Device, ImageSize, Json, TicketData, device_of, given
from .paths import Paths, check_paths
from .provenance import data_of_ticket, setup_of, tell_other_data, with_data
from .tickets import Ticket

TicketFile = Annotated[Path, typer.Argument(help="A ticket file.")]
Out = Annotated[Path, typer.Option(help="Folder of figures and CSV files; run again to go on.")]
OUT = Path("runs/analysis")


def labels_of(paths: Sequence[Path]) -> dict[Path, str]:
    """What files are called side by side: their stems, and as much of the path before as tells some of them apart.

    One file that is named twice has one label.
    """
    whole = {path: Path(os.path.abspath(path)) for path in paths}  # noqa: PTH100  resolve() would follow links
    known = {
        path: [path.stem, *(str(Path(*path.parts[-n:])) for n in range(1, len(path.parts) + 1))]
        for path in whole.values()
    }
    lengths = dict.fromkeys(known, 0)
    while True:
        labels = {path: words[lengths[path]] for path, words in known.items()}
        counts = Counter(labels.values())
        if len(counts) == len(labels):  # as whole paths are
            return {path: labels[file] for path, file in whole.items()}
        for path, label in labels.items():
            if counts[label] > 1:
                lengths[path] = min(lengths[path] + 1, len(known[path]) - 1)


@dataclass(frozen=True)
class Results:
    """Where a command's results go."""

    out: Path
    json_file: Path | None

    def check(self, reads: Paths | None = None, data: str = "") -> None:
        """Errors: ValueError for results that would lie over what is read, over each other, or among the images."""
        check_paths(
            reads,
            written={"--json": self.json_file},
            folders={"--out": self.out},
            made={"the tables": (self.out, "*.csv"), "the figures": (self.out, "*.png")},
            data=folder_of(data),
        )

    def file(self, name: str) -> Path:
        """A file or folder among the results."""
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out / name

    def wrote(self, result: Mapping[str, Any], *paths: Path) -> None:
        """Tells of files, and writes the JSON result."""
        for path in paths:
            console.line(f"wrote  {path}")
        write_json(self.json_file, dict(result))


def _results(out: Out = OUT, json_file: Json = None) -> Results:
    return Results(out, json_file)


@dataclass(frozen=True)
class Case(Results):
    """A ticket with its data on a device."""

    path: Path
    ticket: Ticket
    setup: Setup
    dataset: Dataset
    device: torch.device

    @property
    def model(self) -> nn.Module:
        return model_of(self.ticket, self.dataset, self.device)

    def batches(self, seed: int) -> Batches:
        return batches_of_setup(self.setup, self.dataset, self.setup.recipe, seed, self.device)[0]

    @property
    def test(self) -> Batches:
        return batches_of_setup(self.setup, self.dataset, self.setup.recipe, 0, self.device)[1]


def _case(
    ticket: TicketFile,
    data: TicketData = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    out: Out = OUT,
    device: Device = "auto",
    json_file: Json = None,
) -> Case:
    target = device_of(device)
    loaded = Ticket.load(ticket)
    setup = with_data(setup_of(loaded), data, image_size)
    Results(out, json_file).check({"the ticket": ticket}, setup.data)
    dataset = data_of_ticket(setup, data, data_dir)
    tell_other_data(loaded, setup, dataset)
    check_memory(setup, dataset, target, ticket=loaded)
    return Case(out, json_file, ticket, loaded, setup, dataset, target)


with_case = given(_case, "case")
with_results = given(_results, "results")
