"""A signal at any line of what puts a model back comes when that is whole."""

import linecache
import pickle
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blobs, equal, seeded
from torch import nn

import sparsecore as sc
from sparsecore import claims, locks, process
from sparsecore.interrupts import signals_later

# Functions that begin something and end it, once a call.
WHERE = (
    "batch_statistics",
    "_gated",
    "claimed",
    "_evaluating",
    "put_back",
    "give_back",
    "ending_with",
    "given_back",
    "held",
    "process.py",
)
BLOBS = Blobs(count=64, batch=64)


def test_a_signal_comes_at_the_end_of_the_block() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), signals_later():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_inside_is_not_lost() -> None:
    with pytest.raises(KeyError), signals_later():
        raise KeyError("own")
    with pytest.raises(KeyboardInterrupt) as found, signals_later():
        signal.raise_signal(signal.SIGINT)
        raise KeyError("own")
    assert isinstance(found.value.__context__, KeyError)


def test_ignored_signals_and_other_threads_are_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals_later():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    seen: list[Any] = []

    def other() -> None:
        with signals_later():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


class At:
    """Ctrl-C at the line number `at` of functions or files of these names."""

    def __init__(self, at: int, names: tuple[str, ...] = WHERE) -> None:
        self.at, self.names, self.count, self.where = at, names, 0, ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        known = code.co_name in self.names or code.co_filename.endswith(self.names)
        return self.line if known and self.count < self.at else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        # Between a `with` or `try` and its block signals come for tracers alone.
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not source.startswith(("with ", "try:")):
            self.count += 1
            if self.count == self.at:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self.line


def network() -> nn.Module:
    def parts() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))

    model = sc.sparsify_(seeded(parts))
    model[2].eval()
    return model


def masked(model: nn.Module) -> nn.Module:
    for layer in sc.sparse_layers(model).values():
        layer.set_mask_(torch.arange(layer.weight_shape.numel()).view(layer.weight_shape) % 3 == 0)
    return model


def interrupted(call: Callable[[], object], at: int, names: tuple[str, ...] = WHERE) -> "At | None":
    """The call with Ctrl-C at such a line; None if it had fewer."""
    trace = At(at, names)
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return None if trace.count < at else trace


def search(model: nn.Module, checkpoint: Path) -> None:
    sc.JointSearch(epochs=1)(model, BLOBS, sparsity=0.5, checkpoint=checkpoint)


def evaluate(model: nn.Module, checkpoint: Path) -> None:
    sc.evaluate(model, BLOBS)


def generators() -> list[bytes]:
    states = (
        bytes(torch.get_rng_state().tolist()),
        np.random.get_state(legacy=False),
        random.getstate(),
    )
    return [pickle.dumps(state) for state in states]


@pytest.mark.parametrize("call", [search, evaluate])
def test_all_is_given_back_after_a_signal_anywhere(call: Callable, tmp_path: Path) -> None:
    """The model, the generators and whose turn it is at them, claims and locks."""
    model, checkpoint = network(), tmp_path / "part"
    before = generators()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    at = 1
    while trace := interrupted(lambda: call(model, checkpoint), at):
        assert [m.training for m in model.modules()] == modes, trace.where
        assert equal(state, dict(model.state_dict())), trace.where
        assert [p.requires_grad for p in model.parameters()] == flags, trace.where
        assert not claims._claims and not locks._held and not process._seeded, trace.where
        assert not process.drawing.wanted and process.drawing.depth == 0, trace.where
        assert torch.backends.mha.get_fastpath_enabled(), trace.where
        assert process.drawing._owner == 0 and generators() == before, trace.where
        checkpoint.unlink(missing_ok=True)
        assert not [*tmp_path.iterdir()], trace.where
        at += 1
    assert at > 10


CHANGES: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "densify_": (masked, sc.densify_),
    "plan": (masked, lambda m: sc.plan_(m, "state")),
    "mask": (lambda m: sc.plan_(masked(m), "state"), lambda m: sc.plan_(m, "mask")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_model_is_whole_or_not_begun(name: str) -> None:
    make, change = CHANGES[name]
    at = 1
    while True:
        model = make(network())
        before = model.eval()(BLOBS.x)
        if not interrupted(lambda m=model: change(m), at, ("convert.py", "plans.py", "decided.py")):
            break
        torch.testing.assert_close(model(BLOBS.x), before)
        assert change(model) is model
        at += 1
    assert at > 10
