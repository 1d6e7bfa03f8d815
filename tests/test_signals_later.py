"""A signal at any line of what puts a model back comes when that is whole."""

import signal
import sys
from threading import Thread
from types import FrameType
from typing import Any

import pytest
from helpers import Blobs, equal, seeded
from torch import nn

import sparsecore as sc
from sparsecore.interrupts import signals_later

WHERE = ("convert.py", "gated.py", "claims.py", "evaluation.py", "batchnorm.py")


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
    """Ctrl-C at the line number `at` of those that end what these files have begun."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.line if frame.f_code.co_filename.endswith(WHERE) else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                signal.raise_signal(signal.SIGINT)
        return self.line


def network() -> nn.Module:
    parts = lambda: nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))  # noqa: E731
    model = sc.sparsify_(seeded(parts))
    model[2].eval()
    return model


CALLS = {
    "search": lambda m: sc.JointSearch(epochs=1)(m, Blobs(count=64, batch=64), sparsity=0.5),
    "evaluate": lambda m: sc.evaluate(m, Blobs(count=64, batch=64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_is_whole_after_a_signal_anywhere(name: str) -> None:
    model, call = network(), CALLS[name]
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    whole = At(-1)
    sys.settrace(whole)
    call(model)
    sys.settrace(None)
    step = max(1, whole.count // 150)
    for at in range(1, whole.count + 1, step):
        trace = At(at)
        sys.settrace(trace)
        try:
            call(model)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert [m.training for m in model.modules()] == modes, at
        assert equal(state, dict(model.state_dict())), at
        assert [p.requires_grad for p in model.parameters()] == flags, at
        other: list[Any] = []
        thread = Thread(target=lambda: other.append(sc.evaluate(model, Blobs(count=64, batch=64))))
        thread.start()
        thread.join()
        assert other, f"still claimed after an interrupt at {at}"
