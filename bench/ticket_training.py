"""Times of whole training steps: all providers of a case in turn, at all its sparsities together."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsecore.capture import Captured

from . import measure
from .measure import Job, Spread, timed, times_within
from .rows import Rows, add_times
from .search_suite import say
from .ticket_cases import COMPILED, DENSE, MASKED, TrainCase, network, random_masks
from .ticket_steps import Reference, Step, Task, make

# What these do does not depend on what a mask holds: one of each is timed for all sparsities.
_SHARED = (DENSE, MASKED, "plan mask", DENSE + COMPILED, MASKED + COMPILED)
_AGAINST = (MASKED, DENSE, MASKED + COMPILED, DENSE + COMPILED)

Key = tuple[str, float]  # provider and sparsity
T = TypeVar("T")


def train_case(
    case: TrainCase, rows: Rows, device: torch.device, cache: Path, *, quick: bool = False
) -> None:
    """Times every provider, launched one by one and, if the case asks for it, as a graph.

    What is not there or cannot do the case is left out, and said so.

    Args:
        cache: where "plan auto" remembers; a new file, so that the run measures for itself.

    Errors: the first of our own plans', when everything else has been timed.
    """
    torch._dynamo.reset()  # each case compiles for its own shapes, from the start
    tasks = _tasks(case, device, cache)
    steps, problems = _checked(case, tasks)
    for sparsity in tasks:
        for provider, step in _at(steps, case, sparsity).items():
            _add_facts(rows, case.at(sparsity), provider, step)
        if device.type == "cuda":
            measure.add_peaks(rows, case.at(sparsity), "eager", _at(steps, case, sparsity), device)
    _add_times(rows, case, "eager", tasks, steps, device, quick)
    if case.graph and "graph" in measure.modes(device):
        keys = [key for key in steps if COMPILED not in key[0]]
        steps.clear()
        graphs = _captured(case, tasks, keys, rows)
        _add_times(rows, case, "graph", tasks, graphs, device, quick)
    if problems:
        raise problems[0]


def _tasks(case: TrainCase, device: torch.device, cache: Path) -> dict[float, Task]:
    """By sparsity: the same model and batch, masks of its own."""
    generator = torch.Generator().manual_seed(0)
    model, classes = network(case.model, case.shape)
    layout = torch.channels_last if case.channels_last else torch.preserve_format
    model = model.to(device).to(memory_format=layout).train()
    x = torch.randn(case.batch, *case.shape, generator=generator).to(device, memory_format=layout)
    y = torch.randint(0, classes, (case.batch,), generator=generator).to(device)
    low = device.type == "cuda"
    masks = {s: random_masks(case, model, s) for s in case.sparsities}
    return {
        s: Task(case, model, {n: m.to(device) for n, m in masks[s].items()}, x, y, cache, low)
        for s in case.sparsities
    }


def _checked(
    case: TrainCase, tasks: Mapping[float, Task]
) -> tuple[dict[Key, Step], list[Exception]]:
    """The steps that are there and compute the right thing, after their first one; errors of our own."""
    steps: dict[Key, Step] = {}
    problems: list[Exception] = []
    first, absent = case.sparsities[0], set()
    for sparsity, task in tasks.items():
        reference = Reference(task)
        for provider in case.providers:
            if (provider in _SHARED and sparsity != first) or not case.wants(provider, sparsity):
                continue
            if provider in absent:
                continue
            what = f"{provider} of {case.at(sparsity)}"
            try:
                step = make(provider, task)
            except ImportError as error:
                say(f"left out: {provider}: {error}")
                absent.add(provider)
                continue
            except ValueError as error:
                say(f"left out: {what}: {error}")
                continue
            except Exception as error:
                _note(problems, what, error)
                continue
            try:
                if provider.startswith(DENSE + COMPILED) or provider == DENSE:
                    step()  # another function than dense*mask
                else:
                    own = reference if step.task is task else Reference(step.task)
                    own.require(what, step)
            except Exception as error:
                _note(problems, what, error)
                continue
            steps[provider, sparsity] = step
    return steps, problems


def _note(problems: list[Exception], what: str, error: Exception) -> None:
    """What fails is not timed; only our own failures count as such."""
    said, _, _ = str(error).partition("\n")
    say(f"left out: {what}: {type(error).__name__}: {said}")
    if what.startswith("plan"):
        problems.append(error)


def _at(found: Mapping[Key, T], case: TrainCase, sparsity: float) -> dict[str, T]:
    """What belongs to a sparsity, in the case's order."""
    first = case.sparsities[0]
    keys = ((p, first if p in _SHARED else sparsity) for p in case.providers)
    return {key[0]: found[key] for key in keys if key in found}


def _captured(
    case: TrainCase, tasks: Mapping[float, Task], keys: list[Key], rows: Rows
) -> dict[Key, Callable[[], Any]]:
    """The same steps as CUDA graphs, from new models: a graph takes no part of what ran outside it."""
    graphs: dict[Key, Callable[[], Any]] = {}
    for provider, sparsity in keys:
        try:
            step = make(provider, replace(tasks[sparsity], captured=True))
            if provider == "plan auto":  # it may choose something else for a graph
                Reference(step.task).require(f"{provider} of {case.at(sparsity)}", step)
                rows.add(case.at(sparsity), provider, "graph", "formats", "", step.formats())
            graphs[provider, sparsity] = Captured(step)
        except Exception as error:
            say(f"left out: {provider} of {case.at(sparsity)} as a graph: {error}")
    return graphs


def _add_times(
    rows: Rows, case: TrainCase, mode: str, tasks: Mapping[float, Task],
    steps: Mapping[Key, Callable[[], Any]], device: torch.device, quick: bool,
) -> None:  # fmt: skip
    if not steps:
        return
    named = {f"{provider} {sparsity}": (provider, sparsity) for provider, sparsity in steps}
    found: Mapping[str, Spread]
    if device.type == "cuda":
        jobs = {name: Job(steps[key]) for name, key in named.items()}
        found = timed(jobs, device, budget=0.5)
    else:
        runs = {name: steps[key] for name, key in named.items()}
        least = 2 if quick else 3
        found = times_within(runs, case.seconds, least=least)
    spreads = {named[name]: spread for name, spread in found.items()}
    for sparsity in tasks:
        add_times(rows, case.at(sparsity), mode, _at(spreads, case, sparsity), *_AGAINST)


def _add_facts(rows: Rows, case: str, provider: str, step: Step) -> None:
    """Bytes of a step's state, and what a plan that chooses chose."""
    for metric, size in step.sizes().items():
        rows.add(case, provider, "eager", metric, "bytes", str(size))
    if provider.startswith(("plan auto", "plan block")) and (formats := step.formats()):
        rows.add(case, provider, "eager", "formats", "", formats)
