"""engine="auto": a handful of steps in each way that may win; the fastest is taken, told, and remembered."""

import hashlib
import logging
import statistics
from collections.abc import Callable
from functools import cached_property
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import capture
from ..planner import cache_of, where
from ..schema import Seconds, facts
from .engine import AbstractStep, Engine, EngineError, Way, changed, check_engine, counted
from .feeds import Fed, Feed, Given

log = logging.getLogger("sparsecore")

FEW = 100  # steps: a run of fewer is over before anything has been tried
SHORT = 5.0  # seconds: nor is more than a step tried for a shorter one
COMPILES = 30.0  # seconds that compiling is taken to take, before it has been seen
_WINS = 0.9  # of the run's time, compiling included: what a compiled one must stay below
_LAYOUT = 0.97  # and of a step's time in another memory format
_STEPS, _SECONDS = 9, 1.0  # that are timed in each way; at most one step more
_ALIKE = 1e-3  # relative: sums of the same steps, launched one by one and as a graph

Make = Callable[[Way], AbstractStep]


class Tried(NamedTuple):
    """What a way takes, in seconds: a step, and what comes before the first."""

    step: float
    first: float


def launch(
    make: Make,
    feed: Feed,
    *,
    engine: str,
    steps: int,
    saved: str | None = None,
    epoch: int = 0,
    start: Way = Way(),  # noqa: B008  a value
    layouts: bool = False,
    unless: str = "",
) -> Engine:
    """The engine of a run: the one asked for, or the fastest.

    Args:
        make: the step, made for a way or changed to it, at the beginning of the run.
        feed: whose first batch of `epoch` is tried.
        steps: how many there will be, those of later runs included that share what is compiled.
        saved: the way of the run that this one goes on from, which "auto" keeps.
        start: the way that others are held against.
        layouts: whether another memory format may be taken.
        unless: why nothing but `start` may be taken without being asked for.

    Errors: ValueError for no engine's name, EngineError for a way that is not possible here.
    """
    told = ""
    if check_engine(engine) != "auto":
        way = Way.of(engine)._replace(channels_last=start.channels_last)
    elif saved is not None and (capture.possible_on(feed.device) or not Way.of(saved).graph):
        way = Way.of(saved)
    elif unless:
        way, told = start, f"{start}, {unless}"
    else:
        auto = _Auto(make, feed, epoch, steps, layouts)
        try:
            way = auto.way(start)
        except BaseException:
            make(start)  # in whose memory format the step was given
            raise
        told = auto.told
    made = Engine(make(way), feed, way)
    made.told = told
    return made


class _Auto:
    """What has been tried; arguments as `launch` takes them."""

    def __init__(self, make: Make, feed: Feed, epoch: int, steps: int, layouts: bool) -> None:
        self.make, self.feed, self.epoch, self.steps = make, feed, epoch, steps
        self.layouts, self.cache, self.start = layouts, cache_of(), Way()
        self.times: dict[Way, Tried] = {}
        self.refused: dict[Way, str] = {}
        self.tried: set[Way] = set()  # here and now, not remembered
        self.counts = ""  # what the last steps counted in Python
        self.told = ""  # what was taken and why; empty where there was nothing to choose

    def way(self, start: Way) -> Way:
        """The fastest.  The step is as it was."""
        self.start = start
        if self.steps < FEW or self._is_short(start) or not self._time(start):
            return start
        best = self._best()
        while best != start and best not in self.tried and not self._still(best):
            best = self._best()
        self.told = self._in_words(best)
        log.info("engine %s", self.told)
        return best

    def _best(self) -> Way:
        best = self.start
        if capture.possible_on(self.feed.device):
            best = self._faster(best, best._replace(graph=True))
        if self.layouts:
            best = self._faster(best, best._replace(channels_last=True), _LAYOUT)
        return self._compiled(best)

    def _still(self, way: Way) -> bool:
        """Whether what is remembered to be fastest is possible here and now, and right."""
        try:
            self._right(self.make(way), way, self._run(self.make(way), way, most=0)[1])
        except Exception as error:
            self._refuse(way, error)
        return way in self.times

    def _is_short(self, start: Way) -> bool:
        step = self.make(start)
        known = self._key(step, start) in self.cache.entries and self._time(start)
        one = self.times[start] if known else self._run(step, start, most=0)[0]
        return one.step * self.steps < SHORT

    def _faster(self, best: Way, way: Way, share: float = 1.0) -> Way:
        faster = self._time(way) and self.times[way].step < share * self.times[best].step
        return way if faster else best

    def _compiled(self, best: Way) -> Way:
        """With a compiled forward, if that pays in this run."""
        way, now = best._replace(compiled=True), self.times[best].step * self.steps
        key = self._key(self.make(best), way)  # the step itself need not be compiled for that
        if key not in self.cache.entries and now * (1 - _WINS) < COMPILES:
            self.refused[way] = f"not tried: compiling repays in longer runs than {now:.0f} s"
            return best
        if not self._time(way):
            return best
        then = self.times[way].step * self.steps + self.times[way].first
        return way if then <= _WINS * now else best

    def _time(self, way: Way) -> bool:
        """Notes the way's times, known or tried; whether it can be."""
        if way in self.refused:
            return False

        def read(entry: Any) -> Tried:
            return Tried(**facts(entry, dict[str, Seconds], "times"))

        try:
            step = self.make(way)
            made = lambda: self._tried(step, way)._asdict()  # noqa: E731
            self.times[way] = self.cache.get(self._key(step, way), made, read)
        except Exception as error:
            # What the step says to another memory format, a compiler, full memory.
            if way == self.start:
                raise
            self._refuse(way, error)
        return way in self.times

    def _refuse(self, way: Way, error: Exception) -> None:
        self.times.pop(way, None)
        why = (str(error).strip().splitlines() or [""])[0]
        self.refused[way] = (
            why if isinstance(error, EngineError) else f"{type(error).__name__}: {why}"
        )

    def _key(self, step: AbstractStep, way: Way) -> str:
        leaves = tree_leaves(self._first[0])
        shapes = [(tuple(t.shape), t.dtype) for t in leaves if isinstance(t, Tensor)]
        digest = hashlib.sha256(repr((step.facts(), shapes)).encode()).hexdigest()[:16]
        return f"engine | {where(step.device)} | {digest} | {way}"

    @cached_property
    def _first(self) -> Fed:
        """The batch that is tried."""
        self.feed.begin(self.epoch)
        self.feed.move_on()
        return self.feed.batch()

    def _tried(self, step: AbstractStep, way: Way) -> Tried:
        found, total = self._run(step, way)
        self._right(step, way, total)
        self.tried.add(way)
        return found

    def _right(self, step: AbstractStep, way: Way, total: float) -> None:
        """Errors: EngineError for a graph that does not repeat the step, whose sum after three steps is `total`."""
        if not way.graph:
            return
        _, single = self._run(step, way._replace(graph=False), most=0)
        if self.counts:
            raise EngineError(f"it counts in Python, which a graph does not: {self.counts}")
        if not abs(total - single) <= _ALIKE * abs(single):
            raise EngineError(
                f"its graph gives other numbers ({total:.6g}, launched one by one {single:.6g}): something in the "
                "step counts or draws in Python"
            )

    def _run(self, step: AbstractStep, way: Way, *, most: int = _STEPS) -> tuple[Tried, float]:
        """Some steps on the first batch, and the sum of what the first three measured."""
        given = Given(step.device)
        given.now = self._first
        with step.undone():
            before = counted(step.model)
            engine = Engine(step, given, way)
            engine.begin(self.epoch)
            step.clear()
            seen = [_seconds(engine) for _ in range(3)]  # by itself, captured, replayed
            total, begun = float(step.total.sum()), 2 if way.graph else 1
            while len(seen) - begun < most and sum(seen[begun:]) < _SECONDS:
                seen.append(_seconds(engine))
            self.counts = changed(step.model, before)
        return Tried(statistics.median(seen[begun:]), sum(seen[:begun])), total

    def _in_words(self, best: Way) -> str:
        words = [f"{best}: {1e3 * self.times[best].step:.3g} ms a step"]
        for way, took in self.times.items():
            if way == best:
                continue
            word = f"{way}: {1e3 * took.step:.3g} ms"
            if way.compiled:
                word += f" after {took.first:.3g} s of compiling"
            elif took.step < self.times[best].step:
                word += ", too little for another memory format"
            words.append(word)
        words += [f"{way}: {why}" for way, why in self.refused.items()]
        return "; ".join(words)


def _seconds(engine: Engine) -> float:
    """A step to its end."""
    start = perf_counter()
    engine()
    if engine.step.device.type == "cuda":
        torch.cuda.synchronize(engine.step.device)
    return perf_counter() - start
