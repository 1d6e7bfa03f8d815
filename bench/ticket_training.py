"""Times of whole training steps: all providers of a case in turn, at all its sparsities together, way by way."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch

from sparsecore.engine import Engine, Way

from . import measure
from .measure import Compiling, Spread, say
from .rows import Rows, add_speed_up, add_times, number
from .ticket_cases import DENSE, MASKED, TrainCase, network, random_masks
from .ticket_steps import Reference, Step, Task, make

# What these do does not depend on what a mask holds: one of each is timed for all sparsities.
_SHARED = (DENSE, MASKED, "plan mask")
_AUTO = "plan auto"  # which may choose something else for a graph
_BEST = Way(graph=True, compiled=True)

Key = tuple[str, float]  # provider and sparsity
T = TypeVar("T")


def train_case(case: TrainCase, rows: Rows, device: torch.device, cache: Path) -> None:
    """Times every provider, launched in every way, and compares ways.

    What is not there, cannot do the case or has no time left to be compiled is left out, and said so.  What compiling
    takes is less where an earlier case or run has left parts of it.

    Args:
        cache: where "plan auto" remembers; a new file, so that the run measures for itself.

    Errors: the first of our own plans', when everything else has been timed.
    """
    torch._dynamo.reset()  # each case compiles for its own shapes, from the start
    run = _Run(case, rows, device, cache)
    for way in measure.ways(device, case.layouts, compiled=bool(case.compiled)):
        run.time(way)
    run.compare()
    if run.problems:
        raise run.problems[0]


def tasks_of(case: TrainCase, device: torch.device, cache: Path) -> dict[float, Task]:
    """By sparsity: the same model and batch, masks of its own."""
    generator = torch.Generator().manual_seed(0)
    model, classes = network(case.model, case.shape)
    layout = torch.channels_last if case.layouts[0] else torch.preserve_format
    model = model.to(device).to(memory_format=layout).train()
    x = torch.randn(case.batch, *case.shape, generator=generator).to(device, memory_format=layout)
    y = torch.randint(0, classes, (case.batch,), generator=generator).to(device)
    low = device.type == "cuda"
    masks = {s: random_masks(case, model, s) for s in case.sparsities}
    return {
        s: Task(case, model, {n: m.to(device) for n, m in masks[s].items()}, x, y, cache, low)
        for s in case.sparsities
    }


class _LeftOut(Exception):
    """What cannot be measured, through no fault of its own."""


class _Run:
    """A case's steps, each made once and launched in every way, and their times."""

    def __init__(self, case: TrainCase, rows: Rows, device: torch.device, cache: Path) -> None:
        self.case, self.rows, self.device = case, rows, device
        self.compiling = Compiling()
        self.tasks = tasks_of(case, device, cache)
        self.references = {s: Reference(task) for s, task in self.tasks.items()}
        self.steps: dict[tuple[str, float, bool], Step] = {}
        self.absent: set[str] = set()
        self.left_out: list[tuple[Key, Way]] = []
        self.problems: list[Exception] = []
        self.times: dict[Way, dict[Key, Spread]] = {}

    def time(self, way: Way) -> None:
        """Launches, in turn, all that can be launched so and computes the right thing."""
        with ExitStack() as scopes:
            launched: dict[Key, tuple[Step, Engine]] = {}
            for key in self._keys(way):
                if self._is_left_out(key, way):
                    continue
                try:
                    with ExitStack() as scope:
                        launched[key] = self._launched(key, way, scope)
                        scopes.push(scope.pop_all())
                except ImportError as error:
                    say(f"left out: {key[0]}: {error}")
                    self.absent.add(key[0])
                except Exception as error:
                    self._leave_out(key, way, error)
            if not way.compiled and way.channels_last == self.case.layouts[0]:
                self._add_facts(way, launched)
            if launched:
                self._add_times(way, {key: engine for key, (_, engine) in launched.items()})

    def compare(self) -> None:
        """Each way with eager steps of the same provider, and with a dense model's that are compiled and a graph."""
        layouts = self.case.layouts
        eager = self.times.get(Way(channels_last=layouts[0]), {})
        best = self.times.get(_BEST._replace(channels_last=layouts[-1]), {})
        for way, spreads in self.times.items():
            for sparsity in self.tasks:
                known = self._at(eager, sparsity) if spreads is not eager else {}
                dense = self._at(best, sparsity).get(DENSE)
                for provider, spread in self._at(spreads, sparsity).items():
                    where = self.rows, self.case.at(sparsity), provider, str(way)
                    if provider in known:
                        add_speed_up(*where, "eager", known[provider], spread)
                    if dense is not None:
                        add_speed_up(*where, f"{DENSE}, {_BEST}", dense, spread)

    def _keys(self, way: Way) -> list[Key]:
        case = self.case
        return [
            (provider, sparsity)
            for sparsity in case.sparsities
            for provider in (case.compiled if way.compiled else case.providers)
            if case.wants(provider, sparsity)
            and not (provider in _SHARED and sparsity != case.sparsities[0])
        ]

    def _is_left_out(self, key: Key, way: Way) -> bool:
        """What was left out in one way is in all that are that and more."""
        return key[0] in self.absent or any(
            key == other and all(a <= b for a, b in zip(where, way, strict=True))
            for other, where in self.left_out
        )

    def _leave_out(self, key: Key, way: Way, error: Exception) -> None:
        """What fails is not timed; only our own failures count as such."""
        said, _, _ = str(error).partition("\n")
        kind = "" if isinstance(error, _LeftOut) else f"{type(error).__name__}: "
        where = "" if way == Way() else f", {way}"
        say(f"left out: {key[0]} of {self.case.at(key[1])}{where}: {kind}{said}")
        self.left_out.append((key, way))
        if key[0].startswith("plan") and not isinstance(error, _LeftOut):
            self.problems.append(error)

    def _launched(self, key: Key, way: Way, scope: ExitStack) -> tuple[Step, Engine]:
        """A step behind its first, which computed the right thing."""
        (provider, sparsity), new = key, way.compiled and not way.graph
        step = self._step(provider, sparsity, way.graph and provider == _AUTO)
        if way.compiled and (reason := self.compiling.refused()):
            raise _LeftOut(reason)
        start = perf_counter()
        engine = scope.enter_context(step.launched(way))
        if provider == DENSE:  # another function than dense*mask
            for _ in range(1 + way.graph):  # a graph is captured in its second step
                engine()
        else:
            known = self.references[sparsity]
            own = known if step.task is self.tasks[sparsity] else Reference(step.task)
            own.require(f"{provider} of {self.case.at(sparsity)}, {way}", step, engine)
        if new:
            seconds = self.compiling.took(perf_counter() - start)
            for s in self.tasks if provider in _SHARED else [sparsity]:
                where = self.case.at(s), provider, str(way)
                self.rows.add(*where, "compile time", "s", number(seconds))
        return step, engine

    def _step(self, provider: str, sparsity: float, captured: bool) -> Step:
        """The step, made when it is first asked for: copies would be compiled each."""
        key = provider, sparsity, captured
        if key not in self.steps:
            try:
                self.steps[key] = make(provider, self.tasks[sparsity], captured=captured)
            except ValueError as error:
                raise _LeftOut(str(error)) from error
        return self.steps[key]

    def _at(self, found: Mapping[Key, T], sparsity: float) -> dict[str, T]:
        """What belongs to a sparsity, in the case's order."""
        first = self.case.sparsities[0]
        keys = ((p, first if p in _SHARED else sparsity) for p in self.case.providers)
        return {key[0]: found[key] for key in keys if key in found}

    def _add_facts(self, way: Way, launched: Mapping[Key, tuple[Step, Engine]]) -> None:
        """Bytes of a step's state, and what a plan that chooses chose; on a GPU what steps hold at most."""
        for sparsity in self.tasks:
            case, here = self.case.at(sparsity), self._at(launched, sparsity)
            for provider, (step, _) in here.items():
                if way.graph and provider != _AUTO:
                    continue  # as launched one by one
                for metric, size in step.sizes().items():
                    self.rows.add(case, provider, str(way), metric, "bytes", str(size))
                if provider in (_AUTO, "plan block") and (formats := step.formats()):
                    self.rows.add(case, provider, str(way), "formats", "", formats)
            if self.device.type == "cuda" and not way.graph:
                engines = {provider: engine for provider, (_, engine) in here.items()}
                measure.add_peaks(self.rows, case, str(way), engines, self.device)

    def _add_times(self, way: Way, engines: Mapping[Key, Engine]) -> None:
        named = {f"{provider} {sparsity}": (provider, sparsity) for provider, sparsity in engines}
        steps = {name: engines[key] for name, key in named.items()}
        found = measure.whole_steps(steps, self.device, self.case.seconds)
        self.times[way] = {named[name]: spread for name, spread in found.items()}
        for sparsity in self.tasks:
            spreads = self._at(self.times[way], sparsity)
            add_times(self.rows, self.case.at(sparsity), str(way), spreads, MASKED, DENSE)
