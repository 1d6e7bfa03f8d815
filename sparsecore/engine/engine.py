"""Steps without a host: one engine launches every step of training, search and evaluation.

A step computes one batch and changes tensors that stay.  How it is launched is the engine's affair: operation
by operation, as one CUDA graph, with its forward compiled, or compiled and captured.  Whatever a step reads lies on the
device (`Feed`, `Timeline`), so that the same step serves all four, with the same numbers.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import capture, kernels
from ..batches import Batch
from ..interrupts import signals_later
from ..process import seeded
from .feeds import Feed

log = logging.getLogger("sparsecore")

_OFTEN = 5  # versions of a step, in fewer than so many steps each: graphs cost more than they save
ENGINES = ("auto", "eager", "graph", "compile", "compile-graph")


class EngineError(ValueError):
    """A step that cannot be launched as asked; the message says why and what to ask for instead."""


class Way(NamedTuple):
    """How steps are launched.  channels_last: images lie so; False leaves model and data as they are."""

    graph: bool = False
    compiled: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        """As users ask for it."""
        parts = ["compile"] * self.compiled + ["graph"] * self.graph
        return "-".join(parts) or "eager"

    def __str__(self) -> str:
        return self.name + ", channels_last" * self.channels_last

    @classmethod
    def of(cls, text: str) -> "Way":
        """From an engine's name, or what `str` gave.  Errors: ValueError, listing the names."""
        name, _, layout = text.partition(", ")
        if check_engine(name) == "auto" or layout not in ("", "channels_last"):
            raise ValueError(f"engine: expected one of {', '.join(ENGINES[1:])}, got {text!r}")
        return cls("graph" in name, "compile" in name, bool(layout))


def check_engine(name: str, device: torch.device | None = None) -> str:
    """The name.  Errors: ValueError for what is none, listing them; EngineError for one that the device has not."""
    if name not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    if device is not None and "graph" in name and not capture.possible_on(device):
        without = f"expected a GPU for graphs, got {device}"
        lacks = without if device.type != "cuda" else f"it {kernels.MISSING}"
        raise EngineError(f"engine {name}: {lacks}; use engine=auto")
    return name


class AbstractStep(ABC):
    """One step on a batch: no host sync, and nothing that it leaves behind but in `changes`.

    Attributes:
        model: whose forward it runs.
        total: the sum of what a step measures (a loss, hits) over the steps since `clear`.
    """

    model: nn.Module
    device: torch.device
    total: Tensor

    @abstractmethod
    def __call__(self, batch: Batch, rows: Tensor | None) -> None:
        """rows: int64 [B], the samples' numbers, where they have some."""

    @abstractmethod
    def changes(self) -> list[Tensor]:
        """All that a step changes, where it stays."""

    def version(self) -> Hashable:
        """A graph of another version is captured anew."""
        return ()

    def keep(self) -> Any:
        """What a graph needs alive, beside what the step refers to."""
        return None

    def facts(self) -> Any:
        """What tells this step's speed from another's, by its repr."""
        return type(self).__name__

    def clear(self) -> None:
        """Before a part of the run that `total` is of."""
        self.total.zero_()

    def become(self, way: Way) -> Self:
        """Computes that way from here on: with a compiled forward, in another memory format.

        Errors: EngineError for what this step cannot.
        """
        if way.compiled:
            raise EngineError(
                f"engine {way.name}: {type(self).__name__} is not compiled; use eager or graph"
            )
        return self

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Steps inside leave no trace; random numbers are drawn again."""
        tensors, counts = self.changes(), counted(self.model)
        values = [t.clone() for t in tensors]
        buffers = {m: dict(m._buffers) for m in self.model.modules()}
        try:
            with seeded(0, [self.device]):
                yield
        finally:
            with signals_later():
                with torch.no_grad():
                    for t, value in zip(tensors, values, strict=True):
                        t.copy_(value)
                for module, numbers in counts.items():
                    module.__dict__.update(numbers)
                    module._buffers.update(buffers[module])  # a forward may have put others there


class Engine:
    """Launches a step on the batches of a feed.

    Attributes:
        told: how steps are launched, and why; empty where there was nothing to choose.

    Errors: EngineError where the device or the step does not allow the way.
    """

    def __init__(self, step: AbstractStep, feed: Feed, way: Way) -> None:
        check_engine(way.name, step.device)
        self.step, self.feed, self.way = step, feed, way
        self.captured: capture.Captured | None = None
        self.version: Hashable = None
        # Whether all that a first step makes is there: what a graph reads must be.
        self.begun = False
        self.steps = self.versions = 0
        self.told = ""
        step.become(way)
        if way.graph:
            feed.hold()

    def begin(self, epoch: int, first: int = 0) -> None:
        """Epoch `epoch`, from its batch `first` on."""
        self.feed.begin(epoch, first)
        self.refresh()

    def refresh(self) -> None:
        """Tells that model, masks, plans or modes may have changed since the last step."""
        if self.way.graph and (version := self.step.version()) != self.version:
            # What is new may have to make state by itself first.
            self.version, self.captured, self.begun = version, None, False
            self.versions += 1
            if self.versions > _OFTEN and self.steps < _OFTEN * self.versions:
                self.way = self.way._replace(graph=False)
                self.told = (
                    f"{self.way}: {self.versions} different steps in {self.steps}, since the model, its masks or a "
                    "number of its optimiser changes all the time; launched one by one from here on"
                )
                log.warning("engine %s", self.told)

    def __call__(self) -> None:
        """One step on the next batch.  Errors: DataEnded; EngineError if it cannot be captured."""
        self.steps += 1
        usual = self.feed.move_on()
        if usual and self.way.graph and self.begun:
            if self.captured is None:
                self.captured = self._capture()
            self.captured()
        elif usual and not self.begun:
            self._first()
        elif usual or not self.way.compiled:
            self.step(*self.feed.batch())
        else:  # compiled code is of one shape
            self.step.become(self.way._replace(compiled=False))
            self.step(*self.feed.batch())
            self.step.become(self.way)

    def _first(self) -> None:
        """A step by itself, after which all is there that a graph reads."""
        step, graph = self.step, self.way.graph
        before, numbers = (stamp(step.model), counted(step.model)) if graph else (None, {})
        try:
            step(*self.feed.batch())
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise EngineError(
                f"engine {self.way.name}: the model cannot be compiled ({type(error).__name__}: "
                f"{(str(error).strip().splitlines() or [''])[0]}); use engine=eager"
            ) from error
        self.begun = True
        if not graph:
            return
        if stamp(step.model) != before:
            raise EngineError(
                f"engine {self.way.name}: expected a model whose forward writes into its buffers in place, got one "
                "that puts new tensors or modules there; use engine=eager"
            )
        if names := changed(step.model, numbers):
            log.warning(
                "engine %s: a step counts in Python, which its graph will not: %s", self.way.name, names
            )  # fmt: skip
        self.version = step.version()  # with what the step has made

    def _capture(self) -> capture.Captured:
        step, feed = self.step, self.feed
        state = [*step.changes(), *feed.tensors()]
        # A graph that held this object, which holds it, would stay until memory is looked through.
        run = lambda: step(*feed.batch())  # noqa: E731
        try:
            return capture.Captured(run, state, keep=step.keep(), device=step.device)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise EngineError(
                f"engine {self.way.name}: the step cannot be captured ({why}); use engine=eager"
            ) from error


class Timeline:
    """Numbers that follow a schedule, step by step, on the device.

    Args:
        tables: by name, the number of every step.

    Attributes:
        now: by name [1], of the present step; always the same tensors.
    """

    def __init__(
        self, tables: Mapping[str, Iterable[float] | Tensor], device: torch.device
    ) -> None:
        # A CPU reads them as Python's own numbers; fused kernels take float32.
        made = {"dtype": torch.float64 if device.type == "cpu" else torch.float32, "device": device}
        self.tables = {
            name: torch.as_tensor(values if isinstance(values, Tensor) else [*values], **made)
            for name, values in tables.items()
        }
        self.now = {name: table[:1].clone() for name, table in self.tables.items()}
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.last = min(len(table) for table in self.tables.values())

    def to(self, index: int) -> None:
        """The next step is number `index`."""
        self.index.fill_(index)

    def advance(self) -> None:
        """To the numbers of the next step: a part of the step."""
        for name, table in self.tables.items():
            torch.index_select(table, 0, self.index, out=self.now[name])
        # Around the end: a graph is tried out before it is captured.
        self.index.add_(1).remainder_(self.last)

    def changes(self) -> list[Tensor]:
        return [self.index, *self.now.values()]


def plainly(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    """`compiled_call`'s like, uncompiled."""
    return model(*inputs, **named)


@cache
def compiled_call(facts: str) -> Callable[..., Any]:
    """`model(*inputs, **named)`, compiled; `facts` tell structures apart, each of which has code of its own.

    Copies of a model share what was compiled for one of them, whatever their weights and masks.
    """
    # What is compiled is kept by code object, a few for each: one of its own for every structure.
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    code = plainly.__code__.replace(co_name=f"call_{digest}")
    return torch.compile(FunctionType(code, globals()), dynamic=False)


def stamp(model: nn.Module) -> Hashable:
    """Another one whenever the model's modules, modes, frozen parameters or the places of its tensors have changed."""
    found: list[Any] = []
    for module in model.modules():
        found += [id(module), module.training]
        for table in (module._parameters, module._buffers):
            found += [
                None if t is None else (t.data_ptr(), t.requires_grad) for t in table.values()
            ]
    return tuple(found)


def counted(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """The modules' own numbers and texts, which Python may change as they compute."""
    kinds = (int, float, bool, str)
    return {
        m: {k: v for k, v in m.__dict__.items() if type(v) in kinds and k != "training"}
        for m in model.modules()
    }


def changed(model: nn.Module, before: Mapping[nn.Module, Mapping[str, Any]]) -> str:
    """What `counted` counts otherwise by now, by name."""
    now = counted(model)
    names = {m: name for name, m in model.named_modules()}
    return ", ".join(
        f"{names[m]}.{key}".lstrip(".")
        for m, numbers in now.items()
        for key, value in numbers.items()
        if m in before and before[m].get(key, value) != value
    )


def structure(model: nn.Module) -> list[Any]:
    """The modules' kinds, their tensors' shapes, and how planned layers multiply."""
    found: list[Any] = []
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = [(k, tuple(t.shape), t.dtype) for k, t in tensors.items() if t is not None]
        found.append((name, type(module).__name__, shapes, getattr(module, "formats", None)))
    return found
