"""Scores against their formulas, and what is kept by them at once."""

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import GRANULARITIES, Blobs, mlp, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.batches import Batch
from sparsecore.granularity import NM, Granularity
from sparsecore.models import resnet_20, vit_small
from sparsecore.scores import SCORES, Score, grasp, magnitude, random, snip, synflow
from sparsecore.search import OneShot
from sparsecore.sparsities import erk_densities, kept_count, uniform_densities

Build = Callable[[], nn.Module]


class Few:
    """Labelled noise in given batches, which counts how many of them are read."""

    def __init__(self, *shape: int, labels: list[int], batch: int, dtype: torch.dtype) -> None:
        self.x, self.y = randn(len(labels), *shape, seed=5, dtype=dtype), torch.tensor(labels)
        self.batch, self.read = batch, 0

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def epoch(self, index: int) -> Iterator[Batch]:
        for part in torch.arange(len(self.y)).split(self.batch):
            self.read += 1
            yield self.x[part], self.y[part]


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    return sc.sparsify_(net).to(dtype)


def convnet() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)),
            nn.Conv2d(3, 8, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(8, 4),
        )
    )


def total(scores: dict[str, Tensor]) -> list[float]:
    return [s.double().sum().item() for s in scores.values()]


def images(*shape: int, classes: int = 3) -> list[Batch]:
    return [(randn(6, *shape), torch.arange(6) % classes)]


@pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))
def test_one_shot_keeps_exactly_the_best(score: Score) -> None:
    model, blobs = sc.sparsify_(mlp()), Blobs()
    ticket = OneShot(score)(model, blobs, sparsity=0.7)
    values = score(model, blobs, 0)
    kept = torch.cat([values[n][m] for n, m in ticket.masks.items()])
    dropped = torch.cat([values[n][~m] for n, m in ticket.masks.items()])
    assert len(kept) == 115 and kept.min() >= dropped.max()
    assert ticket.meta["method"] == next(name for name, s in SCORES.items() if s is score)


def test_magnitude_is_the_nearest_network_of_all() -> None:
    model = sc.sparsify_(mlp(features=2, hidden=2, classes=3))  # 4 + 6 weights
    weights = torch.cat([w.raw_weight.flatten() for w in sc.sparse_layers(model).values()])
    ticket = OneShot(magnitude)(model, Blobs(features=2), sparsity=0.6)
    found = torch.cat([m.flatten() for m in ticket.masks.values()])
    distance = {
        places: (weights[[i for i in range(10) if i not in places]] ** 2).sum().item()
        for places in itertools.combinations(range(10), 4)
    }
    assert tuple(found.nonzero().flatten().tolist()) == min(distance, key=distance.__getitem__)


def test_snip_is_the_derivative_in_a_mask() -> None:
    model, blobs = sc.sparsify_(mlp()), Blobs(batch=256)
    values = snip(model, blobs, 0)
    layer = sc.sparse_layers(model)["0"]
    x, y = blobs.x.double(), blobs.y
    model.double()
    losses = []
    for factor in (1 + 1e-4, 1 - 1e-4):
        scaled = layer.raw_weight.detach().clone()
        scaled[3, 2] *= factor
        parameters = {"0.weight": scaled}
        losses.append(F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y))
    expected = abs(losses[0] - losses[1]).item() / 2e-4
    assert values["0"][3, 2].item() == pytest.approx(expected, rel=1e-3)


def test_snip_counts_every_sample_the_same() -> None:
    """Batches of 64, 64 and so on with a last one of 3 are one batch of all; of even ones, a sum of means."""
    model, blobs = sc.sparsify_(mlp()), Blobs(count=195)
    batches = list(blobs.epoch(0))
    assert [len(y) for _, y in batches] == [64, 64, 64, 3]
    together = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    parts, whole = snip(model, batches, 0), snip(model, together, 0)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value * 195 / 64, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [24, 5], ids=["whole", "in parts"])
def test_grasp_against_the_explicit_hessian(batch: int) -> None:
    model = small()
    data = Few(4, labels=[i % 3 for i in range(24)], batch=batch, dtype=torch.float64)
    values = grasp(model, data.epoch(0), 0)
    names = ["0.weight", "2.weight"]
    start = [p.detach() for n, p in model.named_parameters() if n in names]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in start])
        parameters = {n: p.view_as(w) for n, p, w in zip(names, parts, start, strict=True)}
        logits = torch.func.functional_call(model, parameters, (data.x,))
        return F.cross_entropy(logits / 200, data.y)

    theta = torch.cat([w.flatten() for w in start])
    g = torch.autograd.functional.jacobian(loss, theta)
    expected = theta * (torch.autograd.functional.hessian(loss, theta) @ g)
    found = torch.cat([v.flatten() for v in values.values()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-16)
    assert bool((found < 0).any()) and bool((found > 0).any())


def test_what_grasp_removes_first_leaves_the_gradient_longest() -> None:
    """-2 theta Hg is the first-order change of the gradient's squared length as a weight goes."""
    model = small()
    data = Few(4, labels=[i % 3 for i in range(24)], batch=24, dtype=torch.float64)
    values = grasp(model, data.epoch(0), 0, temperature=1.0)["0"]

    def flow(weight: Tensor) -> float:
        parameters = dict(model.named_parameters()) | {"0.weight": weight.requires_grad_()}
        logits = torch.func.functional_call(model, parameters, (data.x,))
        loss = F.cross_entropy(logits, data.y)
        wanted = [parameters["0.weight"], parameters["2.weight"]]
        return sum(g.square().sum().item() for g in torch.autograd.grad(loss, wanted))

    weight = sc.sparse_layers(model)["0"].raw_weight.detach()
    for place in ((0, 0), (3, 1), (4, 2)):
        less, more = weight.clone(), weight.clone()
        less[place] *= 1 - 1e-5
        more[place] *= 1 + 1e-5
        change = (flow(less) - flow(more)) / 2e-5
        assert change == pytest.approx(-2 * values[place].item(), rel=1e-5)


def test_grasp_draws_ten_of_each_class_by_seed() -> None:
    model, seen = sc.sparsify_(mlp()), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    blobs = Blobs()

    def drawn(seed: int, batches=blobs) -> list[list[int]]:
        """Samples by forward, the first of which counts the classes."""
        seen.clear()
        grasp(model, batches.epoch(0), seed)
        return [[int((blobs.x == row).all(1).nonzero()) for row in x] for x in seen]

    first, *parts = drawn(0)
    assert len(first) == 64 and len(parts) == 2 and parts[0] == parts[1]
    assert len(set(parts[0])) == 40 and set(parts[0]) <= set(
        first
    )  # of one batch, which has enough
    assert torch.bincount(blobs.y[parts[0]]).tolist() == [10] * 4
    assert drawn(0)[1] == parts[0] and set(drawn(1)[1]) != set(parts[0])
    # Small batches: several are read and no forward sees more than one's worth.
    sizes = [len(part) for part in drawn(0, Blobs(batch=16))[1:]]
    assert max(sizes) <= 16 and sum(sizes) == 2 * 40


def test_grasp_reads_no_more_than_it_needs() -> None:
    data = Few(4, labels=[i % 3 for i in range(300)], batch=24, dtype=torch.float64)
    grasp(small(), data.epoch(0), 0)
    assert data.read == 2  # 8 of each class in the first


def test_grasp_takes_what_there_is_of_a_rare_class() -> None:
    data = Few(4, labels=[0] * 30 + [1] * 2, batch=8, dtype=torch.float64)  # and none of class 2
    assert all(v.isfinite().all() for v in grasp(small(), data.epoch(0), 0).values())
    assert data.read == 4


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_synflow_sums_over_all_paths(bias: float) -> None:
    model = sc.sparsify_(
        seeded(
            lambda: nn.Sequential(
                nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)
            )
        )
    )
    layers = sc.sparse_layers(model)
    for layer in layers.values():
        nn.init.constant_(layer.bias, bias)
    a, b, c = (layer.raw_weight.detach().abs().double() for layer in layers.values())
    expected = [torch.zeros_like(w) for w in (a, b, c)]
    for i, j, k, o in itertools.product(range(2), range(3), range(2), range(2)):
        path = a[j, i] * b[k, j] * c[o, k]
        for total_of, place in zip(expected, ((j, i), (k, j), (o, k)), strict=True):
            total_of[place] += path
    values = synflow(model, images(2), 0)
    for found, paths in zip(values.values(), expected, strict=True):
        torch.testing.assert_close(found, (paths / paths.sum()).float())


def test_synflow_is_conserved_in_every_layer_and_hidden_unit() -> None:
    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(mlp(7, 9, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 5)))
    )
    a, b, c = synflow(model, images(7), 0).values()
    assert total({"a": a, "b": b, "c": c}) == pytest.approx([1, 1, 1], rel=1e-6)
    torch.testing.assert_close(a.sum(1), b.sum(0))
    torch.testing.assert_close(b.sum(1), c.sum(0))


def test_synflow_is_conserved_in_every_layer_through_convolutions_and_normalisation() -> None:
    model = sc.sparsify_(convnet())
    values = synflow(model, images(12), 0)
    assert total(values) == pytest.approx([1, 1], rel=1e-6)
    bn = model[2]
    nn.init.zeros_(bn.weight)  # neither scale nor shift nor statistics make a difference
    nn.init.constant_(bn.bias, -3.0)
    bn.running_mean.fill_(5.0)
    bn.running_var.fill_(0.1)
    for name, again in synflow(model, images(12), 0).items():
        assert torch.equal(values[name], again)


def test_synflow_shares_the_flow_of_branches_and_shortcuts() -> None:
    """A block's branch and projection have half each, two thirds and one third after one more block."""
    model = sc.sparsify_(seeded(lambda: resnet_20((3, 8, 8), 4, shortcut="3x3")))
    sums = {name: s.sum().item() for name, s in synflow(model, images(3, 8, 8), 0).items()}
    assert sums["conv"] == pytest.approx(1) and sums["fc"] == pytest.approx(1)
    for name in ("stages.1.0.conv1", "stages.1.0.conv2", "stages.1.0.shortcut.0"):
        assert sums[name] == pytest.approx(1 / 2, abs=0.03)
    for name in ("stages.1.1.conv1", "stages.1.1.conv2"):
        assert sums[name] == pytest.approx(1 / 3, abs=0.03)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=3)


@pytest.mark.parametrize("score", [grasp, synflow])
@pytest.mark.parametrize("build", [partial(vit_small, (3, 8, 8), 3, dim=12, depth=2), swin])
def test_transformers_score_finite_numbers(build: Build, score: Score) -> None:
    model = sc.sparsify_(seeded(build))
    values = score(model, images(3, 8, 8), 0)
    assert set(values) == set(sc.sparse_layers(model))
    for s in values.values():
        assert bool(s.isfinite().all()) and bool(s.any())


def test_synflow_works_with_deep_networks_and_tells_of_those_it_cannot() -> None:
    deep = sc.sparsify_(seeded(lambda: nn.Sequential(*(nn.Linear(20, 20) for _ in range(300)))))
    for layer in sc.sparse_layers(deep).values():
        nn.init.constant_(layer.raw_weight, 10.0)  # R would be 200 ** 300
    assert total(synflow(deep, images(20), 0)) == pytest.approx([1] * 300)
    model = sc.sparsify_(mlp())
    nn.init.zeros_(model[2].weight)
    with pytest.raises(ValueError, match="weights of 0 alone in 2"):
        synflow(model, Blobs(), 0)
    nn.init.constant_(model[2].weight, torch.inf)
    with pytest.raises(ValueError, match="expected a finite sum"):
        synflow(model, Blobs(), 0)
    for score in (synflow, grasp):
        with pytest.raises(ValueError, match="at least one batch"):
            score(sc.sparsify_(mlp()), [], 0)


def test_a_network_cut_through_scores_nothing() -> None:
    model = sc.sparsify_(mlp())
    for layer in sc.sparse_layers(model).values():
        layer.pattern = sc.Masked(torch.zeros(layer.weight_shape, dtype=torch.bool))
    assert total(synflow(model, Blobs(), 0)) == [0, 0]


@pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))
def test_scores_leave_the_model_alone(score: Score) -> None:
    model = sc.sparsify_(convnet())
    model[1].weight.requires_grad_(False)
    model[4].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    def broken() -> Iterator[Batch]:
        yield from list(Blobs(classes=2).epoch(0))[:1]
        raise OSError("the disk is gone")

    score(model, Blobs().epoch(0), 0)
    if score in (snip, grasp):
        with pytest.raises(OSError, match="disk"):
            score(model, broken(), 0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("score", [snip, grasp, synflow])
def test_what_a_mask_removes_scores_nothing(score: Score) -> None:
    model = sc.sparsify_(mlp())
    mask = torch.arange(24)[:, None] % 2 == torch.arange(12) % 2
    model[0].pattern = sc.Masked(mask)
    values = score(model, Blobs(), 0)["0"]
    assert not values[~mask].any() and bool(values[mask].any())


def test_a_layer_that_takes_no_part_scores_nothing() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = mlp(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = sc.sparsify_(seeded(Aside))
    for score in (snip, grasp, synflow):
        values = score(model, Blobs(), 0)
        assert not values.pop("aside").any() and all(bool(v.any()) for v in values.values())


@pytest.mark.parametrize("distribution", [uniform_densities, erk_densities])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99, 0.999])
def test_layers_keep_their_share_of_an_exact_total(distribution, sparsity: float) -> None:
    model = sc.sparsify_(mlp())
    shapes = {name: layer.weight_shape for name, layer in sc.sparse_layers(model).items()}
    densities = distribution(shapes, 1 - sparsity)
    ticket = OneShot(magnitude, distribution=distribution)(model, Blobs(), sparsity=sparsity)
    counts = {name: int(m.sum()) for name, m in ticket.masks.items()}
    assert sum(counts.values()) == kept_count(384, sparsity)
    for name, mask in ticket.masks.items():
        assert abs(counts[name] - densities[name] * mask.numel()) < 1
        values = model.get_submodule(name).weight.detach().abs()
        best = values.flatten().topk(counts[name]).values
        assert torch.equal(values[mask].sort(descending=True).values, best)
    inverted = {name: int(m.sum()) for name, m in ticket.inverted().masks.items()}
    assert inverted == counts
    assert ticket.meta["distribution"] == distribution.__name__


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_layers_keep_their_share_in_units(granularity: Granularity) -> None:
    model = sc.sparsify_(mlp())
    search = OneShot(snip, granularity, distribution=uniform_densities)
    for mask in search(model, Blobs(), sparsity=0.6).masks.values():
        sizes = granularity.sizes(mask.shape)
        assert 0 <= 0.4 * mask.numel() - int(mask.sum()) < int(sizes.max()) + 1
        share = granularity.gather(mask.long()) / sizes
        assert bool(((share == 0) | (share == 1)).all())
        if isinstance(granularity, NM):
            assert int(mask.unflatten(1, (-1, 4)).sum(-1).max()) <= 2


def test_no_layer_is_asked_for_more_than_a_pattern_holds() -> None:
    """ERK wants the last layer denser than 2:4 holds: it gets all that there is, the first one the rest."""
    search = OneShot(magnitude, NM(2, 4), distribution=erk_densities)
    masks = search(sc.sparsify_(mlp()), Blobs(), sparsity=0.55).masks
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(kept.values()) == kept_count(384, 0.55) == 172
    assert kept == {"0": 124, "2": 48}


def test_one_shot_tells_bad_input_before_it_reads_any_data() -> None:
    class Untouched(Blobs):
        def epoch(self, index: int) -> Iterator[Batch]:
            raise AssertionError("the search has begun")

    model = sc.sparsify_(mlp())
    with pytest.raises(ValueError, match="1:4 allows at most 96 of 384 weights"):
        OneShot(snip, NM(1, 4))(model, Untouched(), sparsity=0.5)
    with pytest.raises(ValueError, match="2:4 allows at most 144 of 288 weights of 0"):
        OneShot(snip, NM(2, 4), distribution=uniform_densities)(model, Untouched(), sparsity=0.4)
    with pytest.raises(ValueError, match=r"densities: expected 38 weights kept in all .*, got 384"):
        OneShot(snip, distribution=lambda shapes, density: dict.fromkeys(shapes, 1.0))(
            model, Untouched(), sparsity=0.9
        )
    with pytest.raises(ValueError, match="0 <= sparsity < 1"):
        OneShot(snip, distribution=erk_densities)(model, Untouched(), sparsity=1.0)


def test_one_shot_follows_the_protocol_of_searches(tmp_path: Path) -> None:
    checkpoint = tmp_path / "none"
    search, model = OneShot(random), sc.sparsify_(mlp())
    ticket = search(model, Blobs(), sparsity=0.5, checkpoint=checkpoint, watch=lambda net: 1 / 0)
    assert not checkpoint.exists()
    assert ticket.hash == search(model, Blobs(), sparsity=0.5).hash


@pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))
def test_nasty_shapes(score: Score) -> None:
    """Layers of a single weight and of a single row, and all or next to nothing kept."""
    model = sc.sparsify_(
        seeded(lambda: nn.Sequential(nn.Linear(12, 1), nn.Linear(1, 1), nn.Linear(1, 4)))
    )
    for sparsity, kept in ((0.0, 17), (0.9, 1), (0.99, 0)):
        ticket = OneShot(score)(model, Blobs(), sparsity=sparsity)
        assert sum(int(m.sum()) for m in ticket.masks.values()) == kept
