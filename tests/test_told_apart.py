"""What tells losses apart: what they compute, in any process, and never where they lie."""

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.losses import Loss
from sparsecore.told_apart import network, told_apart
from sparsecore.training import Recipe, train

ALPHA = 0.1


def weighed(weight: Any) -> Callable[..., Tensor]:
    return lambda o, t: weight * F.cross_entropy(o, t)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.inner = scale, nn.CrossEntropyLoss()

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        return self.scale * self.inner(o, t)


class Object:
    def __init__(self, power: float, logger: Any = None) -> None:
        self.power, self.logger = power, logger

    def __call__(self, o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) ** self.power

    def method(self, o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) * self.power


def configured(alpha: float, step: int = 0) -> Callable[..., Tensor]:
    config, logger = SimpleNamespace(alpha=alpha, step=step), SimpleNamespace(written=step)
    return lambda o, t: (config.alpha + 0 * bool(logger)) * F.cross_entropy(o, t)


def with_default(alpha: float) -> Callable[..., Tensor]:
    def loss(o: Tensor, t: Tensor, a: float = alpha, *, b: float = 1.0) -> Tensor:
        return a * b * F.cross_entropy(o, t)

    return loss


PAIRS: dict[str, Callable[[float], Any]] = {
    "closure": weighed,
    "tensor": lambda k: weighed(torch.tensor([1.0, k])),
    "container": lambda k: weighed({"a": (1, [k])}),
    "module in a closure": lambda k: weighed(nn.CrossEntropyLoss(label_smoothing=k / 9)),
    "function in a closure": lambda k: weighed(weighed(k)),
    "default": with_default,
    "class weights": lambda k: nn.CrossEntropyLoss(weight=torch.tensor([1.0, k])),
    "attribute": lambda k: nn.CrossEntropyLoss(label_smoothing=k / 9),
    "own module": Scaled,
    "partial": lambda k: functools.partial(F.cross_entropy, label_smoothing=k / 9),
    "object": Object,
    "method": lambda k: Object(k).method,
    "configuration": configured,
    "compiled": lambda k: torch.compile(weighed(k), backend="eager"),
    "compiled module": lambda k: torch.compile(Scaled(k), backend="eager"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_values_tell_and_addresses_do_not(kind: str) -> None:
    make = PAIRS[kind]
    assert told_apart(make(1.0)) == told_apart(make(1.0)) != told_apart(make(2.0))
    assert Loss(make(1.0)).facts == Loss(make(1.0)).facts != Loss(make(2.0)).facts


def test_code_tells() -> None:
    fns: list[Callable[..., Any]] = [
        lambda o, t: F.cross_entropy(o, t),
        lambda o, t: F.nll_loss(o, t),
        lambda o, t: -F.cross_entropy(o, t),
        lambda o, t: 2 * F.cross_entropy(o, t),
        lambda o, t: 3 * F.cross_entropy(o, t),
        lambda o, t: (lambda u: 2 * u)(F.cross_entropy(o, t)),
        lambda o, t: (lambda u: 3 * u)(F.cross_entropy(o, t)),
        lambda o, t: ALPHA * F.cross_entropy(o, t),
        F.cross_entropy,
        F.nll_loss,
    ]
    assert len({told_apart(fn) for fn in fns}) == len(fns)


def test_a_global_number_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    fn = lambda o, t: ALPHA * F.cross_entropy(o, t)  # noqa: E731
    before = told_apart(fn)
    monkeypatch.setattr(sys.modules[__name__], "ALPHA", 0.2)
    assert told_apart(fn) != before


def test_what_only_watches_does_not_tell() -> None:
    assert told_apart(configured(1.0, step=1)) == told_apart(configured(1.0, step=2))
    module = nn.CrossEntropyLoss()
    before = told_apart(module)
    module.eval().register_forward_hook(lambda *_: None)
    assert told_apart(module) == before


def test_names_and_the_default_are_told_as_ever() -> None:
    assert Loss().facts == ()
    assert Loss("mse").facts == ("loss", "mse", None)
    assert Loss(class_axis=1).facts == ("loss", "cross-entropy", 1)
    assert Loss("cross-entropy", label_smoothing=0.1).facts != Loss("cross-entropy").facts
    assert Loss(scores=lambda o: o[0]).facts != Loss(scores=lambda o: o[1]).facts


ELSEWHERE = """
import functools, torch
from torch.nn import functional as F
names = {"a", "b", "c"}
class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.names = torch.ones(3), {"x", "y", "z"}
    def forward(self, o, t):
        return F.cross_entropy(o, t, self.weight) if "u" in {"u", "v", "w"} else o
around = lambda names: lambda o, t: F.cross_entropy(o, t) + len(names)
losses = [Loss(), around(names), functools.partial(F.cross_entropy, label_smoothing=0.1), Loss().forward]
"""


def test_another_process_tells_the_same() -> None:
    """Its addresses and the order of its sets are others."""
    here: dict[str, Any] = {"__name__": "elsewhere"}
    exec(ELSEWHERE, here)
    code = f"{ELSEWHERE}\nfrom sparsecore.told_apart import told_apart\nprint(*map(told_apart, losses))"
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert told == [told_apart(loss) for loss in here["losses"]]


def test_a_run_and_rounds_of_another_loss_are_refused(tmp_path: Path) -> None:
    x, y = randn(16, 6), torch.arange(16) % 3
    data, recipe = [(x, y)] * 2, Recipe(optimizer="adam", lr=0.05, batch=16, epochs=2)
    net = lambda: sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))))  # noqa: E731
    losses = [nn.CrossEntropyLoss(weight=torch.tensor([1.0, k, 1.0])) for k in (1.0, 9.0)]
    path = tmp_path / "run"
    train(net(), data, None, recipe, loss=losses[0], checkpoint=path)
    train(
        net(), data, None, recipe, loss=nn.CrossEntropyLoss(weight=torch.ones(3)), checkpoint=path
    )
    with pytest.raises(ValueError, match="belongs to another run"):
        train(net(), data, None, recipe, loss=losses[1], checkpoint=path)
    search = sc.Rewinding(recipe, 1, rate=0.5, rounds=tmp_path / "rounds")
    search(net(), data, sparsity=0.5, loss=losses[0])
    with pytest.raises(ValueError, match="belongs to another run"):
        search(net(), data, sparsity=0.5, loss=losses[1])


class Scripted(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("make", [torch.jit.script, torch.compile])
def test_losses_that_were_scripted_or_compiled_are_told_too(make: Callable) -> None:
    first, again = (told_apart(make(Scripted())) for _ in range(2))
    assert first == again != told_apart(nn.MSELoss())
    assert sc.Loss(make(Scripted())).facts


def networks() -> list[nn.Module]:
    return [
        seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))),
        seeded(lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
        seeded(lambda: nn.LSTM(6, 4)),
        seeded(lambda: sc.models.resnet_20((3, 8, 8), 3)),
    ]


@pytest.mark.parametrize("i", range(4))
def test_a_sparse_network_in_a_loss_is_told_at_once(i: int) -> None:
    """By weights and masks: what layers hold besides gathers as they compute."""
    net = sc.sparsify_(networks()[i])
    decay = lambda o, t: F.cross_entropy(o, t) + sum(p.pow(2).sum() for p in net.parameters())  # noqa: E731
    start = time.perf_counter()
    before = told_apart(decay)
    assert time.perf_counter() - start < 2
    x = randn(4, 3, 8, 8) if i == 3 else randn(4, 5, 6) if i else randn(4, 6)
    net.eval()(x)
    assert told_apart(decay) == before
    for layer in sc.sparse_layers(net).values():
        layer.set_mask_(torch.ones(layer.weight_shape, dtype=torch.bool))
    masked = told_apart(decay)
    net(x)
    assert told_apart(decay) == masked
    for layer in sc.sparse_layers(net).values():
        layer.set_mask_(
            torch.rand(layer.weight_shape, generator=torch.Generator().manual_seed(1)) > 0.5
        )
    assert told_apart(decay) not in (before, masked)


CIRCLE = "def f{i}(o, t):\n    return " + " + ".join(f"f{{{n}}}(o, t)" for n in "abcd")


def test_functions_that_name_each_other_take_no_longer_than_their_number() -> None:
    around: dict[str, Any] = {"__name__": "circle"}
    for i in range(400):
        near = {n: (i * 7 + k * k + 1) % 400 for k, n in enumerate("abcd")}
        exec(CIRCLE.format(i=i, **near), around)
    start = time.perf_counter()
    told = told_apart(around["f0"])
    assert time.perf_counter() - start < 2
    around["f399"] = lambda o, t: o
    assert told_apart(around["f0"]) != told


def test_objects_in_circles_and_sets_are_told() -> None:
    def ring(*values: float) -> Object:
        found = [Object(v) for v in values]
        for a, b in zip(found, [*found[1:], found[0]], strict=True):
            a.next, a.all = b, set(found)  # type: ignore[attr-defined]
        return found[0]

    assert told_apart(ring(1, 2, 3)) == told_apart(ring(1, 2, 3)) != told_apart(ring(1, 2, 4))


def test_containers_beyond_the_stack_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(ValueError, match="some hundred containers"):
        told_apart(lambda o, t: deep and o)


CALLS = 0


def counting(output: Tensor, target: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return F.cross_entropy(output, target) * ALPHA


def test_a_global_that_counts_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    before = told_apart(counting)
    counting(randn(2, 3), torch.tensor([0, 1]))
    assert CALLS and told_apart(counting) == before
    monkeypatch.setattr(sys.modules[__name__], "ALPHA", 0.7)
    assert told_apart(counting) != before


CONFIG: Any = None


def by_entry(outputs: Tensor, targets: Tensor) -> Tensor:
    return CONFIG["alpha"][0] * F.cross_entropy(outputs, targets)


def by_attribute(outputs: Tensor, targets: Tensor) -> Tensor:
    return CONFIG.alpha * F.cross_entropy(outputs, targets)


def logging(outputs: Tensor, targets: Tensor) -> Tensor:
    CONFIG["log"].append(float(outputs.sum()))
    return F.cross_entropy(outputs, targets)


def counting_in_it(outputs: Tensor, targets: Tensor) -> Tensor:
    CONFIG["calls"] += 1
    return F.cross_entropy(outputs, targets)


def test_settings_in_a_global_tell_unless_they_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(loss: Callable, config: Any) -> str:
        monkeypatch.setattr(sys.modules[__name__], "CONFIG", config)
        return told_apart(loss)

    assert told(by_entry, {"alpha": [1.0]}) == told(by_entry, {"alpha": [1.0]})
    assert told(by_entry, {"alpha": [1.0]}) != told(by_entry, {"alpha": [2.0]})
    one, two = (SimpleNamespace(alpha=alpha, seen=alpha) for alpha in (1.0, 2.0))
    assert told(by_attribute, one) != told(by_attribute, two)
    assert told(by_attribute, one) == told(by_attribute, SimpleNamespace(alpha=1.0, seen=5.0))
    assert told(logging, {"log": []}) == told(logging, {"log": [1.0]})
    assert told(counting_in_it, {"calls": 0}) == told(counting_in_it, {"calls": 1})
    made = [{"alpha": [1.0], "made": object()} for _ in range(2)]  # a registry, not settings
    assert told(by_entry, made[0]) == told(by_entry, made[1] | {"more": 1})


class Net(nn.Module):
    def __init__(
        self, rate: float = 0.0, scale: float = 1.0, activation: Callable = F.relu
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.drop, self.scale, self.activation, self.calls = nn.Dropout(rate), scale, activation, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * self.last(self.drop(self.activation(self.first(x))))


class Other(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x)).tanh())


NETWORKS = {
    "same": Net,
    "rate": lambda: Net(rate=0.5),
    "attribute": lambda: Net(scale=2.0),
    "function": lambda: Net(activation=F.gelu),
    "forward": Other,
    "relu": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "heads": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "other heads": lambda: nn.TransformerEncoderLayer(8, 4, 16),
    "norm first": lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True),
    "stride": lambda: nn.Conv2d(3, 3, 3, stride=2),
    "no stride": lambda: nn.Conv2d(3, 3, 3),
    "eps": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=1e-3)),
    "other eps": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
}


@pytest.mark.parametrize("change", [lambda m: m, sc.sparsify_])
def test_networks_of_the_same_weights_are_told_apart(change: Callable) -> None:
    found = {name: network(change(seeded(make))) for name, make in NETWORKS.items()}
    assert len({*found.values()}) == len(found)
    again = {name: network(change(seeded(make, 1))) for name, make in NETWORKS.items()}
    assert again == found  # whatever their values


def test_a_network_is_told_the_same_however_far_it_is() -> None:
    model = sc.sparsify_(seeded(Net))
    before = network(model)
    model.eval()(randn(4, 6))
    ticket = sc.OneShot(
        lambda model, *_: {n: randn(*x.weight_shape) for n, x in sc.sparse_layers(model).items()}
    )
    ticket(model, [(randn(4, 6), torch.arange(4) % 3)], sparsity=0.5).apply_(model)
    assert network(model) == before
    assert network(sc.plan_(model, "state")) == before
    alone = sc.sparse_layers(sc.plan_(model, "mask"))["first"]
    before = network(alone)
    sc.plan_(model, "state")
    assert network(alone) == before


@pytest.mark.parametrize("other", ["rate", "forward", "attribute"])
def test_a_run_of_another_network_is_refused(other: str, tmp_path: Path) -> None:
    data, recipe = [(randn(16, 6), torch.arange(16) % 3)] * 2, Recipe(lr=0.05, batch=16, epochs=2)
    model, path = (lambda name: sc.sparsify_(seeded(NETWORKS[name]))), tmp_path / "run"
    for run in (
        lambda name: train(model(name), data, None, recipe, checkpoint=path),
        lambda name: sc.JointSearch(epochs=1)(model(name), data, sparsity=0.5, checkpoint=path),
        lambda name: sc.Rewinding(recipe, 1, rate=0.5, rounds=tmp_path / "rounds")(
            model(name), data, sparsity=0.5
        ),
    ):
        run("same")
        run("same")
        with pytest.raises(ValueError, match="belongs to another"):
            run(other)
        path.unlink(missing_ok=True)
