"""Ctrl-C at any moment of a call: the model is what it was or what the call makes of it, and the same call goes."""

import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.scores import snip

from .judge import Failure
from .task import Points, network

TIMES = 25  # moments in a try
X = Points().x[:16]

Call = Callable[[nn.Module, sc.Ticket], object]
CALLS: dict[str, tuple[Callable[[], nn.Module], Call]] = {}


def of(make: Callable[[], nn.Module]) -> Callable[[Call], Call]:
    def add(call: Call) -> Call:
        CALLS[call.__name__] = make, call
        return call

    return add


def sparse() -> nn.Module:
    return network(True).train()


def masked() -> nn.Module:
    return ticket().apply_(sparse())


def ticket() -> sc.Ticket:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.OneShot(snip)(sparse(), Points(), sparsity=0.7)


@of(sparse)
def apply(model: nn.Module, found: sc.Ticket) -> object:
    return found.apply_(model)


@of(masked)
def densify(model: nn.Module, found: sc.Ticket) -> object:
    return sc.densify_(model)


@of(masked)
def state(model: nn.Module, found: sc.Ticket) -> object:
    return sc.plan_(model, "state")


@of(masked)
def auto(model: nn.Module, found: sc.Ticket) -> object:
    return sc.plan_(model, "auto", X, cache="plans")


@of(lambda: sc.plan_(masked(), "csr"))
def mask(model: nn.Module, found: sc.Ticket) -> object:
    return sc.plan_(model, "mask")


@of(masked)
def evaluate(model: nn.Module, found: sc.Ticket) -> object:
    return sc.evaluate(model, Points())


@of(masked)
def statistics(model: nn.Module, found: sc.Ticket) -> object:
    return sc.recompute_statistics_(model, Points())


@of(sparse)
def search(model: nn.Module, found: sc.Ticket) -> object:
    return sc.JointSearch(epochs=1)(model, Points(), sparsity=0.7)


@of(sparse)
def load(model: nn.Module, found: sc.Ticket) -> object:
    found.save("t")
    return sc.Ticket.load("t")


def run(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    name = rng.choice(sorted(CALLS))
    make, call = CALLS[name]
    found, model = ticket(), make()
    before = _told(model)
    start = time.perf_counter()
    call(model, found)
    seconds, after = time.perf_counter() - start, _told(model)
    print(f"{name}: Ctrl-C within {seconds:g} s")
    for _ in range(TIMES):
        model = make()
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, seconds))
            call(model, found)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
        now = _told(model)
        if not any(_same(now, state) for state in (before, after)):
            raise Failure(f"{name}: the model is neither what it was nor what the call makes of it")
        if _same(now, before):  # or it may not be asked twice
            call(model, found)
            if not _same(_told(model), after):
                raise Failure(f"{name}: the same call again makes another model")
    return "fine"


def _told(model: nn.Module) -> tuple[list[bool], dict[str, Tensor], Tensor]:
    """Modes, tensors and outputs, which reading leaves alone."""
    modes = [
        m.training
        for m in model.modules()
        if not type(m).__module__.startswith("sparsecore.patterns")
    ]
    state = {k: v.clone() for k, v in model.state_dict().items() if "pattern" not in k}
    with torch.no_grad():
        output = model.eval()(X).clone()
    for module in model.modules():
        module.training = True
    return modes, state, output


def _same(a: tuple, b: tuple) -> bool:
    (modes, state, output), (others, tensors, expected) = a, b
    same = modes == others and state.keys() == tensors.keys()
    return (
        same
        and all(torch.equal(state[k], tensors[k]) for k in state)
        and torch.allclose(output, expected, atol=1e-5)
    )
