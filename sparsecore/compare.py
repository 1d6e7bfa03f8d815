"""Accuracy against sparsity for several methods and seeds, one resumable cell at a time."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from . import safefile, schema
from .cells import FIELDS as FIELDS
from .cells import Cell, Row, read_rows, short, write_rows
from .compared import Compared
from .data import Dataset, corrupted, require_in_memory
from .experiment import (
    Setup,
    apply_sanity,
    check_found,
    find_ticket,
    model_of,
    new_model,
    rewind_point,
    train_on,
)
from .fields import choose
from .interrupts import kept_in
from .locks import held
from .plain import read_plain
from .progress import QUIET, Progress
from .sanity import CHECKS
from .search.sparse_training import AbstractSparseTraining
from .sparsities import check_sparsity
from .telling import short_search
from .tickets import Ticket, dense_state
from .writing import FileError, put, sweep

FILES = ("setup.json", "results.csv", "accuracy.png")  # what a folder holds besides its folders

_LONGEST = 180  # file systems take 255, and sparsity, seed and endings come behind a method
MADE = {  # and how their files are called
    "the tickets": "tickets/*",
    "the rewind points": "rewind-*.safetensors",
    "the rounds": "rounds/*/*",
}

_DIGESTS = {
    "data_digest": "images or labels than those now in the data",
    "weights_digest": "start weights than those now in the file",
}


def _remove(path: Path) -> None:
    """A search's checkpoint, a file or a folder; one too many is no harm."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def check_method(setup: Setup, text: str) -> str:
    """A method of the setup, or METHOD+SANITY; ValueError with the valid names otherwise, and for a text that no file
    could be called by.
    """
    if (length := len(os.fsencode(text))) > _LONGEST:
        raise ValueError(
            f"methods: expected at most {_LONGEST} bytes, as files are called by them, got {length} for {text[:40]}... "
            "(write its numbers shorter)"
        )
    method, _, sanity = text.partition("+")
    search = setup.search(method, seed=0)
    if sanity:
        choose("sanity", sanity, CHECKS)
    if sanity == "invert" and isinstance(search, AbstractSparseTraining):
        raise ValueError(
            f"{text}: expected a method that scores weights, whose ranking can be inverted, got one whose mask moves; "
            "leave the control out"
        )
    return text


def comparison_kept(folder: Path) -> Callable[[], str]:
    """What a signal leaves of a comparison in a folder: finished cells, tickets and rewind points."""
    return lambda: kept_in(folder / "results.csv", folder / "tickets", *folder.glob("rewind-*"))()


def file_stem(method: str, windows: bool = os.name == "nt") -> str:
    """What files of a method are called; on Windows a colon would name a stream within another file."""
    return method.replace(":", ";") if windows else method


# A field that a file's version did not have was what it is by default.
_DEFAULTS = {f.name: f.default for f in fields(Setup) if f.default is not MISSING}


def _facts_of(setup: Setup) -> dict[str, Any]:
    """As a file has them."""
    return json.loads(json.dumps(asdict(setup)))


class _Known(TypedDict):
    """Of a ticket's provenance, what comparisons need."""

    search: str
    sparsity: float
    seed: int
    data_digest: str
    setup: schema.Facts
    search_seconds: schema.Seconds


class Comparison(Compared):
    """A folder of finished cells: `results.csv`, `tickets/`, `setup.json`, `accuracy.png`.

    Cells found in results.csv are not run again.  One process at a time goes on with a folder.

    Errors: ValueError for a folder of another setup; FileError for files of the same names that are no comparison's.
    """

    def __init__(self, folder: Path, setup: Setup, engine: str = "auto") -> None:
        self.folder, self.setup, self.engine = folder, setup, engine
        self.files = self._check_setup()
        self.rows = read_rows(self._results)
        (folder / "tickets").mkdir(parents=True, exist_ok=True)
        for part in (folder, folder / "tickets"):
            sweep(part)
        self.caveats: dict[str, str] = {}  # of this run's tickets, by method and sparsity

    def run(
        self,
        dataset: Dataset,
        methods: Sequence[str],
        sparsities: Sequence[float],
        seeds: Iterable[int],
        device: torch.device,
        progress: Progress = QUIET,
    ) -> None:
        """Runs what is missing: per seed one rewind point and the dense partner, then every cell."""
        for sparsity in sparsities:
            check_sparsity(sparsity)
        for method in methods:
            check_method(self.setup, method)
        seeds = list(seeds)
        cells = [Cell("dense", 0.0, seed) for seed in seeds]
        cells += [Cell(m, s, seed) for seed in seeds for s in sparsities for m in methods]
        self._check_searches([cell for cell in cells if cell.key not in self.rows], dataset)
        with held(self._results), progress.task("cells", total=len(cells)) as advance:
            self.files = self._check_setup()  # another process may have begun, or gone on until now
            self._check_files(dataset)
            self.rows = read_rows(self._results)
            for cell in cells:
                if cell.key not in self.rows:
                    self._append(self._measure(cell, dataset, device, progress))
                row = self.rows[cell.key]
                advance(cell=cell.key, accuracy=float(row["accuracy"]))

    def _measure(
        self, cell: Cell, dataset: Dataset, device: torch.device, progress: Progress
    ) -> Row:
        setup, epochs = self.setup, self.setup.train_epochs
        if cell.method == "dense":
            model = self._start(setup, cell.seed, dataset, device, progress)
            kept, search_seconds = sum(p.numel() for p in model.parameters() if p.ndim > 1), 0.0
        else:
            ticket = self._ticket(cell, dataset, device, progress)
            model = model_of(ticket, dataset, device)
            kept = sum(int(mask.sum()) for mask in ticket.masks.values())
            search_seconds = ticket.meta["search_seconds"]
            setup = setup.start_of(cell.base)
            epochs = 0 if ticket.finished else setup.train_epochs
        history = train_on(
            model, setup, dataset, epochs, seed=cell.seed, progress=progress, engine=self.engine
        )
        values = (
            cell.method,
            short(cell.sparsity),
            cell.seed,
            f"{history.accuracy:.2f}",
            kept,
            f"{search_seconds:.1f}",
            f"{history.seconds:.1f}",
            device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            torch.__version__,
        )
        return {name: str(value) for name, value in zip(FIELDS, values, strict=True)}

    def _ticket(
        self, cell: Cell, dataset: Dataset, device: torch.device, progress: Progress
    ) -> Ticket:
        method, _, sanity = cell.method.partition("+")
        searched = dataset
        if sanity == "corrupt":  # found where there is nothing to learn, trained on the data
            method, searched, sanity = cell.method, corrupted(dataset, cell.seed), ""
        stem = file_stem(method)
        path = self.folder / "tickets" / f"{stem}-{short(cell.sparsity)}-{cell.seed}.safetensors"
        checkpoint = path.with_suffix(".checkpoint")
        if path.exists():
            ticket = self._known(path, cell, searched)
            _remove(checkpoint)  # a kill between the two has left it
        else:
            start = self.setup.start_of(cell.base)
            model = self._start(start, cell.seed, dataset, device, progress)
            ticket, seconds = find_ticket(
                self.setup, model, searched, cell.base, cell.sparsity, cell.seed, device, progress,
                checkpoint=checkpoint,
                rounds=self.folder / "rounds" / f"{stem}-{cell.seed}",
                engine=self.engine,
            )  # fmt: skip
            ticket.meta["search_seconds"] = round(seconds, 3)
            ticket.save(path)
        if (told := short_search(ticket)) is not None:
            self.caveats[f"{method}, {100 * cell.sparsity:g} %"] = told
        return apply_sanity(ticket, sanity, dataset, cell.seed) if sanity else ticket

    def _known(self, path: Path, cell: Cell, searched: Dataset) -> Ticket:
        """A ticket that an earlier run has found.  Errors: FileError for another's."""
        try:
            ticket = Ticket.load(path)
            schema.facts(ticket.meta, _Known, str(path))
        except FileError as error:
            raise FileError(f"{error}; remove it, and it is searched again") from None
        any_size = {"image_size": None}  # a folder's may be its images' median
        own = _facts_of(self.setup.start_of(cell.base)) | any_size
        told = _DEFAULTS | ticket.meta["setup"] | any_size
        found = tuple(ticket.meta[name] for name in ("search", "sparsity", "seed", "data_digest"))
        if found != (cell.base, cell.sparsity, cell.seed, searched.digest) or told != own:
            raise FileError(
                f"{path}: expected the ticket of {cell.base} at sparsity {short(cell.sparsity)}, seed {cell.seed}, "
                "that this comparison found, got another; remove it, and it is searched again"
            )
        return ticket

    def _start(
        self, setup: Setup, seed: int, dataset: Dataset, device: torch.device, progress: Progress
    ) -> torch.nn.Module:
        """A setup's rewind point, trained once a seed and kept on disk."""
        path = self.folder / f"rewind-{setup.rewind_epochs:g}-{seed}.safetensors"
        facts = {
            "setup": _facts_of(self.setup),
            "epochs": setup.rewind_epochs,
            "seed": seed,
            **self.files,
        }
        if path.exists():
            model = new_model(setup, dataset, seed)
            found, known = safefile.read(path, kind="weights")
            if isinstance(before := known.get("setup"), dict):
                known["setup"] = _DEFAULTS | before
            if known != facts:
                raise FileError(
                    f"{path}: expected the rewind point of this comparison and seed {seed}, got another; remove it, "
                    "and it is trained again"
                )
            model.load_state_dict(schema.tensors(found, model.state_dict(), str(path)))
            return model.to(device)
        model = rewind_point(setup, dataset, seed, device, progress, engine=self.engine)
        safefile.write(path, dense_state(model), facts, kind="weights")
        return model

    def _check_setup(self) -> dict[str, Any]:
        """What setup.json says of files.  Errors: ValueError for the folder of another setup."""
        wanted = _facts_of(self.setup)
        found = _DEFAULTS | (self._stored() or wanted)
        files = {name: found.pop(name, None) for name in _DIGESTS}
        if found != wanted:
            differ = sorted(k for k in wanted | found if wanted.get(k) != found.get(k))
            raise ValueError(
                f"{self.folder} holds cells of another setup (different: {', '.join(differ)}); "
                "give another --out or remove it"
            )
        return files

    def _stored(self) -> dict[str, Any] | None:
        """What setup.json says; None where there is none."""
        path = self.folder / "setup.json"
        if not path.exists():
            return None
        text = read_plain(path)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        digests = [found.get(name) for name in _DIGESTS] if isinstance(found, dict) else [0]
        if not all(digest is None or isinstance(digest, str) for digest in digests):
            raise FileError(
                f"{path}: expected what a comparison wrote, got something else; give another --out or remove it"
            )
        return found

    def _check_files(self, dataset: Dataset) -> None:
        """Writes setup.json with what its cells' files hold, or refuses other files of the same names."""
        weights = self.setup.weights
        given = weights is not None and Path(weights).is_file()
        digest = hashlib.sha256(read_plain(Path(weights or ""))).hexdigest() if given else None
        for (name, what), now in zip(_DIGESTS.items(), (dataset.digest, digest), strict=True):
            if self.files[name] not in (None, now):
                raise ValueError(
                    f"{self.folder} holds cells of other {what}; give another --out or remove it"
                )
            self.files[name] = now
        text = (json.dumps(asdict(self.setup) | self.files, indent=2) + "\n").encode()
        path = self.folder / "setup.json"
        if not path.exists() or read_plain(path) != text:
            put(path, text)

    def _check_searches(self, cells: Sequence[Cell], dataset: Dataset) -> None:
        """Errors: ValueError for a cell that could not be searched, before any is."""
        searched = {(cell.base, cell.sparsity) for cell in cells if cell.method != "dense"}
        if any(cell.method.endswith("+corrupt") for cell in cells):
            require_in_memory(dataset)
        if searched:
            model = new_model(self.setup, dataset, seed=0)
            for method, sparsity in sorted(searched):
                check_found(self.setup, model, dataset, method, sparsity)

    @property
    def _results(self) -> Path:
        return self.folder / "results.csv"

    def _append(self, row: Row) -> None:
        write_rows(self._results, [*self.rows.values(), row])
        self.rows[Cell.of(row).key] = row
