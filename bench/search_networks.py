"""A whole search step of a network: as a user would write it, and ours in every way that the engine launches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch

from sparsecore.capture import Captured
from sparsecore.data import Batches, Dataset, Split
from sparsecore.engine import Engine, EngineError, Way, feed_of
from sparsecore.search.steps import SearchStep

from . import measure
from .cases import StepBench, StepCase
from .measure import Compiling, Job, Spread, WrongResult, say, timed
from .rows import Rows, add_speed_up, add_times, number
from .search_cases import SearchCases


def network(
    group: Sequence[StepCase], cases: SearchCases, rows: Rows, device: torch.device
) -> None:
    """Times all providers of a network's cases together, so that they are compared under the same conditions.

    A step of several searches counts as its time divided by their number.  fp32 is PyTorch's default on a
    GPU, for every provider: convolutions in TF32, matrix products in float32.  Eager autograd is not compiled:
    our compiled steps are held against it as it was launched otherwise, one by one or as a graph.

    Errors: WrongResult, and the first of our own, when everything else has been timed.
    """
    run = _Network(group, cases, rows, device)
    try:
        for way in measure.ways(device):
            run.time(way)
    finally:
        run.close()
    if run.problems:
        raise run.problems[0]


class _Network:
    """The cases of a network that compute the right thing."""

    def __init__(
        self, group: Sequence[StepCase], cases: SearchCases, rows: Rows, device: torch.device
    ) -> None:
        torch._dynamo.reset()
        self.label = f"network/{group[0].name}"
        self.cases, self.rows, self.device = cases, rows, device
        self.batches = synthetic(group[0], cases.samples, device)
        self.compiling = Compiling()
        self.problems: list[Exception] = []
        self.ours: dict[str, StepBench] = {}
        self.plain: dict[str, StepBench] = {}
        self.plain_times: dict[bool, dict[str, Spread]] = {}  # by whether they are graphs
        for case in group:
            bench = StepBench(case, device)
            try:
                bench.check()
            except WrongResult as error:  # the others are timed all the same
                self.problems.append(error)
                bench.close()
                continue
            self.ours[_name(case)] = bench
            if case.members == 1:
                self.plain[f"eager autograd, {_dtype(case)}"] = bench

    def time(self, way: Way) -> None:
        """Times in turn all that can be launched so, from the start on."""
        with ExitStack() as scopes:
            for bench in self.ours.values():
                scopes.enter_context(bench.step.undone())
            self._time(way)

    def _time(self, way: Way) -> None:
        jobs: dict[str, Job] = {} if way.compiled else dict(self._plain_jobs(way.graph))
        jobs |= self._our_jobs(way)
        if not (way.graph or way.compiled):
            steps = {name: job.step for name, job in jobs.items()}
            measure.add_peaks(self.rows, self.label, str(way), steps, self.device)
        if not jobs:
            return
        found = timed(jobs, self.device, rounds=self.cases.rounds, budget=0.5)
        for name, bench in self.ours.items():
            if name in found:
                found[name] = Spread(*(s / bench.case.members for s in found[name]))
        add_times(self.rows, self.label, str(way), found, *self.plain)
        if not way.compiled:
            self.plain_times[way.graph] = {name: found[name] for name in self.plain}
            return
        for name, spread in found.items():
            for other, time in self.plain_times[way.graph].items():
                add_speed_up(self.rows, self.label, name, str(way), other, time, spread)

    def _plain_jobs(self, graph: bool) -> Iterator[tuple[str, Job]]:
        for name, bench in self.plain.items():
            bench.prepare_plain(capturable=graph)
            step: Callable[[], Any] = bench.plain_step
            yield name, Job(Captured(step, generators=[bench.plain_noise]) if graph else step)

    def _our_jobs(self, way: Way) -> Iterator[tuple[str, Job]]:
        for name, bench in self.ours.items():
            what, reason = f"{name} of {self.label}, {way}", ""
            try:
                reason = self.compiling.refused() if way.compiled else ""
                if not reason:
                    yield name, Job(self._launched(name, bench, way))
            except EngineError as error:  # it is not compiled, or the device has no graphs
                reason = str(error)
            except Exception as error:
                if not way.compiled:
                    raise
                self.problems.append(error)
                said, _, _ = str(error).partition("\n")
                reason = f"{type(error).__name__}: {said}"
            if reason:
                say(f"left out: {what}: {reason}")

    def _launched(self, name: str, bench: StepBench, way: Way) -> Callable[[], None]:
        """Ours; what is compiled has computed the right thing."""
        step = endless(bench.step, self.batches, way)
        if way.compiled:
            start = perf_counter()
            bench.check()
            step()
            seconds = self.compiling.took(perf_counter() - start)
            if not way.graph:
                self.rows.add(self.label, name, str(way), "compile time", "s", number(seconds))
        return step

    def close(self) -> None:
        for bench in self.ours.values():
            bench.close()


def _dtype(case: StepCase) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype]


def _name(case: StepCase) -> str:
    last = " channels_last" if case.channels_last else ""
    several = f", {case.members} searches at once" if case.members > 1 else ""
    return f"sparsecore, {_dtype(case)}{last}{several}"


def synthetic(case: StepCase, samples: int, device: torch.device) -> Batches:
    """Random images that lie on the device, in epochs of full batches."""
    generator = torch.Generator().manual_seed(0)
    samples -= samples % case.batch
    images = torch.randint(0, 256, (samples, *case.shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (samples,), generator=generator)
    split = Split(images, labels)
    channels = case.shape[0]
    level = ((0.5,) * channels, (0.25,) * channels)
    dataset = Dataset("synthetic", split, split, 10, case.shape, *level, flip_crop=False)
    return Batches(dataset, "train", case.batch, device=device)


def endless(step: SearchStep, batches: Batches, way: Way) -> Callable[[], None]:
    """One search step a call, epoch after epoch."""
    epochs = iter(range(1 << 30))
    engine = Engine(step, feed_of(batches, step.device), way)

    def begin() -> None:
        step.begin_epoch(len(batches.labels))
        engine.begin(next(epochs))

    def following() -> None:
        if engine.feed.done == len(batches):
            begin()
        engine()

    begin()
    return following
