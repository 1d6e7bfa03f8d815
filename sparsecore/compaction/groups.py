"""The units of a network, what ties and reads them, and the fewest that must stay.

A *unit* is one place along the channel dimension of a tensor: a feature of a linear layer, a channel
of a convolution.  Operations either pass units on (ReLU, pooling, BatchNorm), repeat them (flatten),
string them together (concatenation), tie two of them (a residual sum: both or none can go), or need
all of them (LayerNorm, attention, whatever is not known).  Layers with weights end the units of their
input and begin new ones, so all questions about removal are about units and the weights between them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_PADDING = "a convolution's zero padding does not continue its constant"
_ONLY = "it is the only unit left of its layer"
_TIED = "a live unit shares its place (residual sum or depthwise convolution)"


@dataclass(frozen=True)
class LayerUnits:
    """What one layer's weight connects.

    Args:
        rows, columns: units of its outputs and inputs.
        live: unmasked weights, [rows, columns], or [rows, 1] of a depthwise convolution.
        value, why: what is known of the inputs.
        usable: inputs whose weights can go because the input is constant.
        dead: outputs that are constant for this layer, before its bias.
    """

    rows: Tensor
    columns: Tensor
    live: Tensor
    value: Tensor
    why: Tensor
    usable: Tensor
    dead: Tensor
    depthwise: bool


@dataclass
class Groups:
    """The units of a whole model, filled in by `walk.find_groups`.

    Args:
        count: number of units.
        ties: pairs of units of which both or none can go.
        pins: units that stay, with the number of the sentence that says why.
        layers, norms: what weights and BatchNorms belong to which units, by name.
        skipped: layers and norms that stay as they are, and why.
        sentences: reasons; number 0 is none.
    """

    count: int = 0
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[Tensor, int]] = field(default_factory=list)
    layers: dict[str, LayerUnits] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=lambda: [""])

    def fresh(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def sentence(self, text: str) -> int:
        if text not in self.sentences:
            self.sentences.append(text)
        return self.sentences.index(text)

    def places(self) -> Tensor:
        """By unit, the smallest unit that it is tied to, directly or by others."""
        label = torch.arange(self.count)
        if not self.ties:
            return label
        a, b = (torch.cat(side) for side in zip(*self.ties, strict=True))
        while True:
            low = torch.minimum(label[a], label[b])
            new = label.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
            new = new[new]
            if torch.equal(new, label):
                return label
            label = new


@dataclass(frozen=True)
class Kept:
    """What stays, by unit.

    Args:
        units: whether it stays.
        read: whether a live weight of a unit that stays reads it.
        why: the number of a sentence that says why it stays, should it be dead.
    """

    units: Tensor
    read: Tensor
    why: Tensor


def keep(groups: Groups) -> Kept:
    """The fewest units that must stay: those pinned, and all that a live weight of such a unit reads.

    A layer of which nothing would stay keeps one output and one input.
    """
    place = groups.places()
    stays = torch.zeros(groups.count, dtype=torch.bool)
    pinned = torch.zeros(groups.count, dtype=torch.int64)
    for units, why in groups.pins:
        stays[place[units]] = True
        pinned[place[units]] = why
    # The inputs of a depthwise convolution are tied to its outputs, so it reads nothing by itself.
    readers = [layer for layer in reversed(groups.layers.values()) if not layer.depthwise]
    while True:
        before = stays.clone()
        for layer in readers:
            stays[place[layer.columns[_reads(layer, stays[place[layer.rows]])]]] = True
        if not torch.equal(stays, before):
            continue
        spare = [unit for layer in readers for unit in _spare(layer, stays[place])]
        if not spare:
            break
        stays[place[spare[0]]] = True
        pinned[place[spare[0]]] = groups.sentence(_ONLY)
    why, read = torch.zeros_like(pinned), torch.zeros_like(stays)
    for layer in readers:
        reads = _reads(layer, stays[place[layer.rows]])
        read[place[layer.columns[reads]]] = True
        reason = torch.where(layer.why > 0, layer.why, groups.sentence(_PADDING))
        reason = reason.masked_fill((layer.why == 0) & layer.value.isnan(), 0)
        why.scatter_reduce_(0, place[layer.columns[reads]], reason[reads], "amax")
    why = torch.where(pinned > 0, pinned, why)
    why[why == 0] = groups.sentence(_TIED)
    return Kept(stays[place], read[place], why[place])


def _reads(layer: LayerUnits, rows: Tensor) -> Tensor:
    """The inputs that the given outputs need."""
    return layer.live[rows].any(0) & ~layer.usable


def _spare(layer: LayerUnits, stays: Tensor) -> Iterator[int]:
    """For each side of a layer of which nothing stays, the unit that costs least."""
    for units, dim in ((layer.rows, 1), (layer.columns, 0)):
        if len(units) and not stays[units].any():
            weights = layer.live.sum(dim).expand(len(units))
            yield int(units[weights.argmin()])
