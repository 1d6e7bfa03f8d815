"""The paper's headline row: tickets of ResNet-20 on CIFAR-10 at 99.3 %, searched and trained (arXiv 2512.07142).

Dense training up to the rewind point, a search there for each length, training of each ticket.  What is
finished is a row and is not done again; what was killed goes on at its last epoch.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from sparsecore import checkpoints
from sparsecore.data import Batches, DataError, Dataset, load
from sparsecore.experiment import Setup, loaders, model_of, new_model, train_on
from sparsecore.progress import Advance, Progress
from sparsecore.recipes import recipe_for
from sparsecore.search import ConcreteSearch
from sparsecore.tickets import Ticket
from sparsecore.training import train

from .measure import say, spread_of
from .rows import Rows, path_of

LENGTHS = ("short", "half", "long")
SPARSITY = 1 - 0.8**22  # 22 rounds that remove a fifth each


@dataclass(frozen=True)
class TicketPlan:
    """What is searched and trained, and in which precision.

    Args:
        epochs: of the search, by its length.
        half: whether the search computes in bfloat16, channels_last (the `amp` of training is the recipe's).
    """

    suite: str
    setup: Setup
    sparsity: float
    epochs: dict[str, int]
    half: bool = False

    def on(self, device: torch.device, *, amp: str = "bf16") -> "TicketPlan":
        """The plan as this device runs it: lower precision on a GPU, float32 elsewhere."""
        if device.type != "cuda":
            return self
        recipe = replace(self.setup.recipe, amp=None if amp == "none" else amp)
        return replace(self, setup=replace(self.setup, recipe=recipe), half=True)

    @property
    def training_epochs(self) -> float:
        return self.setup.recipe.epochs - self.setup.rewind_epochs

    def search(self, length: str, seed: int) -> ConcreteSearch:
        found = replace(self.setup, search_epochs=self.epochs[length]).search("cts", seed)
        assert isinstance(found, ConcreteSearch)
        return replace(found, dtype=torch.bfloat16, channels_last=True) if self.half else found


PAPER = TicketPlan(
    "cts-resnet20",
    Setup(
        "resnet-20", "cifar10", recipe_for("resnet-20"), rewind_epochs=9, train_epochs=151, search_batch=512,
        model_options={"shortcut": "3x3", "bn_init": "uniform"}, objective="reverse-kl",
    ),
    SPARSITY,
    {"short": 20, "half": 80, "long": 160},
)  # fmt: skip
QUICK = TicketPlan(
    "cts-resnet20-quick",
    Setup(
        "lenet-300-100", "digits", replace(recipe_for("lenet-300-100"), epochs=2),
        rewind_epochs=1, train_epochs=1, search_batch=128,
    ),
    0.9,
    {"short": 1, "half": 2, "long": 2},
)  # fmt: skip


def tickets(
    plan: TicketPlan,
    folder: Path,
    device: torch.device,
    *,
    lengths: Sequence[str] = LENGTHS,
    seeds: int = 1,
    data_dir: str | None = None,
    keep: Path | None = None,
) -> int:
    """Searches and trains for every seed and length; returns the exit status (2: no data).

    Args:
        folder: of the rows.
        keep: folder of tickets and checkpoints; the rows' by default.
    """
    try:
        dataset = load(plan.setup.data, data_dir)
    except DataError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    rows = Rows(path_of(folder, device, plan.suite), plan.suite, device, fresh=False)
    keep = keep or folder
    keep.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        run = _Run(plan, dataset, seed, rows, keep, device)
        for length in lengths:
            run.length(length)
        run.clear()
    print(f"rows  {rows.path}")
    return 0


class _Epochs(Progress):
    """Listens to a search: the seconds of each epoch."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.seconds: list[float] = []

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        yield _Epoch(self)


class _Epoch(Advance):
    def __init__(self, epochs: _Epochs) -> None:
        super().__init__(None, None)
        self.epochs = epochs

    def describe(self, **values: Any) -> None:
        self.epochs.seconds.append(values["seconds"])


class _Run:
    """All that one seed's tickets share."""

    def __init__(
        self, plan: TicketPlan, dataset: Dataset, seed: int, rows: Rows, folder: Path,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.plan, self.dataset, self.seed = plan, dataset, seed
        self.rows, self.folder, self.device = rows, folder, device
        self.case = f"{plan.setup.model}/{plan.setup.data}/sparsity={plan.sparsity:.4f}/seed={seed}"
        self.last = device.type == "cuda"  # convolutions in channels_last
        self.rewind = folder / f"{plan.suite}-seed{seed}-rewind.safetensors"

    def length(self, length: str) -> None:
        """One ticket: its search's rows, its training's rows."""
        provider = f"cts {length}"
        if self._known(provider, "training time"):
            return
        name = f"{self.plan.suite}-{length}-seed{self.seed}"
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            self._search(length, path)
        ticket = Ticket.load(path)
        self._same_plan(ticket, path, length)
        found = ticket.meta["seconds"]
        mode = f"{'bf16' if self.plan.half else 'fp32'} {ticket.meta['engine']}"
        self._once(provider, mode, "rewind time", "s", f"{found['rewind']:.1f}")
        self._once(provider, mode, "search time", "s", f"{found['search']:.1f}")
        # Apart from the first, which compiles and captures, where the others only compute.
        if (
            epochs := found["epochs"][1:] or found["epochs"]
        ):  # none where a killed run had ended its search
            later = (f"{value:.3f}" for value in spread_of(epochs))
            self._once(provider, mode, "search epoch", "s", *later)
        self._once(provider, mode, "density kept", "%", f"{100 * ticket.density:.3f}")
        plan, checkpoint = self.plan, self.folder / f"{name}.training"
        say(f"{self.case}: training the {length} search's ticket, {plan.training_epochs} epochs")
        model = self._laid_out(model_of(ticket, self.dataset, self.device))
        start = perf_counter() - checkpoints.seconds(checkpoint)
        history = train_on(
            model, plan.setup, self.dataset, plan.training_epochs, seed=self.seed,
            metrics=self.folder / f"{name}.jsonl", checkpoint=checkpoint,
        )  # fmt: skip
        seconds = perf_counter() - start  # the choice of the engine too
        mode = f"{plan.setup.recipe.amp or 'fp32'} {checkpoints.read(checkpoint)[1]['engine']}"
        epochs = spread_of([epoch["seconds"] for epoch in history.epochs])
        self._once(provider, mode, "accuracy", "%", f"{history.accuracy:.2f}")
        self._once(provider, mode, "training epoch", "s", *(f"{value:.3f}" for value in epochs))
        both = found["search"] + seconds
        self._once(provider, mode, "search and training time", "s", f"{both:.1f}")
        # The row that says that all is done comes last.
        self._once(provider, mode, "training time", "s", f"{seconds:.1f}")
        checkpoint.unlink(missing_ok=True)
        say(f"{self.case}, {provider}: {history.accuracy:.2f} %, {seconds:.1f} s, {history.engine}")

    def clear(self) -> None:
        """All is done: the rewind point is in every ticket."""
        self.rewind.unlink(missing_ok=True)

    def _known(self, provider: str, metric: str) -> bool:
        return bool(self.rows.find(case=self.case, provider=provider, metric=metric))

    def _once(self, provider: str, mode: str, metric: str, unit: str, *values: str) -> None:
        if not self._known(provider, metric):
            self.rows.add(self.case, provider, mode, metric, unit, *values)

    def _laid_out(self, model: nn.Module) -> nn.Module:
        return model.to(memory_format=torch.channels_last) if self.last else model  # type: ignore[call-overload]

    def _rewind_point(self) -> tuple[nn.Module, float]:
        """The dense model where searches look, and the seconds its training took; loaded if it is there."""
        setup = self.plan.setup
        model = self._laid_out(new_model(setup, self.dataset, self.seed).to(self.device))
        say(f"{self.case}: dense training up to epoch {setup.rewind_epochs}")
        history = train(
            model, *loaders(self.dataset, setup.recipe, self.seed, self.device), setup.recipe,
            stop_epoch=setup.rewind_epochs, seed=self.seed, checkpoint=self.rewind,
        )  # fmt: skip
        return model, history.seconds

    def _search(self, length: str, path: Path) -> None:
        plan = self.plan
        model, rewind_seconds = self._rewind_point()
        model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        batches = Batches(
            self.dataset, "train", plan.setup.search_batch, seed=self.seed, device=self.device
        )
        search = plan.search(length, self.seed)
        say(f"{self.case}: {length} search, {search.epochs} epochs")
        checkpoint = path.with_suffix(".search")
        epochs, start = _Epochs(), perf_counter() - checkpoints.seconds(checkpoint)
        ticket = search(
            model, batches, sparsity=plan.sparsity, progress=epochs, checkpoint=checkpoint
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, Any] = {"search": perf_counter() - start, "rewind": rewind_seconds}
        seconds["epochs"] = epochs.seconds
        facts = {"setup": self._facts(length), "seconds": seconds}
        replace(ticket, meta=ticket.meta | facts).save(path)

    def _facts(self, length: str) -> dict[str, Any]:
        """The setup as a ticket's provenance tells it."""
        return asdict(replace(self.plan.setup, search_epochs=self.plan.epochs[length]))

    def _same_plan(self, ticket: Ticket, path: Path, length: str) -> None:
        expected = json.loads(json.dumps(self._facts(length)))
        if json.loads(json.dumps(ticket.meta.get("setup"))) != expected:
            raise ValueError(f"{path} was found in another setup; remove it or name another --out")
