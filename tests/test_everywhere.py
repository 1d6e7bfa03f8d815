"""Every method by its name, at every granularity and on every network, unmodified."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rand

import sparsecore as sc
from sparsecore.data import Batches, Dataset, Split
from sparsecore.experiment import Setup, find_ticket, model_of, new_model, train_on
from sparsecore.methods import METHODS
from sparsecore.progress import Advance, Progress
from sparsecore.training import Recipe

RECIPE = Recipe(optimizer="adam", lr=1e-3, batch=32, augment=False)
GRANULARITIES = ["weight", "block:4x2", "vector:4", "channel", "2:4"]
FAST = {
    "gradual": ":updates=1",
    "gmp": ":updates=1",
    "rigl": ":interval=1",
    "edge-popup": ":epochs=1",
    "ltr": ":rate=0.5",
    "imp": ":rate=0.5",
    "lr-rewind": ":rate=0.5",
}
NETWORKS = {
    "conv-4": {"width": 0.25},
    "resnet-20": {},
    "vgg-16-bn": {"width": 0.5},
    "vit-small": {},
    "torchvision:resnet50": {},
    "torchvision:vit_b_16": {"image_size": 32},
    "torchvision:swin_t": {},
}


def pictures(count: int, channels: int = 3, size: int = 32) -> Dataset:
    images = (255 * rand(count, channels, size, size)).to(torch.uint8)
    split = Split(images, torch.arange(count) % 3)
    moments = (0.5,) * channels, (0.25,) * channels
    return Dataset("toy", split, split, 3, (channels, size, size), *moments, False)


def setup(model: str, options: dict, granularity: str = "weight") -> Setup:
    return Setup(
        model, "toy", RECIPE, options, rewind_epochs=0, train_epochs=2, search_epochs=1,
        search_batch=32, granularity=granularity,
    )  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_granularity(method: str, granularity: str, tmp_path: Path) -> None:
    """An exact count, the model left alone, a ticket that survives its file and trains."""
    data = pictures(64, 1, 8)
    own = setup("lenet-300-100", {"width": 0.08}, granularity)
    model = new_model(own, data, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def find() -> sc.Ticket:
        text = method + FAST.get(method, "")
        cpu, rounds = torch.device("cpu"), tmp_path / "rounds"
        return find_ticket(own, model, data, text, 0.6, 0, cpu, rounds=rounds, watched=True)[0]

    ticket = find()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    layers = sc.sparse_layers(model)
    total = sum(layer.weight_shape.numel() for layer in layers.values())
    kept = sum(int(mask.sum()) for mask in ticket.masks.values())
    units = own.search("cts", 0).granularity
    largest = max(int(units.sizes(layer.weight_shape).max()) for layer in layers.values())
    assert int(0.4 * total) - len(layers) * largest < kept <= int(0.4 * total + 1e-6)
    for name, mask in ticket.masks.items():
        share = units.gather(mask.long()) / units.sizes(mask.shape)
        assert bool(((share == 0) | (share == 1)).all()), name
    ticket.save(tmp_path / "t")
    loaded = sc.Ticket.load(tmp_path / "t")
    assert loaded.hash == ticket.hash
    network = model_of(loaded, data, torch.device("cpu"))
    train_on(network, own, data, 0 if loaded.finished else 1)
    for name, layer in sc.sparse_layers(network).items():
        assert not bool(layer.weight[~loaded.masks[name]].any())
        assert loaded.finished or bool((layer.weight != loaded.weights[f"{name}.weight"]).any())


class Killer(Progress):
    """Counts what a search tells; dies when it is told `steps` times, the first step half a second late."""

    def __init__(self, steps: float = math.inf) -> None:
        super().__init__(enabled=False)
        self.steps, self.done = steps, 0

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        yield Killing(self)


class Killing(Advance):
    def __init__(self, killer: Killer) -> None:
        super().__init__(None, None)
        self.killer = killer

    def __call__(self, steps: int = 1, **values: Any) -> None:
        killer = self.killer
        killer.done += 1
        if killer.steps < math.inf and killer.done == 2:  # the first is where it begins
            time.sleep(0.5)
        if killer.done == killer.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_killed_before_its_end_a_search_goes_on_and_all_its_time_counts(
    method: str, tmp_path: Path
) -> None:
    data = pictures(64, 1, 8)
    own = replace(setup("lenet-300-100", {"width": 0.08}), search_epochs=2)
    model, path = new_model(own, data, seed=0), tmp_path / "checkpoint"

    def find(progress: Progress, checkpoint: Path | None = None) -> tuple[sc.Ticket, float]:
        text, cpu = (
            method + FAST.get(method, "").replace("epochs=1", "epochs=2"),
            torch.device("cpu"),
        )
        return find_ticket(own, model, data, text, 0.6, 0, cpu, progress, checkpoint)

    whole = Killer()
    expected, _ = find(whole)
    with pytest.raises(KeyboardInterrupt) if whole.done else nullcontext():
        find(Killer(whole.done), path)
    if whole.done:  # what one score decides just starts again
        rest = Killer()
        found, seconds = find(rest, path)
        assert rest.done < whole.done and seconds > 0.5
        found.save(path.with_name("ticket"))
        assert found.hash == expected.hash and not path.exists()
        facts, told = expected.meta, found.meta
        assert told.keys() == facts.keys()
        assert all(told[name] == facts[name] for name in facts if name != "rounds")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name: str) -> None:
    """The searches that differ in what they do to a network: gates, gates with weights, scores, rounds."""
    data = pictures(8)
    own = setup(name, NETWORKS[name])
    model = new_model(own, data, seed=0)
    large = name.startswith("torchvision:")  # 25 to 86 million weights
    methods = ["joint"] if large else ["joint", "cts", "snip", "synflow:rounds=3", "ltr:rate=0.9"]
    for method in [m for m in methods if m.partition(":")[0] in METHODS]:
        ticket, _ = find_ticket(own, model, data, method, 0.9, 0, torch.device("cpu"))
        assert ticket.sparsity == pytest.approx(0.9, abs=1e-4), method
        assert set(ticket.masks) == set(sc.sparse_layers(model))


@pytest.mark.parametrize(
    "method", ["joint", "continuous", "cts", "strong", "snip", "ltr:rate=0.9", "gradual:updates=1"]
)
def test_a_search_that_trains_weights_sees_augmented_data(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that does not sees the images as they are, whatever the recipe says."""
    seen: list[tuple[int, bool]] = []
    take = Batches.take

    def watched(self: Batches, *args, **kwargs):
        seen.append((self.batch_size, self.augment))
        return take(self, *args, **kwargs)

    monkeypatch.setattr(Batches, "take", watched)
    data = replace(pictures(64, channels=1, size=8), flip_crop=True)
    plain = setup("lenet-300-100", {"width": 0.1})
    own = replace(plain, recipe=replace(RECIPE, batch=16, augment=True))
    model = new_model(own, data, seed=0)
    find_ticket(own, model, data, method, 0.9, 0, torch.device("cpu"))
    rounds = method.partition(":")[0] in ("ltr", "gradual")
    weights = rounds or method in ("joint", "continuous")
    assert set(seen) == {(16 if rounds else 32, weights)}
