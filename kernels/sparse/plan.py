"""How a sparse layer multiplies: its formats by name, and what they keep of one mask.

state    dense compute on a weight that holds the kept values, for any mask and device;
csr      compressed rows and columns, on the CPU;
compact  dense compute on live rows and columns only;
block    whole blocks that hold anything, on a GPU ("block:64x64", or in other tiles "block:64x64/2").
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool
from torch import Tensor

from ..blocks.format import BLOCK
from ..blocks.problem import TILES
from ..formats import Format, Layer, Storage, check_mask
from .compact import COMPACT
from .csr import CSR
from .state import STATE

FORMATS: dict[str, Format] = {
    "state": STATE,
    "csr": CSR,
    "compact": COMPACT,
    "block": BLOCK,
}
PRODUCTS = ("forward", "dx", "dw")
FLOOR = "state"  # what can do everything
# What a block format's name may end with.
BLOCK_TILES = tuple(f"/{tile}" for tile in range(1, TILES))


class Plan:
    """How one layer multiplies: a format and its storage for each of forward, dX and dW.

    Made by `plan_of`; belongs to one mask, device and compute dtype.
    """

    def __init__(
        self, layer: Layer, formats: Sequence[str], storages: Sequence[Storage], nnz: int
    ) -> None:
        self.layer, self.nnz = layer, nnz
        self.formats, self.storages = tuple(formats), tuple(storages)
        kinds = [FORMATS[name.partition(":")[0]] for name in formats]
        self.forward, self.dx, self.dw = zip(kinds, storages, strict=True)
        self.major = tuple(kind.feature_major and not layer.conv for kind in kinds)
        self.device = storages[0].tensors[0].device
        # The smallest images that the filter fits.
        _, pad, dilation = layer.pairs if layer.conv else ((), (), ())
        least = [
            d * (r - 1) + 1 - 2 * p for r, p, d in zip(layer.shape[2:], pad, dilation, strict=True)
        ]
        self.least = tuple(least)
        forward, dx, dw = (name.partition("/")[0] for name in formats)
        # Whether dX takes the weight that forward has made.
        self.once = forward == dx
        self.traced = self.forward[0].traced if forward == dx == dw else None

    def flat(self) -> tuple[str, list[Tensor], list[int]]:
        """All of it as an operator's schema takes it."""
        tensors = [t for storage in self.storages for t in storage.tensors]
        numbers = [self.nnz, len(self.layer.numbers), *self.layer.numbers]
        for storage in self.storages:
            numbers += [len(storage.tensors), len(storage.numbers), *storage.numbers]
        return ",".join(self.formats), tensors, numbers

    @classmethod
    def of(cls, formats: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> "Plan":
        """From what `flat` gave."""
        nnz, size, *rest = numbers
        layer, rest, storages = Layer.of(rest[:size]), rest[size:], []
        for _ in PRODUCTS:
            count, size, *rest = rest
            storages.append(Storage(tensors[:count], rest[:size]))
            tensors, rest = tensors[count:], rest[size:]
        return cls(layer, formats.split(","), storages, nnz)

    @classmethod
    def alive(cls, formats: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> "Plan":
        """The very plan that `flat` gave them, with what it has made so far, if it is still there."""
        return _alive.get(_key(formats, tensors, numbers)) or cls.of(formats, tensors, numbers)


def _key(formats: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple:
    return (formats, *numbers, *(t.data_ptr() for t in tensors))


_alive: WeakValueDictionary[tuple, Plan] = WeakValueDictionary()


@torch.inference_mode(False)  # a plan made while evaluating may be trained with later
def plan_of(
    mask: Bool[Tensor, "n k *taps"],
    formats: str | Sequence[str] = FLOOR,
    *,
    dtype: torch.dtype = torch.float32,
    slide: Sequence[int] = (),
    groups: int = 1,
) -> Plan:
    """Prepares a mask for products in one format, or in three: forward, dX and dW.

    Args:
        formats: a name as "csr", or one with an option as "block:64x64".
        dtype: that products compute in.
        slide: of a convolution: stride, padding, dilation, two integers each.

    Errors: TypeError or ValueError for something that is no mask, an unknown format, or one that cannot do
    this, with the reason.
    """
    n_taps = check_mask(mask).ndim - 2
    if n_taps and (len(slide) != 6 or min(*slide[:2], *slide[4:]) < 1 or min(slide[2:4]) < 0):
        raise ValueError(
            "slide: expected six integers for a convolution, strides >= 1, paddings >= 0 and "
            f"dilations >= 1, got {list(slide)}"
        )
    if groups < 1 or mask.shape[0] % groups or (groups > 1 and not n_taps):
        raise ValueError(
            f"groups: expected a divisor of {mask.shape[0]} outputs of a convolution, 1 of a linear "
            f"layer, got {groups}"
        )
    layer = Layer(tuple(mask.shape), tuple(slide) if n_taps else (), groups)
    names = (formats,) * 3 if isinstance(formats, str) else tuple(formats)
    if len(names) != 3:
        raise ValueError(f"formats: expected one, or three for {', '.join(PRODUCTS)}, got {names}")
    made: dict[str, Storage] = {}
    for name in names:
        reason = obstacle(name, mask.device, layer, dtype)
        if reason is not None:
            raise ValueError(f"format {name!r}: {reason}; use 'state', which takes everything")
        kind, options = _parsed(name)
        whole, _, tile = name.partition("/")
        if whole not in made:
            made[whole] = FORMATS[kind].prepare(mask, layer, dtype, **options)
        if name not in made and (tiled := FORMATS[kind].tiled):
            made[name] = tiled(made[whole], int(tile))
    plan = Plan(layer, names, [made[n] for n in names], int(mask.sum()))  # pyright: ignore[reportArgumentType]
    _alive[_key(*plan.flat())] = plan
    return plan


def obstacle(name: str, device: torch.device, layer: Layer, dtype: torch.dtype) -> str | None:
    """Why a format cannot do this at all, or None.  Errors: ValueError for an unknown format."""
    kind, options = _parsed(name)
    return FORMATS[kind].obstacle(device, layer, dtype, **options)


def is_format(name: str) -> bool:
    """Whether a name is a format's, with sides where it takes some."""
    try:
        _parsed(name)
    except ValueError:
        return False
    return True


def _parsed(name: str) -> tuple[str, Mapping[str, Any]]:
    """ "block:64x32", in whatever tiles, as ("block", {"sides": (64, 32)})."""
    kind, colon, option = name.partition(":")
    if kind not in FORMATS or bool(colon) != (kind == "block"):
        raise ValueError(
            f"format: expected {', '.join(FORMATS)} (with sides as block:64x64), got {name!r}"
        )
    if not colon:
        return kind, {}
    found = re.fullmatch(rf"(\d+)x(\d+)({'|'.join(BLOCK_TILES)})?", option)
    if found is None:
        raise ValueError(
            f"format block: expected sides as block:64x64, with {' or '.join(BLOCK_TILES)} behind for other "
            f"tiles, got {name!r}"
        )
    return kind, {"sides": (int(found[1]), int(found[2]))}
