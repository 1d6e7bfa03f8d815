"""The check that a small model computes, trains and is restored as the full one."""

import copy
from collections.abc import Callable

import torch
from helpers import generator, rand, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import sparsecore as sc
from sparsecore.compaction import Compacted, compact


def ticketed(
    build: Callable[[], nn.Module],
    density: float,
    shape: tuple[int, ...],
    seed: int = 0,
    biases: bool = True,
) -> nn.Module:
    """A model in float64 with random masks, biases of all signs, and statistics of a few batches."""
    model = sc.sparsify_(seeded(build, seed).double())
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.raw_weight.shape, seed=1000 * seed + i) < density)
    with torch.no_grad():
        for i, module in enumerate(model.modules() if biases else ()):
            if isinstance(getattr(module, "bias", None), Tensor):
                signs = torch.randint(
                    -1, 2, module.bias.shape, generator=generator(1000 * seed + i)
                )
                # BatchNorm of a constant is rounding, of either sign: a ReLU must not ask for it.
                signs[(signs == 0) & isinstance(module, _BatchNorm)] = 1
                module.bias.copy_(0.3 * signs * rand(*signs.shape, seed=i))
        # Sparse layers pass on little; larger weights keep differences above rounding.
        for layer in sc.sparse_layers(model).values():
            layer.raw_weight.mul_((1 / density) ** 0.5)
        # A chain of BatchNorms over nearly constant channels multiplies rounding by eps ** -0.5 each.
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eps = 0.1
        model.train()
        for i in range(2):
            model(randn(8, *shape, seed=50 + i, dtype=torch.float64))
    return model


def part(compacted: Compacted, key: str, tensor: Tensor) -> Tensor:
    """What the small model has of a tensor of the full one."""
    for dim, index in enumerate(compacted.places.get(key, ())):
        tensor = tensor.index_select(dim, index)
    return tensor


def assert_close(a: Tensor, b: Tensor, what: str) -> None:
    scale = max(b.abs().max().item(), 1e-3) if b.numel() else 1.0
    assert ((a - b).abs() <= 1e-9 * scale).all(), f"{what}: {(a - b).abs().max() / scale:.2g}"


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if ".pattern." not in f".{k}"}


def assert_exact(model: nn.Module, shape: tuple[int, ...], steps: int = 20) -> Compacted:
    """Function, gradients, training and restoring agree in float64; the model is left untouched."""
    before = copy.deepcopy(model.state_dict())
    compacted = compact(model, randn(1, *shape, seed=9, dtype=torch.float64))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before | after)
    assert all(p.grad is None for p in model.parameters())

    full, small = copy.deepcopy(model), compacted.model
    assert not {p.data_ptr() for p in small.parameters()} & {
        p.data_ptr() for p in full.parameters()
    }
    test = randn(3, *shape, seed=8, dtype=torch.float64)
    optimisers = [
        torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
        for m in (full, small)
    ]
    for step in range(steps):
        if step in (0, steps - 1):
            assert_close(small.eval()(test), full.eval()(test), f"evaluation, step {step}")
        x = randn(8, *shape, seed=100 + step, dtype=torch.float64)
        outputs = []
        for m, optimiser in zip((full, small), optimisers, strict=True):
            optimiser.zero_grad()
            outputs.append(m.train()(x).flatten(1))
            F.cross_entropy(outputs[-1], torch.arange(8) % outputs[-1].shape[1]).backward()
        assert_close(outputs[1], outputs[0], f"training, step {step}")
        if step == 0:
            gradients = {k: p.grad for k, p in full.named_parameters() if p.grad is not None}
            for key, p in small.named_parameters():
                assert p.grad is not None or key not in gradients
                if p.grad is not None:
                    assert_close(p.grad, part(compacted, key, gradients[key]), f"gradient of {key}")
        for optimiser in optimisers:
            optimiser.step()
    expected, found = plain(full), plain(small)
    assert expected.keys() == found.keys()
    for key, value in found.items():
        assert_close(value, part(compacted, key, expected[key]), f"trained {key}")

    restored = compacted.restore_(copy.deepcopy(model))
    original = plain(model)
    for key, value in plain(restored).items():
        places = compacted.places.get(key, ())
        assert torch.equal(part(compacted, key, value), found[key])
        elsewhere = torch.ones_like(value, dtype=torch.bool)
        elsewhere[torch.meshgrid(*places, indexing="ij") if places else ...] = False
        assert torch.equal(value[elsewhere], original[key][elsewhere])
    for name, layer in sc.sparse_layers(restored).items():
        assert torch.equal(layer.weight, layer.raw_weight), name
    assert_close(restored.eval()(test), full.eval()(test), "restored")
    return compacted


def kept(compacted: Compacted) -> float:
    """Share of the weights that is left."""
    sizes = [layer.weights for layer in compacted.layers.values()]
    return sum(a for a, _ in sizes) / sum(b for _, b in sizes)
