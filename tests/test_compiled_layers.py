"""Every kind of sparse layer in torch.compile: one graph, compiled once, whatever the masks."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, rand, randn, seeded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.gates import HardConcrete
from sparsecore.kernels.formats import Layer, Storage
from sparsecore.kernels.sparse import state
from sparsecore.patterns import Gated

KINDS = ["masked", "gated", "state", "csr", "compact", "block:16x16"]
CONVS = ["masked", "gated", "state"]


def net(conv: bool) -> nn.Module:
    def build() -> nn.Module:
        if not conv:
            return nn.Sequential(sc.SparseLinear(24, 32), nn.ReLU(), sc.SparseLinear(32, 5))
        first = sc.SparseConv2d(3, 16, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Flatten(), sc.SparseLinear(16 * 4, 5))

    return seeded(build)


def become(model: nn.Module, kind: str, seed: int) -> nn.Module:
    """Its layers under masks of that seed, in that format; or gated."""
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        if kind == "gated":
            shape = layer.raw_weight.shape
            gated = Gated(shape, HardConcrete(), density=0.5, seed=seed, layer=i, device=DEVICE)
            layer.pattern = gated
            continue
        layer.set_mask_(rand(*layer.weight_shape, seed=2 * seed + i).to(DEVICE) < 0.5)
        if kind != "masked":
            layer.plan_(kind)
    return model


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def train(call: Callable[..., Tensor], model: nn.Module, x: Tensor, steps: int) -> list[Any]:
    """Losses of some steps, and the last gradients."""
    y = torch.arange(len(x), device=x.device) % 5
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = call(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "conv"), [(kind, False) for kind in KINDS] + [(kind, True) for kind in CONVS]
)
def test_one_graph_for_all_steps_and_copies(kind: str, conv: bool) -> None:
    if kind == "csr" and DEVICE != "cpu":
        pytest.skip("its products are the CPU's")
    torch._dynamo.reset()
    x = (randn(2, 3, 2, 2) if conv else randn(2, 24)).to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=False, backend=counter)
    model = become(net(conv).to(DEVICE), kind, seed=1)
    plain = copy.deepcopy(model)
    # The same sums in another order, and float32's rounding of them.
    for mine, theirs in zip(train(compiled, model, x, 3), train(loss_of, plain, x, 3), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    again = copy.deepcopy(model)
    if kind in ("masked", "gated"):  # others have as many values as their masks have weights
        become(again, kind, seed=2)
    train(compiled, again, x, 2)
    assert counter.frame_count == 1


FORMATS = ["state", "csr", "compact"]


@pytest.mark.parametrize("formats", [*itertools.product(FORMATS, repeat=3)])
def test_two_forwards_before_a_backward(formats: tuple[str, str, str]) -> None:
    """Products in different formats, too, whose scratch no graph may take for what it has saved."""
    torch._dynamo.reset()
    layer = seeded(lambda: sc.SparseLinear(8, 6))
    layer.set_mask_(rand(6, 8) < 0.4)
    layer.plan_(formats)
    inputs, found = [*layer.parameters(), *(randn(5, 8, seed=s) for s in (1, 2))], []
    for t in inputs:
        t.requires_grad_()
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(inputs[-1]) * call(inputs[-2])
        found.append([y, *torch.autograd.grad(y.sum(), inputs)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("last", [False, True])
def test_images_stay_in_their_memory_format(format: str, last: bool) -> None:
    torch._dynamo.reset()
    layer = seeded(lambda: sc.SparseConv2d(4, 6, 3, padding=1))
    layer.set_mask_(rand(6, 4, 3, 3) < 0.4)
    layer.plan_(format)
    x = randn(2, 4, 9, 7)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.stride() == layer(x).stride()


@pytest.mark.parametrize("format", ["state", "compact"])
def test_a_batch_of_a_size_that_no_graph_knows(format: str) -> None:
    """As experts have it; and an empty one."""
    torch._dynamo.reset()
    layer = seeded(lambda: sc.SparseLinear(8, 6))
    layer.set_mask_(rand(6, 8) < 0.4)
    layer.plan_(format)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (5, 0):
        x = randn(batch, 8)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("format", ["state", "compact"])
def test_dense_products_are_plain_operations_to_a_compiler(format: str) -> None:
    """No operator of ours, hence no Python for a layer when it runs."""
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    model = become(net(False), format, seed=1)
    torch.compile(model, fullgraph=True, backend=backend)(randn(6, 24))
    assert called and not [name for name in called if "sparsecore" in name]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_the_weight_that_a_compiler_sees(last: bool, narrow: bool) -> None:
    """Channels last and int32, as a GPU has them, too."""
    mask, values = rand(6, 5, 3, 3) < 0.4, randn(6 * 5 * 9)
    weight = torch.zeros(mask.shape)
    place = torch.arange(mask.numel()).view(mask.shape)
    if last:
        weight = weight.contiguous(memory_format=torch.channels_last)
        place = torch.arange(mask.numel()).view(6, 3, 3, 5).permute(0, 3, 1, 2)
    index, values = place[mask], values[: int(mask.sum())].requires_grad_()
    storage = Storage([index.int() if narrow else index, weight], [])
    found = state._traced_weight(values, Layer((6, 5, 3, 3), (1,) * 6), storage, torch.float32)
    assert found.stride() == weight.stride()
    assert torch.equal(found, torch.zeros(mask.shape).masked_scatter(mask, values.detach()))
    factor = randn(6, 5, 3, 3, seed=3)
    (grad,) = torch.autograd.grad((found * factor).sum(), values)
    assert torch.equal(grad, factor[mask])
