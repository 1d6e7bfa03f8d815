"""A model as a graph of operations: its trace, the shape of every tensor, and what kind each operation is.

The trace is only read, never run in the model's place.  Layers with weights are leaves of it, so an
operation is a layer, one of the few kinds below that `groups` understands, or "opaque":
whatever is in no table keeps the tensors that it touches whole.
"""

import copy
import inspect
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..nn import SparseConv2d, SparseLayer, SparseLinear

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear, SparseLinear)
CONV = (nn.Conv2d, SparseConv2d)

# "relu": zero, with a gradient of exactly zero, for every input <= 0.  "pointwise": any other function of one
# number.  "same": a constant stays what it is.  "average": only 0 does (padding is averaged in).
_MODULES: dict[type[nn.Module], str] = {
    **dict.fromkeys(LINEAR, "layer"),
    **dict.fromkeys(CONV, "layer"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "norm"),
    **dict.fromkeys((nn.ReLU, nn.ReLU6), "relu"),
    **dict.fromkeys(
        (
            *(
                nn.GELU,
                nn.SiLU,
                nn.Sigmoid,
                nn.Tanh,
                nn.LeakyReLU,
                nn.ELU,
                nn.CELU,
                nn.SELU,
                nn.Mish,
            ),
            *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid),
        ),
        "pointwise",
    ),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "same"),
    **dict.fromkeys(
        (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), "same"
    ),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), "same"),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d), "average"),
    nn.Flatten: "flatten",
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu6, torch.relu, F.relu_, torch.relu_), "relu"),
    **dict.fromkeys((F.gelu, F.silu, F.leaky_relu, F.elu, F.mish, F.hardswish), "pointwise"),
    **dict.fromkeys((F.hardsigmoid, F.hardtanh, F.softplus, F.sigmoid, F.tanh), "pointwise"),
    **dict.fromkeys((torch.sigmoid, torch.tanh), "pointwise"),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), "same"),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, torch.max_pool1d, torch.max_pool2d), "same"),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d), "same"),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d), "same"),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d), "average"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), "div"),
    **dict.fromkeys((torch.cat, torch.concat), "cat"),
    torch.flatten: "flatten",
    torch.reshape: "reshape",
    torch.mean: "mean",
    F.pad: "pad",
    operator.getitem: "getitem",
    getattr: "shape",
}
_METHODS: dict[str, str] = {
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys(("sigmoid", "sigmoid_", "tanh", "tanh_"), "pointwise"),
    **dict.fromkeys(("contiguous", "clone"), "same"),
    **dict.fromkeys(("add", "add_"), "add"),
    **dict.fromkeys(("sub", "sub_"), "sub"),
    **dict.fromkeys(("mul", "mul_"), "mul"),
    **dict.fromkeys(("div", "div_"), "div"),
    **dict.fromkeys(("view", "reshape"), "reshape"),
    **dict.fromkeys(("size", "dim"), "shape"),
    "flatten": "flatten",
    "mean": "mean",
}
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, F.relu_, torch.relu_)


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
        if node.op == "call_module":
            name = str(node.target)
            if name in self.fixed or _hooked(self.modules[name]):
                return "opaque"
            return _MODULES.get(type(self.modules[name]), "opaque")
        if node.op == "call_method":
            return _METHODS.get(str(node.target), "opaque")
        return _FUNCTIONS.get(node.target, "opaque") if node.op == "call_function" else "opaque"

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
        return node.target in _IN_PLACE or flagged or bool(node.kwargs.get("inplace", False))

    def overwritten(self) -> set[Node]:
        """Tensors with several readers that one of them overwrites, itself or through a view."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            source = node.args[0] if node.args and self.in_place(node) else None
            while isinstance(source, Node):
                if len(source.users) > 1:
                    found.add(source)
                views = self.kind(source) in ("same", "flatten", "reshape", "getitem")
                source = source.args[0] if views or self.in_place(source) else None
        return found


def trace(model: nn.Module, example: tuple[Tensor, ...], training: bool) -> Traced:
    """Traces a copy of the model in evaluation mode and runs it once on `example`.

    Errors: ValueError for a model that cannot be traced or does not take the example, and with
    `training` for one that does something else in training.
    """
    original, model = model, copy.deepcopy(model).eval()
    graph = _graph(model, example)
    # A copy again, since a trace puts constants that it meets on the model.
    if training and _steps(_graph(copy.deepcopy(original).train(), example)) != _steps(graph):
        raise ValueError(
            f"compact: {type(model).__name__} runs other operations in training than in evaluation; "
            "compact(..., training=False) keeps what it computes in evaluation"
        )
    shapes = _Shapes(fx.GraphModule(model, graph))
    try:
        with torch.no_grad():
            output = shapes.run(*example)
    except Exception as error:
        raise ValueError(
            f"compact: {type(model).__name__} does not run on the example, "
            f"{', '.join(str(tuple(x.shape)) for x in example) or 'which is empty'}: {error}"
        ) from error
    modules = dict(model.named_modules())
    return Traced(graph, shapes.found, modules, _fixed(graph, modules), output)


class _Tracer(fx.Tracer):
    """Stops at torch.nn's modules and at sparse layers, and remembers in which module it is."""

    inside = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        outside, self.inside = self.inside, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.inside = outside  # not after an error: it tells where that was
        return result


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Node, torch.Size] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = result.shape
        return result


def _graph(model: nn.Module, example: tuple[Tensor, ...]) -> fx.Graph:
    parameters = list(inspect.signature(model.forward).parameters.values())
    # Arguments that the example leaves at their defaults are constants of the trace.
    left = [p for p in parameters[len(example) :] if p.default is not inspect.Parameter.empty]
    tracer = _Tracer()
    try:
        return tracer.trace(model, concrete_args={p.name: p.default for p in left} or None)
    except Exception as error:
        place = f" in {tracer.inside!r}" if tracer.inside else ""
        raise ValueError(
            f"compact: {type(model).__name__} cannot be traced{place}: {error}\n"
            "expected a forward that torch.fx.symbolic_trace can follow: no `if` or loop over values "
            "or shapes of tensors; make such code a function and decorate it with torch.fx.wrap"
        ) from error


def _steps(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph does, but for flags such as F.dropout's `training`."""
    return [(n.op, str(n.target), [i.name for i in n.all_input_nodes]) for n in graph.nodes]


def _fixed(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Layers and normalisations whose calls do not tell all about them."""
    calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values())
    fixed: dict[str, str] = {}
    for name, module in modules.items():
        if _MODULES.get(type(module)) not in ("layer", "norm"):
            continue
        own = [p for p in module._parameters.values() if p is not None]
        if name not in calls:
            fixed[name] = "it is not called as a module of its own"
        elif calls[name] > 1:
            fixed[name] = "it is called more than once"
        elif name in read or set(module._parameters) != {"weight", "bias"}:
            fixed[name] = "its parameters are used outside of it or reparametrised"
        elif any(owners[id(p)] > 1 for p in own):
            fixed[name] = "it shares a parameter with another module"
        elif _hooked(module):
            fixed[name] = "it has hooks, which may do anything"
    return fixed


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
