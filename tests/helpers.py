"""Small things that several tests need."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparsecore as sc
from sparsecore.granularity import NM, Block, Channel, Granularity, Weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run; see conftest
GRANULARITIES: list[Granularity] = [Weight(), Block(2, 3), Block(4, 1), Channel(), NM(2, 4)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Builds a module from a seed and leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class Blobs:
    """Separable classes of points, as epochs of minibatches: what a search needs, in milliseconds."""

    def __init__(self, classes: int = 4, features: int = 12, count: int = 256, batch: int = 64):
        centres = 3 * randn(classes, features, seed=1)
        self.y = torch.arange(count) % classes
        self.x = centres[self.y] + randn(count, features, seed=2)
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch)

    def order(self, index: int) -> Tensor:
        return torch.randperm(len(self.y), generator=generator(100 + index))

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.order(index).split(self.batch):
            yield self.x[part], self.y[part]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)


def mlp(features: int = 12, hidden: int = 24, classes: int = 4, seed: int = 0) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
        seed,
    )


def convolutional(seed: int = 0) -> nn.Module:
    """A convolution, BatchNorm and a head, for the blobs' 12 features."""
    return seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 16, 2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 4),
        ),
        seed,
    )  # fmt: skip


class Fixed:
    """The same few samples as one batch."""

    def __init__(self, x: Tensor, y: Tensor):
        self.batch = (x, y)

    def __len__(self) -> int:
        return 1

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch


def normed() -> nn.Module:
    """A network with dropout and two kinds of BatchNorm."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(12, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 4),
        )
    )  # fmt: skip


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are the same bit for bit, keys and all."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained_mlp(epochs: int = 5) -> nn.Module:
    """A sparse-capable MLP that has seen a little of the blobs."""
    model, blobs = sc.sparsify_(mlp()), Blobs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        for x, y in blobs.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module) -> float:
    blobs = Blobs()
    return (model(blobs.x).argmax(1) == blobs.y).float().mean().item()


class ChannelsLast(TorchDispatchMode):
    """Fails where a convolution takes or gives an image that is not channels last, or one is copied to be so.

    shapes: of the images that may not be copied to another layout.
    """

    def __init__(self, *shapes: Sequence[int]) -> None:
        super().__init__()
        self.shapes = [torch.Size(shape) for shape in shapes]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, images = func.overloadpacket.__name__, []
        if name == "convolution":
            images = [args[0], result]
        elif name == "convolution_backward":
            images = [*args[:2], result[0]]  # dy and x, and dx if it was wanted
        for image in images:
            assert image is None or image.is_contiguous(memory_format=torch.channels_last), name
        if name in ("clone", "copy_", "_to_copy") and result.shape in self.shapes:
            source = args[1] if name == "copy_" else args[0]
            assert source.shape != result.shape or source.stride() == result.stride(), name
        return result
