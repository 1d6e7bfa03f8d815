"""What the ticket suite measures, as data: training of decided tickets, and their products alone.

A ticket's masks are random at the granularity asked for: what a step costs depends on how many weights
are kept and how they lie, not on which search found them.
"""

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsecore.convert import dense_layers
from sparsecore.granularity import parse_granularity
from sparsecore.recipes import build

MASKED, DENSE = "dense*mask", "dense"
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class TrainCase:
    """Whole training steps of a model at one batch size, under random tickets of several sparsities.

    Every provider is launched in every way that its device knows.

    Args:
        model: of `network`.
        shape: of one sample of x.
        providers: as `ticket_steps.make` knows them; "plan auto" only at the sparsities of `autos`, if any
            are named, since it measures every layer before it begins.
        left_dense: globs of layers that stay dense; so do those with fewer than ten units.
        compiled: providers that are compiled too, the more telling ones first: it takes most of the time.
        layouts: whether images lie in channels_last: as they are, so, or both in turn.
        seconds: about how long the CPU's clock runs over all sparsities together, in each way.
    """

    part: str
    label: str
    model: str
    shape: tuple[int, ...]
    batch: int
    providers: tuple[str, ...]
    sparsities: tuple[float, ...] = (0.9,)
    autos: tuple[float, ...] = ()
    granularity: str = "weight"
    left_dense: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    layouts: tuple[bool, ...] = (False,)
    seconds: float = 10.0

    @property
    def name(self) -> str:
        return f"{self.label}/batch={self.batch}"

    def at(self, sparsity: float) -> str:
        """Name of a row's case."""
        return f"{self.name}/sparsity={sparsity:g}"

    def wants(self, provider: str, sparsity: float) -> bool:
        return not (provider.startswith("plan auto") and self.autos and sparsity not in self.autos)


@dataclass(frozen=True)
class OpCase:
    """Forward, dX and dW of one layer: linear, or a convolution of stride 1 on square images.

    Args:
        format: as block:64x64, whose units the mask has.
        others: also packages whose kernels take long to tune themselves.
    """

    part: str
    k: int
    n: int
    tokens: int  # rows of x, or batch * side * side
    format: str
    sparsity: float
    taps: int = 1
    side: int = 0  # 0: a linear layer
    others: bool = False

    @property
    def name(self) -> str:
        kind = f"{self.taps}x{self.taps} " if self.side else ""
        which = f"{self.part[:-1]}/{kind}{self.k}->{self.n}, {self.format}"
        return f"{which}/T={self.tokens}/sparsity={self.sparsity:g}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.n, self.k, self.taps, self.taps) if self.side else (self.n, self.k)

    def shape(self, channels: int) -> tuple[int, ...]:
        """Of an activation with so many channels."""
        if not self.side:
            return (self.tokens, channels)
        return (self.tokens // self.side**2, channels, self.side, self.side)


Case = TrainCase | OpCase


def network(model: str, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """A dense model and its number of classes: `784-4096-10` is an MLP, other names are `recipes.build`'s."""
    if model[0].isdigit():
        widths = [int(width) for width in model.split("-")]
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for k, n in pairwise(widths):
                layers += [nn.ReLU()] * bool(layers) + [nn.Linear(k, n)]
        return nn.Sequential(*layers), widths[-1]
    classes = 1000 if model.startswith("torchvision:") else 10
    return build(model, (shape[0], shape[1], shape[2]), classes), classes


@functools.cache
def random_mask(shape: tuple[int, ...], granularity: str, sparsity: float) -> Tensor:
    """Exactly the share of units that is asked for, at least one; equal arguments give equal masks.

    So layers of one shape share a mask, and a planner that remembers its choices measures them once.
    """
    units = parse_granularity(granularity).units(shape)
    generator = torch.Generator().manual_seed(sum(i * side for i, side in enumerate(shape, 1)))
    order = torch.randperm(units.numel(), generator=generator)
    kept = torch.zeros(units.numel(), dtype=torch.bool)
    kept[order[: max(1, round((1 - sparsity) * units.numel()))]] = True
    return parse_granularity(granularity).spread(kept.view(units), shape)


def random_masks(case: TrainCase, model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Masks of the layers of a model that a case makes sparse."""
    masks = {}
    for name, layer in dense_layers(model).items():
        if any(fnmatchcase(name, g) for g in case.left_dense):
            continue
        shape = tuple(layer.get_parameter("weight").shape)
        if parse_granularity(case.granularity).units(shape).numel() >= 10:
            masks[name] = random_mask(shape, case.granularity, sparsity)
    return masks


# --- On the CPU -------------------------------------------------------------------------------------

_CPU = (
    DENSE, MASKED, "plan mask", "torch.sparse CSR, own backward", "sparselab",
    "plan state", "plan csr", "plan auto",
)  # fmt: skip
# Through autograd the gradient of a CSR tensor's values is made dense first, which takes seconds.
_AUTOGRAD = (*_CPU, "torch.sparse CSR")


def _mlp(
    batch: int, seconds: float, providers: tuple[str, ...] = _CPU,
    sparsities: tuple[float, ...] = SPARSITIES, autos: tuple[float, ...] = (),
) -> TrainCase:  # fmt: skip
    return TrainCase(
        "mlp",
        "mlp",
        "784-4096-4096-10",
        (784,),
        batch,
        providers,
        sparsities,
        autos,
        compiled=(MASKED, DENSE),
        seconds=seconds,
    )


def _lenet(batch: int, providers: tuple[str, ...] = _CPU) -> TrainCase:
    return TrainCase(
        "lenet", "lenet", "lenet-300-100", (1, 28, 28), batch, providers, SPARSITIES,
        compiled=(MASKED, DENSE), seconds=4.0,
    )  # fmt: skip


def _whole(model: str, batch: int, layouts: tuple[bool, ...] = (False,)) -> TrainCase:
    """Where layers are small, or few of them sparse enough: what "auto" must not make slower."""
    providers = (DENSE, MASKED, "plan mask", "plan state", "plan auto")
    return TrainCase(
        "models", f"model/{model}", model, (3, 32, 32), batch, providers, (0.9, 0.95, 0.99),
        compiled=(MASKED, DENSE), layouts=layouts, seconds=40,
    )  # fmt: skip


# Steps of large batches take seconds, and measuring them for "plan auto" a minute each.
CPU = (
    _mlp(128, 30, _AUTOGRAD),
    *(_lenet(batch, _AUTOGRAD if batch == 128 else _CPU) for batch in (128, 256, 512, 2048)),
    _whole("vit-small", 64),
    _whole("resnet-20", 128, (False, True)),
    _mlp(512, 40),
    _mlp(256, 30),
    _mlp(2048, 60, sparsities=(0.9, 0.95, 0.98, 0.99), autos=(0.9, 0.98)),
)

# --- On a GPU: what tells most comes first, so that a run that is cut short has it --------------------

# "plan auto" compiles and measures many kernels in each layer's shape first, so it comes apart, and later.
_PLANS = (DENSE, MASKED, "plan block", "plan state")
_TELLS = (DENSE, MASKED, "plan block")  # what is compiled of a large model
_AUTO = (DENSE, MASKED, "plan auto")


def _small(batch: int) -> TrainCase:
    """Launches are what it costs: its ways tell, not its plans."""
    return TrainCase(
        "models", "model/resnet-20", "resnet-20", (3, 32, 32), batch,
        (DENSE, MASKED, "plan mask", "plan state"),
        sparsities=(0.99,), compiled=(DENSE, MASKED, "plan mask"), layouts=(True,),
    )  # fmt: skip


def _vit(
    providers: tuple[str, ...] = _PLANS, compiled: tuple[str, ...] = _TELLS, label: str = ""
) -> TrainCase:
    return TrainCase(
        "models", f"model/vit_b_16, attention too, block 64{label}", "torchvision:vit_b_16", (3, 224, 224), 64,
        providers, granularity="block:64x64", left_dense=("conv_proj", "heads.*"), compiled=compiled,
    )  # fmt: skip


def _resnet(
    batch: int,
    providers: tuple[str, ...] = _PLANS,
    compiled: tuple[str, ...] = (),
    label: str = "",
) -> TrainCase:
    return TrainCase(
        "models", f"model/resnet50, block 64{label}", "torchvision:resnet50", (3, 224, 224), batch,
        providers, granularity="block:64x64", left_dense=("conv1", "fc"), compiled=compiled, layouts=(True,),
    )  # fmt: skip


def _square(batch: int) -> TrainCase:
    providers = (*_PLANS, "plan auto")
    return TrainCase(
        "models", "model/mlp 4096, block 64", "4096-4096-4096", (4096,), batch, providers,
        sparsities=(0.95,), granularity="block:64x64", compiled=providers,
    )  # fmt: skip


def _linear(
    k: int, n: int, tokens: int, formats: tuple[str, ...], sparsities: tuple[float, ...],
    others: bool = False,
) -> list[OpCase]:  # fmt: skip
    return [OpCase("ops", k, n, tokens, f, s, others=others) for f in formats for s in sparsities]


def _conv(k: int, n: int, side: int, batch: int, taps: int = 3) -> OpCase:
    return OpCase("convs", k, n, batch * side**2, "block:64x64", 0.9, taps, side)


_BLOCKS = tuple(f"block:{side}x{side}" for side in (128, 64, 32, 16))
_WIDE, _VIT = (4096, 4096), (768, 3072)
_TELLING: tuple[Case, ...] = (
    *_linear(*_WIDE, 2048, ("block:64x64",), (0.9,)),
    *_linear(*_WIDE, 8192, ("block:64x64",), (0.9,)),
    _small(512),
    _square(2048),
    *_linear(*_VIT, 12608, ("block:64x64",), (0.9,)),
    _vit(),
    *_linear(*_WIDE, 8192, ("block:128x128",), (0.9,)),
    _conv(256, 256, 14, 256), _conv(512, 512, 7, 1024),
    _resnet(64, compiled=_TELLS),
    *_linear(*_WIDE, 8192, ("block:64x64", "block:32x32"), (0.95,)),
    _vit(_AUTO, (DENSE, "plan auto"), ", plan auto"),
    _square(8192),
)  # fmt: skip
_BEHIND: tuple[Case, ...] = (
    _conv(128, 128, 28, 64), _conv(64, 64, 56, 16),
    _conv(256, 1024, 14, 256, taps=1), _conv(1024, 256, 14, 256, taps=1),
    _conv(512, 2048, 7, 1024, taps=1),
    *(case
      for sparsity in (0.9, 0.95, 0.8, 0.99)
      for shape, tokens in ((_WIDE, 2048), (_WIDE, 8192), (_VIT, 12608))
      for case in _linear(*shape, tokens, _BLOCKS, (sparsity,))),
    _resnet(32),
    _resnet(64, _AUTO, label=", plan auto"),
)  # fmt: skip
# Last, because its kernels try many configurations before they run at all.
_SLOW = _linear(*_WIDE, 2048, ("block:64x64",), (0.95,), others=True)
_NAMED = {case.name: case for case in (*_TELLING, *_BEHIND)} | dict.fromkeys(c.name for c in _SLOW)
GPU: tuple[Case, ...] = (*(case for case in _NAMED.values() if case), *_SLOW)

# --- Tiny, to try every path out --------------------------------------------------------------------

QUICK: tuple[Case, ...] = (
    TrainCase(
        "mlp", "mlp", "24-64-48-10", (24,), 16, _AUTOGRAD, (0.8, 0.95), (0.95,), compiled=(MASKED,),
        seconds=0.0,
    ),
    TrainCase(
        "models", "model/resnet-20, block 8", "resnet-20", (3, 8, 8), 8, (DENSE, MASKED, "plan state"),
        granularity="block:8x8", left_dense=("conv1", "fc"), layouts=(False, True), seconds=0.0,
    ),
    TrainCase(
        "models", "model/mlp 64, block 16", "64-64-64", (64,), 16,
        (DENSE, MASKED, "plan block", "plan state"), granularity="block:16x16",
        compiled=(DENSE, "plan state"), seconds=0.0,
    ),
    OpCase("ops", 32, 64, 16, "block:16x16", 0.75, others=True),
    OpCase("convs", 32, 32, 32, "block:16x16", 0.75, taps=1, side=4),
)  # fmt: skip
PARTS = ("mlp", "lenet", "models", "ops", "convs")
