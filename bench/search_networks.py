"""A whole search step of a network: as a user would write it, ours, ours as one CUDA graph, several at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparsecore.capture import Captured
from sparsecore.data import Batches, Dataset, Split
from sparsecore.engine import Engine, Way, feed_of
from sparsecore.search.steps import SearchStep

from . import measure
from .cases import StepBench, StepCase
from .measure import Job, WrongResult, timed
from .rows import Rows, add_times
from .search_cases import SearchCases


def network(
    group: Sequence[StepCase], cases: SearchCases, rows: Rows, device: torch.device
) -> None:
    """Times all providers of a network's cases together, so that they are compared under the same conditions.

    A step of several searches counts as its time divided by their number.  fp32 is PyTorch's default on a
    GPU, for every provider: convolutions in TF32, matrix products in float32.  Errors: WrongResult.
    """
    batches = synthetic(group[0], cases.samples, device)
    benches: list[StepBench] = []
    wrong: list[WrongResult] = []
    for case in group:
        bench = StepBench(case, device)
        try:
            bench.check()
            benches.append(bench)
        except WrongResult as found:
            wrong.append(found)
            bench.close()
    plain, ours = {}, {}
    for bench in benches:
        case = bench.case
        name = _name(case)
        if case.members == 1:
            plain[f"eager autograd, {_dtype(case)}"] = bench
        ours[name] = bench
    for mode in measure.modes(device):
        graph = mode == "graph"
        jobs: dict[str, Job] = {}
        for name, bench in plain.items():
            bench.prepare_plain(capturable=graph)
            step: Callable[[], Any] = bench.plain_step
            jobs[name] = Job(Captured(step, generators=[bench.plain_noise]) if graph else step)
        for name, bench in ours.items():
            jobs[name] = Job(endless(bench.step, batches, Way(graph=graph)))
        label = f"network/{group[0].name}"
        if not graph:
            steps = {name: job.step for name, job in jobs.items()}
            measure.add_peaks(rows, label, mode, steps, device)
        found = timed(jobs, device, rounds=cases.rounds, budget=0.5)
        members = {name: bench.case.members for name, bench in ours.items()}
        found = {
            name: type(spread)(*(seconds / members.get(name, 1) for seconds in spread))
            for name, spread in found.items()
        }
        add_times(rows, label, mode, found, *plain)
    for bench in benches:
        bench.close()
    if wrong:  # the others are timed all the same
        raise wrong[0]


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
