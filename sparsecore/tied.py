"""Weights that several modules share: one mask, one score, one pattern for one tensor."""

import copy
from collections import defaultdict
from collections.abc import Collection
from itertools import pairwise

import torch
from torch import nn

from .layer import SparseLayer
from .parts import Part
from .patterns import Dense, Masked


def tie_(model: nn.Module) -> None:
    """Makes sparse layers that share a weight share a pattern too; the first in the model's order leads.

    Layers that no longer share one go on with a pattern of their own.

    Errors: ValueError for layers that share a weight under different masks; nothing changes then.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
    elsewhere = outsiders(model)
    for name, layer in layers.items():
        if layer.shared != (name in elsewhere):
            layer.shared = name in elsewhere
            if isinstance(layer.pattern, Masked):
                layer.pattern.keeper = None  # the next one knows
    groups: dict[int, list[SparseLayer]] = defaultdict(list)
    for layer in layers.values():
        groups[id(layer.raw_weight)].append(layer)
    loose = [layer for layer in layers.values() if _strayed(layer)]
    shared = [group for group in groups.values() if len(group) > 1]
    if not shared and not loose:
        return
    for group in shared:
        _check(group, {layer: name for name, layer in layers.items()})
    for layer in loose:
        pattern = copy.deepcopy(layer.pattern)
        layer.follow(None)
        layer.pattern = pattern
    for leader, *others in shared:
        pattern = _patterns([leader, *others])[0]
        leader.follow(None)
        leader.pattern = pattern
        for layer in others:
            layer.follow(leader)
        leader.look()


def _strayed(layer: SparseLayer) -> bool:
    """Whether it follows a layer of another weight by now."""
    leader = layer.leader
    return leader is not None and leader.raw_weight is not layer.raw_weight


def _patterns(group: list[SparseLayer]) -> list[nn.Module]:
    """Their patterns, those that say something first."""
    found = list(dict.fromkeys(layer.pattern for layer in group))
    return sorted(found, key=lambda pattern: isinstance(pattern, Dense))


def _check(group: list[SparseLayer], names: dict[SparseLayer, str]) -> None:
    first, *rest = _patterns(group)
    for other in rest:
        if isinstance(other, Dense):
            continue
        if isinstance(first, Masked) and isinstance(other, Masked):
            if torch.equal(first.mask, other.mask):
                continue
        raise ValueError(
            f"expected one mask for the weight that {', '.join(names[layer] for layer in group)} share, got "
            "different ones: give each a weight of its own, or all the same mask"
        )


def holders(model: nn.Module) -> dict[int, list[str]]:
    """The places of every parameter in the model, by its id: `<module>.<name>`."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[id(parameter)].append(f"{name}.{key}".lstrip("."))
    return found


def outsiders(model: nn.Module) -> dict[str, list[str]]:
    """The places outside of sparse layers that share a sparse layer's weight, by layer.

    They see its mask, once that is decided, but no gates.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
    inside = {
        f"{name.rpartition('.')[0]}.{m.key}".lstrip(".") if isinstance(m, Part) else f"{name}.weight".lstrip(".")
        for name, m in layers.items()
    }  # fmt: skip
    places = holders(model)
    found = {}
    for name, layer in layers.items():
        others = [place for place in places[id(layer.raw_weight)] if place not in inside]
        if others:
            found[name] = others
    return found


def require_own_memory(model: nn.Module, weights: Collection[int] = ()) -> None:
    """Errors: ValueError for a sparse layer's weight, or one of these ids, in whose memory another parameter lies as
    well: the masks of two would add up.
    """
    weights = {*weights, *(id(m.raw_weight) for m in model.modules() if isinstance(m, SparseLayer))}
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name, id(p) in weights)
        for name, p in model.named_parameters()
        if type(p) is nn.Parameter and not p.is_meta
    )
    for (_, end, name, first), (begin, _, other, second) in pairwise(
        s for s in spans if s[0] < s[1]
    ):
        if begin < end and (first or second):
            raise ValueError(
                f"expected weights in memory of their own, got {name} and {other} in one; tie them as one parameter: "
                "other.weight = layer.weight"
            )


def require_own_weights(model: nn.Module) -> None:
    """Errors: ValueError for weights that modules other than sparse layers hold too, which gates would not reach, and
    for embeddings that gates cannot stand before.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer) and isinstance(layer, nn.Embedding):
            refused = (
                "sparse=True" if layer.sparse else "max_norm" if layer.max_norm is not None else ""
            )
            if refused:
                raise ValueError(
                    f"search by gates: expected no {refused} in the embedding {name}, whose gradients or rows it would "
                    f"take past the gates; leave it out: sparsify_(model, '!{name}'), or search by scores"
                )
    for name, places in outsiders(model).items():
        raise ValueError(
            f"search by gates: expected {name}'s weight in sparse layers alone, got it in {', '.join(places)} too, "
            "where gates would not be seen; leave the layer dense, or search by scores or rewinding"
        )
