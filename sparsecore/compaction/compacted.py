"""Makes a masked network small: dead units go, what it computes and how it trains stay.

At 99 % sparsity many rows and columns of the masks are empty.  A unit can go when nobody reads it (all
weights on it are masked: no gradient ever reaches it, so the weights into it go as well, and so on
backwards) or when it is constant (all weights into it are masked).  Forward code and module tree stay
what they were; layers and BatchNorms only become narrower.  `walk` finds out which units
belong together, `groups` which of them must stay.

In training a constant unit is removed only if it is 0 and stays so: its bias (or BatchNorm's) is <= 0
and read by nothing but a ReLU, so that it gets no gradient and weight decay only takes it towards 0.
That holds for SGD and AdamW with lr * weight_decay < (1 - sqrt(momentum))²; Adam's coupled weight decay
takes steps of a fixed size, which can carry a negative bias over 0 in the full model.  Dropout draws
other numbers for a smaller tensor.  A BatchNorm makes rounding of a channel that is constant in a batch;
where a ReLU then asks for its sign, both models differ as much as two runs in another order do.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..batches import kind_of
from ..claims import sole
from ..convert import plain_state, require_dense_parameters, require_sparse_layers, sparse_layers
from ..copies import copied
from ..layer import SparseLayer
from ..patterns import Dense, Masked, Planned
from .groups import Groups, Kept, LayerUnits, keep
from .tracing import trace
from .walk import constants, find_groups


@dataclass(frozen=True)
class LayerReport:
    """What became of one sparse layer.

    Args:
        inputs, outputs: units kept, of how many.
        weights: weights kept, of how many; `live` of them are not masked.
        stays: why dead units are still there: how many, of which side, and a sentence.
    """

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    weights: tuple[int, int]
    live: int
    stays: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class Compacted:
    """A small model, and how it lies in the full one.

    Args:
        model: the same classes with the same keys; every sparse layer is Masked, or Dense if nothing of it
            is masked.
        layers: a report for every sparse layer.
        places: by key of the state_dict, the indices that its tensor keeps along the first dimensions.
        shapes: the full model's shapes, by key.
        masks: the full model's masks, by layer.
        folded: layers whose bias took in constants (only without `training`).
    """

    model: nn.Module
    layers: Mapping[str, LayerReport]
    places: Mapping[str, tuple[Tensor, ...]]
    shapes: Mapping[str, torch.Size]
    masks: Mapping[str, Tensor]
    folded: tuple[str, ...] = ()

    @property
    def removed(self) -> bool:
        """Whether any weight of a sparse layer is gone."""
        return any(layer.weights[0] < layer.weights[1] for layer in self.layers.values())

    def restore_(self, full: nn.Module) -> nn.Module:
        """Writes the small model's parameters and buffers to their places in `full`; returns `full`.

        What was removed keeps the values that `full` has: it does not decay as it would under a mask, which
        changes nothing that the model computes.  Everything is checked first: after an error `full`
        is what it was.

        The small model may be planned, `full` may not.

        Errors: ValueError for a model of other keys, shapes or masks, or if constants were folded.
        """
        if self.folded:
            raise ValueError(
                f"restore_: the biases of {', '.join(self.folded)} hold constants of units that the full "
                "model still computes; compact with training=True to train and restore"
            )
        require_dense_parameters(full)
        small, target = plain_state(self.model), plain_state(full)
        shapes = {key: value.shape for key, value in target.items()}
        if shapes != self.shapes:
            differing = sorted(k for k, _ in shapes.items() ^ self.shapes.items())
            raise ValueError(
                "restore_: expected the model that was compacted, got one whose parameters differ in "
                f"name or shape: {', '.join(sorted(set(differing))[:4])}"
            )
        smaller = sparse_layers(self.model)
        for name, layer in require_sparse_layers(full).items():
            mask, index = self.masks[name], self._index(f"{name}.weight" if name else "weight")
            same = torch.equal(_mask(layer).cpu(), mask)
            if not same or not torch.equal(_mask(smaller[name]).cpu(), mask[index]):
                raise ValueError(
                    f"restore_: {name} has another mask than when it was compacted; "
                    "apply the same ticket first"
                )
        with torch.no_grad():
            for key, value in small.items():
                target[key][self._index(key)] = value.to(target[key])
        return full

    def _index(self, key: str) -> tuple[Any, ...]:
        """The small tensor of this key as an index into the full one."""
        indices = self.places.get(key, ())
        if len(indices) == 2:
            return indices[0][:, None], indices[1]
        return indices or (...,)

    def table(self) -> str:
        """What was removed, layer by layer, and what could not be."""
        rows = [["layer", "inputs", "outputs", "weights", "live"]]
        for name, layer in self.layers.items():
            pairs = [f"{a} of {b}" for a, b in (layer.inputs, layer.outputs, layer.weights)]
            rows.append([name, *pairs, str(layer.live)])
        kept, total = (sum(layer.weights[i] for layer in self.layers.values()) for i in (0, 1))
        live = sum(layer.live for layer in self.layers.values())
        rows.append(["all", "", "", f"{kept} of {total}", str(live)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        for name, layer in self.layers.items():
            lines += [f"{name}: {n} dead {side} stay: {why}" for n, side, why in layer.stays]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()


@sole("compact", alters=False)
def compact(model: nn.Module, *example: Tensor, training: bool = True) -> Compacted:
    """A smaller copy of a masked model that computes and trains the same.

    Args:
        example: inputs to trace the shapes with; a batch of one is enough.  It runs in evaluation mode.
        training: whether the small model is to train as the full one does.  False keeps only what the model
            computes in evaluation, and folds any constant unit into the biases of its readers.

    Errors: ValueError without sparse layers, for patterns other than Masked and Dense, and for a model
        that cannot be traced, or that another thread works with.
    """
    for name, layer in require_sparse_layers(model).items():
        if not isinstance(layer.pattern, (Dense, Masked)):
            raise ValueError(
                f"compact: expected a decided mask, {name} is {type(layer.pattern).__name__}; "
                + (
                    'plan it after compaction: plan_(model, "mask") now'
                    if isinstance(layer.pattern, Planned)
                    else "apply a ticket first: ticket.apply_(model)"
                )
            )
    if foreign := [x for x in example if not isinstance(x, Tensor)]:
        raise ValueError(
            f"compact: expected the model's inputs one by one, tensors each, got {kind_of(foreign[0])}"
        )
    traced = trace(model, example, training)
    groups = find_groups(traced, training)
    kept = keep(groups)
    small = copied(model)
    modules = dict(small.named_modules())
    places: dict[str, tuple[Tensor, ...]] = {}
    folded: list[str] = []
    for name, layer in groups.layers.items():
        if _fold_(modules[name], layer, kept):
            folded.append(name)
        rows = kept.units[layer.rows].nonzero()[:, 0]
        columns = kept.units[layer.columns].nonzero()[:, 0]
        for key, index in _shrink_(modules[name], rows, columns, layer.depthwise):
            places[f"{name}.{key}"] = index
    for name, units in groups.norms.items():
        for key, index in _shrink_norm_(modules[name], kept.units[units].nonzero()[:, 0]):
            places[f"{name}.{key}"] = index
    for layer in sparse_layers(small).values():
        if isinstance(layer.pattern, Masked) and layer.pattern.mask.all():
            layer.pattern = Dense()
    whole = groups.skipped | traced.fixed
    reports = {
        name: _report(layer, groups.layers[name], groups, kept)
        if name in groups.layers
        else _whole(layer, whole[name])
        for name, layer in sparse_layers(model).items()
    }
    _check(small, example, traced.output)
    shapes = {key: value.shape for key, value in plain_state(model).items()}
    masks = {name: _mask(layer).cpu().clone() for name, layer in sparse_layers(model).items()}
    return Compacted(small, reports, places, shapes, masks, tuple(folded))


def _shrink_(
    layer: Any, rows: Tensor, columns: Tensor, depthwise: bool
) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Narrows a layer in place; gives the place of each of its parameters in the full one."""
    index = (rows,) if depthwise else (rows, columns)
    _narrow_(layer, "weight", *index)
    yield "weight", index
    if layer.bias is not None:
        _narrow_(layer, "bias", rows)
        yield "bias", (rows,)
    if isinstance(getattr(layer, "pattern", None), Masked):
        layer.pattern = Masked(_taken(layer.pattern.mask, *index))
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = len(columns), len(rows)
    else:
        layer.in_channels, layer.out_channels = len(columns), len(rows)
        layer.groups = len(rows) if depthwise else 1


def _shrink_norm_(norm: Any, rows: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    norm.num_features = len(rows)
    for key in ("weight", "bias", "running_mean", "running_var"):
        if getattr(norm, key) is not None:
            _narrow_(norm, key, rows)
            yield key, (rows,)


def _narrow_(module: nn.Module, key: str, *index: Tensor) -> None:
    parameter = module._parameters.get(key)
    if parameter is None:
        module._buffers[key] = _taken(getattr(module, key), *index)
    else:
        taken = _taken(parameter.detach(), *index)
        module._parameters[key] = nn.Parameter(taken, parameter.requires_grad)


def _taken(tensor: Tensor, *index: Tensor) -> Tensor:
    for dim, kept in enumerate(index):
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def _fold_(layer: Any, units: LayerUnits, kept: Kept) -> bool:
    """Adds to the bias what the constant inputs that go would have added; whether there were any."""
    gone = ~kept.units[units.columns] & units.usable & (units.value != 0)
    if units.depthwise or not (units.live[kept.units[units.rows]] & gone).any():
        return False
    weight = layer.weight.detach()  # of a sparse layer: as masked
    added = constants(weight.cpu(), units.value, gone).to(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(added)
    else:
        layer.bias.data.add_(added)
    return True


def _report(layer: SparseLayer, units: LayerUnits, groups: Groups, kept: Kept) -> LayerReport:
    rows, columns = kept.units[units.rows], kept.units[units.columns]
    index = (rows,) if units.depthwise else (rows, columns)
    mask = _mask(layer).cpu()
    small = _taken(mask, *(i.nonzero()[:, 0] for i in index))
    # An input that others read is not dead; one that nobody reads is here only because it is pinned.
    unread = columns & ~kept.read[units.columns]
    stays: Counter[tuple[str, str]] = Counter()
    for side, dead, why in (
        ("outputs", units.dead & rows, kept.why[units.rows]),
        ("inputs", unread, kept.why[units.columns]),
    ):
        stays.update((side, groups.sentences[number]) for number in why[dead].tolist())
    return LayerReport(
        (int(columns.sum()), len(columns)),
        (int(rows.sum()), len(rows)),
        (small.numel(), mask.numel()),
        int(small.sum()),
        tuple((n, *what) for what, n in stays.items()),
    )


def _whole(layer: SparseLayer, why: str) -> LayerReport:
    """The report of a layer that stays as it is."""
    mask = _mask(layer).cpu()
    live = mask.flatten(1).view(*mask.shape[:2], -1).any(2)
    read = live.unflatten(0, (getattr(layer, "groups", 1), -1)).any(1).flatten()
    dead = (int((~live.any(1)).sum()), "outputs"), (int((~read).sum()), "inputs")
    stays = tuple((n, side, why) for n, side in dead if n)
    (n, k), weights = (len(live), len(read)), mask.numel()
    return LayerReport((k, k), (n, n), (weights, weights), int(mask.sum()), stays)


def _check(small: nn.Module, example: tuple[Tensor, ...], expected: Any) -> None:
    """Runs the small model in evaluation mode: whatever the analysis missed must not go unnoticed.

    A GPU may multiply in TF32, and deep networks multiply rounding.
    """
    with torch.no_grad():
        found = copied(small).eval()(*example)  # a copy, since forward may change buffers
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            scale = b.abs().max().item() if b.numel() else 0.0
            same = a.shape == b.shape
            rounding = 1e-2 if a.is_cuda else min(1e-2, 10 * torch.finfo(a.dtype).eps ** 0.5)
            if not same or not torch.allclose(
                a, b, rtol=rounding, atol=rounding * scale, equal_nan=True
            ):
                by = f"{(a - b).abs().max().item():.3g}" if same else "its shape"
                raise RuntimeError(
                    f"compact: the small model's output differs from the full one's by {by}; "
                    "please report this model"
                )


def _mask(layer: SparseLayer) -> Tensor:
    if isinstance(layer.pattern, Masked | Planned):
        return layer.pattern.mask
    return torch.ones_like(layer.raw_weight, dtype=torch.bool)
