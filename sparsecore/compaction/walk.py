"""Follows the units of a network through its operations.

Beside a tensor's units goes what is known of their values.  With `training` a value is a constant only
if training never moves it: 0 from a dead unit without bias, or a bias whose gradient is exactly 0,
since nothing but a ReLU reads it and the ReLU is off.  Without, it is any constant of evaluation mode.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..patterns import Masked
from .groups import Groups, LayerUnits
from .operations import LINEAR, Traced

_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
# A gradient reaches what is before these only through what comes after them.
_TRANSPARENT = ("same", "average", "flatten", "reshape", "getitem", "mean", "add", "cat", "norm")

_POSITIVE = "the bias of a dead unit is positive and trains"
_RESIDUAL = "a residual sum adds something alive to it"
_OVERWRITTEN = "an operation in place overwrites it under its other readers"


@dataclass(frozen=True)
class Channels:
    """The units of one tensor.

    Args:
        dim: the tensor's channel dimension.
        units: number of the unit at each place along it.
        value: the unit's constant, NaN where it has none.
        why: for a unit without incoming weights that is no constant, the number of the sentence that
            says why; else 0.
    """

    dim: int
    units: Tensor  # int64 [channels]
    value: Tensor  # float64 [channels]
    why: Tensor  # int64 [channels]

    @property
    def known(self) -> Tensor:
        """Where the value is a constant."""
        return ~self.value.isnan()

    def picked(self, index: Tensor, dim: int) -> "Channels":
        return Channels(dim, self.units[index], self.value[index], self.why[index])


def find_groups(traced: Traced, training: bool) -> Groups:
    """Follows the units through a model's operations."""
    walk = _Walk(traced, training)
    overwritten = traced.overwritten()
    for node in traced.graph.nodes:
        found = walk.step(node)
        if isinstance(found, str):
            walk.pin(node, found)
        elif found is not None:
            if node in overwritten:
                found = walk.lost(found, found.known, _OVERWRITTEN)
            walk.channels[node] = found
    return walk.groups


class _Walk:
    """One pass over the operations in their order.

    Every `_kind(node, x, c)` gets its first argument and that one's channels, and gives the result's
    channels, None for a result that is no tensor, or in words why its arguments have to stay whole.
    """

    def __init__(self, traced: Traced, training: bool) -> None:
        self.traced, self.training = traced, training
        self.groups = Groups()
        self.channels: dict[Node, Channels] = {}
        self.whole: dict[Node, str] = {}  # tensors without units of their own, and why

    def step(self, node: Node) -> Channels | str | None:
        kind, x = self.traced.kind(node), node.args[0] if node.args else None
        if kind == "opaque":
            fixed = self.traced.fixed.get(str(node.target)) if node.op == "call_module" else None
            return f"{self.traced.name(node)}: {fixed}" if fixed else self._need(node)
        if kind == "cat":
            return self._cat(node)
        if kind in _NUMBERS:
            return self._binary(node, _NUMBERS[kind])
        if not isinstance(x, Node) or (node.op == "call_module" and len(node.args) > 1):
            return self._need(node)
        if kind == "layer":
            return self._layer(node, x)
        c = self.channels.get(x)
        if c is None:
            return self.whole.get(x, "")
        if kind != "shape" and node not in self.traced.shapes:
            return self._need(node)
        return getattr(self, f"_{kind}")(node, x, c)

    def pin(self, node: Node, why: str) -> None:
        """Keeps all units that the operation reads; its result has none of its own."""
        why = why or self._need(node)
        self.whole[node] = why
        if node.op == "call_module":
            self.groups.skipped[str(node.target)] = why
        for x in node.all_input_nodes:
            if x in self.channels:
                self.groups.pins.append((self.channels[x].units, self.groups.sentence(why)))

    def _need(self, node: Node) -> str:
        name = self.traced.name(node)
        keeps = node.op in ("placeholder", "output", "get_attr")
        return f"{name} keeps its size" if keeps else f"{name} needs every unit"

    def _ndim(self, node: Node) -> int:
        return len(self.traced.shapes[node])

    def _new(self, count: int, why: str) -> Channels:
        """Units that stay, of which nothing is known."""
        units, none = self.groups.fresh(count), torch.zeros(count, dtype=torch.int64)
        self.groups.pins.append((units, self.groups.sentence(why)))
        return Channels(0, units, torch.full((count,), torch.nan, dtype=torch.float64), none)

    def lost(self, c: Channels, where: Tensor, why: str) -> Channels:
        """`c` without its constants at `where`."""
        nan = c.value.masked_fill(where, torch.nan)
        return replace(c, value=nan, why=c.why.masked_fill(where, self.groups.sentence(why)))

    def _leak(self, node: Node) -> str | None:
        """In words, what brings a gradient to a unit that is off; None if nothing can."""
        users = [u for u in node.users if self.traced.kind(u) != "shape"]
        kinds = [self.traced.kind(u) for u in users]
        if all(kind == "relu" for kind in kinds):
            return None
        # A second reader could learn of a constant that the first one lets training move.
        if len(users) == 1 and kinds[0] in _TRANSPARENT:
            return self._leak(users[0])
        return self.traced.name(next(u for u, k in zip(users, kinds, strict=True) if k != "relu"))

    def _bias(self, node: Node, rows: Channels, bias: Tensor | None) -> Channels:
        """Channels with a constant `value`, after a bias: in training one that nothing moves."""
        if bias is None:
            return rows
        value = rows.value + bias.detach().cpu().double()
        if self.training and (leak := self._leak(node)) is not None:
            why = f"the bias of a dead unit trains: {leak} passes its gradient on"
            return self.lost(rows, ~value.isnan(), why)
        return replace(rows, value=value)

    def _layer(self, node: Node, x: Node) -> Channels | str:
        name = str(node.target)
        module: Any = self.traced.modules[name]
        linear, c = isinstance(module, LINEAR), self.channels.get(x)
        dim = self._ndim(node) - (1 if linear else 3)
        weight = module._parameters["weight"].detach().cpu()
        depthwise = not linear and 1 < module.groups == module.in_channels == module.out_channels
        if not linear and module.groups > 1 and not depthwise:
            return f"{self.traced.name(node)} is grouped, and its groups stay whole"
        if c is not None and c.dim != dim:
            return self._need(node)
        if c is None:
            c = self._new(module.in_features if linear else module.in_channels, self.whole[x])
        live = torch.ones(1, 1, dtype=torch.bool).expand(weight.shape[:2])
        pattern = getattr(module, "pattern", None)
        if isinstance(pattern, Masked):
            live = pattern.mask.cpu()
            weight = weight.masked_fill(~live, 0)
            live = live.flatten(2).any(2) if live.ndim > 2 else live
        # Zero padding is not the constant, so beside an edge the sum over the taps is another one.
        padded = not linear and module.padding_mode == "zeros" and _padding(module)
        usable = c.value == 0 if self.training or padded else c.known
        reads = live & ~(usable[:, None] if depthwise else usable)
        dead = ~reads.any(1)
        units = self.groups.fresh(len(weight))
        if depthwise:
            self.groups.ties.append((c.units, units))
        value = constants(weight, c.value, usable & (c.value != 0)).masked_fill(~dead, torch.nan)
        layer = LayerUnits(units, c.units, live, c.value, c.why, usable, dead, depthwise)
        self.groups.layers[name] = layer
        why = torch.zeros(len(weight), dtype=torch.int64)
        return self._bias(node, Channels(dim, units, value, why), module.bias)

    def _norm(self, node: Node, x: Node, c: Channels) -> Channels | str:
        module: Any = self.traced.modules[str(node.target)]
        if c.dim != 1:
            return self._need(node)
        self.groups.norms[str(node.target)] = c.units
        mean, var = module.running_mean, module.running_var
        if self.training or mean is None:
            # In training a constant becomes 0 and then the bias; in evaluation that is so only of 0 - 0.
            same = c.value == 0 if mean is None else (c.value == 0) & (mean.detach().cpu() == 0)
            name = self.traced.name(node)
            c = self.lost(
                c, c.known & ~same, f"{name}'s statistics differ between training and evaluation"
            )
        else:
            scale = (var.detach().cpu().double() + module.eps).rsqrt()
            if module.weight is not None:
                scale = scale * module.weight.detach().cpu().double()
            c = replace(c, value=(c.value - mean.detach().cpu().double()) * scale)
        return self._bias(node, c, module.bias)

    def _pointwise(self, node: Node, x: Node, c: Channels) -> Channels | str:
        if len(node.all_input_nodes) > 1:
            return self._need(node)
        if node.op == "call_module":
            value = self.traced.modules[str(node.target)](c.value.clone())
        elif node.op == "call_method":
            value = getattr(c.value.clone(), str(node.target))(*node.args[1:], **node.kwargs)
        else:
            value = node.target(c.value.clone(), *node.args[1:], **node.kwargs)  # pyright: ignore
        c = replace(c, value=value.masked_fill(c.value.isnan(), torch.nan))
        if self.training:
            why = f"{self.traced.name(node)} makes something else of 0"
            c = self.lost(c, (c.value != 0) & c.known, why)
        return c

    def _relu(self, node: Node, x: Node, c: Channels) -> Channels | str:
        if self.training:
            c = self.lost(c, c.value > 0, _POSITIVE)
        return self._pointwise(node, x, c)

    def _same(self, node: Node, x: Node, c: Channels) -> Channels | str:
        name = self.traced.name(node).split()[0]  # AvgPool2d or avg_pool2d
        pooled = int(name[-2]) if "pool" in name.lower() else 0  # that many dimensions, the last
        return c if c.dim < self._ndim(x) - pooled else self._need(node)

    def _average(self, node: Node, x: Node, c: Channels) -> Channels | str:
        c = self.lost(c, (c.value != 0) & c.known, f"{self.traced.name(node)} may pad with 0")
        return self._same(node, x, c)

    def _flatten(self, node: Node, x: Node, c: Channels) -> Channels | str:
        shape = self.traced.shapes[x]
        if node.op == "call_module":
            module: Any = self.traced.modules[str(node.target)]
            ends = module.start_dim, module.end_dim
        else:
            ends = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
        if not all(isinstance(end, int) for end in ends):
            return self._need(node)
        first, last = (end % len(shape) for end in ends)
        if not first <= c.dim <= last:
            return replace(c, dim=c.dim if c.dim < first else c.dim - (last - first))
        index = torch.arange(len(c.units)).repeat_interleave(prod(shape[c.dim + 1 : last + 1]))
        return c.picked(index.repeat(prod(shape[first : c.dim])), first)

    def _reshape(self, node: Node, x: Node, c: Channels) -> Channels | str:
        old, new = self.traced.shapes[x], self.traced.shapes[node]
        # Only x.view(batch, -1), which goes on working with fewer channels.
        if c.dim != 1 or new != (old[0], prod(old[1:])) or _last(node) != -1:
            return self._need(node)
        return c.picked(torch.arange(old[1]).repeat_interleave(prod(old[2:])), 1)

    def _mean(self, node: Node, x: Node, c: Channels) -> Channels | str:
        dims = _argument(node, 1, "dim", None)
        dims = [dims] if isinstance(dims, int) else dims
        if not dims or not all(isinstance(d, int) for d in dims):
            return self._need(node)
        gone = {d % self._ndim(x) for d in dims}
        if c.dim in gone:
            return self._need(node)
        kept = self._ndim(node) == self._ndim(x)
        return c if kept else replace(c, dim=c.dim - sum(d < c.dim for d in gone))

    def _getitem(self, node: Node, x: Node, c: Channels) -> Channels | str:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if not all(isinstance(i, (int, slice)) for i in index):
            return self._need(node)
        if c.dim < len(index) and index[c.dim] != slice(None):
            return self._need(node)
        return replace(c, dim=c.dim - sum(isinstance(i, int) for i in index[: c.dim]))

    def _pad(self, node: Node, x: Node, c: Channels) -> Channels | str:
        amounts = _argument(node, 1, "pad", ())
        plain = _argument(node, 2, "mode", "constant") == "constant"
        if not plain or not all(isinstance(n, int) for n in amounts):
            return self._need(node)
        by_dim = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
        at = self._ndim(x) - 1 - c.dim
        before, after = by_dim.pop(at) if at < len(by_dim) else (0, 0)
        if min(before, after) < 0:
            return self._need(node)
        with_zeros = _argument(node, 3, "value", None) in (None, 0)
        if any(n for pair in by_dim for n in pair):
            lost = c.known & ((c.value != 0) | (not with_zeros))
            c = self.lost(c, lost, f"{self.traced.name(node)} surrounds it with another number")
        new = self._new(before + after, f"{self.traced.name(node)} adds as many units of its own")
        if with_zeros:
            new = replace(new, value=torch.zeros_like(new.value))
        at_front = torch.arange(before + after) < before
        return _joined(c.dim, [new.picked(at_front, 0), c, new.picked(~at_front, 0)])

    def _shape(self, node: Node, x: Node, c: Channels) -> str | None:
        asked = node.args[1] if len(node.args) > 1 else None
        if asked in ("dtype", "device", "ndim") or node.target == "dim":
            return None
        if node.target == "size" and isinstance(asked, int):
            read = [asked]
        elif asked == "shape" or node.target == "size":
            read = [
                u.args[1] if u.target is operator.getitem else None for u in node.users if u.users
            ]
        else:
            return self._need(node)
        known = all(isinstance(i, int) and i % self._ndim(x) != c.dim for i in read)
        return None if known else f"{self.traced.name(node)} tells the number of channels"

    def _cat(self, node: Node) -> Channels | str:
        tensors, dim = node.args[0], _argument(node, 1, "dim", 0)
        if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
            return self._need(node)
        nodes = [x for x in tensors if isinstance(x, Node)]
        dim %= self._ndim(node)
        if any(x in self.channels and self.channels[x].dim != dim for x in nodes):
            return self._need(node)
        if not any(x in self.channels for x in nodes):
            return self.whole.get(nodes[0], "")
        sizes = [self.traced.shapes[x][dim] for x in nodes]
        return _joined(
            dim,
            [
                self.channels[x] if x in self.channels else self._new(size, self.whole[x])
                for x, size in zip(nodes, sizes, strict=True)
            ],
        )

    def _binary(self, node: Node, compute: Callable[[Any, Any], Any]) -> Channels | str:
        nodes = [x for x in node.args if isinstance(x, Node)]
        tracked = [x for x in nodes if x in self.channels]
        if len(node.args) != 2 or node.kwargs:
            return self._need(node)
        if not tracked:
            return self.whole.get(nodes[0], "")
        c, shape = self.channels[tracked[0]], self.traced.shapes[node]
        at = c.dim - self._ndim(tracked[0])  # from the end, as broadcasting aligns
        if shape[at] != len(c.units) or not all(self._aligned(x, at, len(c.units)) for x in nodes):
            return self._need(node)
        if len(tracked) == 2:
            self.groups.ties.append((c.units, self.channels[tracked[1]].units))
        unknown = torch.full_like(c.value, torch.nan)
        values: list[Any] = [
            x if not isinstance(x, Node) else self.channels[x].value if x in tracked else unknown
            for x in node.args
        ]
        tensors = torch.stack([v for v in values if isinstance(v, Tensor)])
        value = compute(*values)
        if compute is operator.mul:
            value = value.masked_fill((tensors == 0).any(0), 0)
        why = torch.stack([self.channels[x].why for x in tracked]).amax(0)
        found = Channels(len(shape) + at, c.units, value, why)
        mixed = value.isnan() & ~tensors.isnan().all(0) & (why == 0)
        found = self.lost(found, mixed, _RESIDUAL)
        if not self.training:
            return found
        if len(nodes) == 2:
            # Not only the sum: one bias may decay faster than the other.
            return self.lost(found, found.known & (tensors > 0).any(0), _POSITIVE)
        moved = found.known & ((value != 0) | (c.value != 0))
        return self.lost(found, moved, f"{self.traced.name(node)} makes something else of 0")

    def _aligned(self, x: Node, at: int, size: int) -> bool:
        """Whether `x` has the same channels, or is one number for all of them."""
        shape, c = self.traced.shapes.get(x), self.channels.get(x)
        if shape is None:
            return False
        if c is None:
            return len(shape) < -at or shape[at] == 1
        return c.dim - len(shape) == at and len(c.units) == size


def constants(weight: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """What the inputs at `where` add to every output of a layer, given their constants; float64."""
    if weight.shape[1] == 1 < len(value):  # depthwise
        return weight.double().flatten(1).sum(1) * torch.where(where, value, 0)
    columns = weight[:, where].double()
    return columns.flatten(2).sum(2) @ value[where] if columns.ndim > 2 else columns @ value[where]


def _padding(module: nn.Conv2d) -> bool:
    """Whether the convolution pads at all."""
    if isinstance(module.padding, str):
        return module.padding != "valid" and max(module.kernel_size) > 1
    return any(module.padding)


def _joined(dim: int, parts: list[Channels]) -> Channels:
    return Channels(
        dim,
        torch.cat([c.units for c in parts]),
        torch.cat([c.value for c in parts]),
        torch.cat([c.why for c in parts]),
    )


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _last(node: Node) -> Any:
    """The last size of x.view(a, b), x.view((a, b)) or torch.reshape(x, (a, b))."""
    sizes = node.args[-1]
    return sizes[-1] if isinstance(sizes, (list, tuple)) else sizes
