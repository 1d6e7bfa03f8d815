"""What kind each operation of a model is, as far as channels go.

An operation is a layer, one of the few kinds below that `walk` understands, or "opaque": whatever is
in no table keeps the tensors that it touches whole.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..nn import SparseConv2d, SparseLinear

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear, SparseLinear)
CONV = (nn.Conv2d, SparseConv2d)
IN_PLACE = tuple(
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)

# "relu": zero, with a gradient of exactly zero, for every input <= 0.  "pointwise": any other function of one
# number.  "same": a constant stays what it is.  "average": only 0 does (padding is averaged in).
_KINDS_OF_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "layer": (*LINEAR, *CONV),
    "norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "relu": (nn.ReLU, nn.ReLU6),
    "pointwise": (
        nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish,
        nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid,
    ),
    "same": (
        nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    ),
    "average": (nn.AvgPool1d, nn.AvgPool2d),
    "flatten": (nn.Flatten,),
}  # fmt: skip
_KINDS_OF_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "relu": (F.relu, F.relu6, torch.relu, F.relu_, torch.relu_),
    "pointwise": (
        F.gelu, F.silu, F.leaky_relu, F.elu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh,
        F.softplus, F.sigmoid, F.tanh, torch.sigmoid, torch.tanh,
    ),
    "same": (
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.max_pool1d, F.max_pool2d,
        torch.max_pool1d, torch.max_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
        F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    ),
    "average": (F.avg_pool1d, F.avg_pool2d),
    "add": (operator.add, operator.iadd, torch.add),
    "sub": (operator.sub, operator.isub, torch.sub),
    "mul": (operator.mul, operator.imul, torch.mul),
    "div": (operator.truediv, operator.itruediv, torch.div),
    "cat": (torch.cat, torch.concat),
    "flatten": (torch.flatten,),
    "reshape": (torch.reshape,),
    "mean": (torch.mean,),
    "pad": (F.pad,),
    "getitem": (operator.getitem,),
    "shape": (getattr,),
}  # fmt: skip
_KINDS_OF_METHODS: dict[str, tuple[str, ...]] = {
    "relu": ("relu", "relu_"),
    "pointwise": ("sigmoid", "sigmoid_", "tanh", "tanh_"),
    "same": ("contiguous", "clone"),
    "add": ("add", "add_"),
    "sub": ("sub", "sub_"),
    "mul": ("mul", "mul_"),
    "div": ("div", "div_"),
    "reshape": ("view", "reshape"),
    "shape": ("size", "dim"),
    "flatten": ("flatten",),
    "mean": ("mean",),
}
_MODULES = {type_: kind for kind, types in _KINDS_OF_MODULES.items() for type_ in types}
_FUNCTIONS = {f: kind for kind, functions in _KINDS_OF_FUNCTIONS.items() for f in functions}
_METHODS = {name: kind for kind, names in _KINDS_OF_METHODS.items() for name in names}


def kind_of_module(module: nn.Module) -> str:
    return _MODULES.get(type(module), "opaque")


def kind_of_call(node: Node) -> str:
    """The kind of a function or method."""
    if node.op == "call_method":
        return _METHODS.get(str(node.target), "opaque")
    if node.target is getattr and node.args[1] not in ("shape", "dtype", "device", "ndim"):
        return "opaque"  # x.mT and x.data are values
    return _FUNCTIONS.get(node.target, "opaque") if node.op == "call_function" else "opaque"


def hooked(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


@dataclass(frozen=True)
class Traced:
    """A model's operations in order.

    Args:
        shapes: of the nodes that are one tensor.
        modules: the model's modules by name.
        fixed: why a layer or normalisation is not to be changed, by its name.
        output: what the model gives for the example, in evaluation mode.
    """

    graph: fx.Graph
    shapes: dict[Node, torch.Size]
    modules: dict[str, nn.Module]
    fixed: dict[str, str]
    output: Any

    def kind(self, node: Node) -> str:
        """The kind of operation, "opaque" if it is none that we know."""
        if node.op != "call_module":
            return kind_of_call(node)
        name = str(node.target)
        if name in self.fixed or hooked(self.modules[name]):
            return "opaque"
        return kind_of_module(self.modules[name])

    def name(self, node: Node) -> str:
        """The operation in words, for a report."""
        if node.op == "placeholder":
            return "the model's input"
        if node.op == "output":
            return "the model's output"
        if node.op == "get_attr":
            return f"the tensor {node.target}"
        if node.op == "call_module":
            return f"{type(self.modules[str(node.target)]).__name__} {node.target}"
        return str(getattr(node.target, "__name__", node.target))

    def in_place(self, node: Node) -> bool:
        """Whether the operation overwrites its first argument."""
        if node.op == "call_module":
            return bool(getattr(self.modules[str(node.target)], "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_")
        activation = self.kind(node) in ("relu", "pointwise")
        flagged = activation and any(a is True for a in node.args[1:])
        named = str(getattr(node.target, "__name__", "")).endswith("_")  # torch.relu_
        return (
            node.target in IN_PLACE or named or flagged or bool(node.kwargs.get("inplace", False))
        )

    def overwritten(self) -> set[Node]:
        """Tensors with several readers that one of them overwrites, itself or through a view."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            source = node.args[0] if node.args and self.in_place(node) else None
            while isinstance(source, Node):
                if len(source.users) > 1:
                    found.add(source)
                views = self.kind(source) in ("same", "flatten", "reshape", "getitem", "opaque")
                source = source.args[0] if views or self.in_place(source) else None
        return found
