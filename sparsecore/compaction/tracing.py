"""A model as a graph of operations, with the shape of every tensor.

The trace is only read, never run in the model's place, and layers with weights are leaves of it.  What
torch.fx leaves out is added here or kept whole: operations in place, custom gradients, hooks, weights
that forward reads by itself, and tensors that it leaves on modules.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.fx import Node
from torch.fx.graph import CodeGen
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..attention import SparseMultiheadAttention
from ..copies import copied
from ..layer import SparseLayer
from .operations import IN_PLACE, Traced, hooked, kind_of_call, kind_of_module


def trace(model: nn.Module, example: tuple[Tensor, ...], training: bool) -> Traced:
    """Traces a copy of the model in evaluation mode and runs it once on `example`.

    Errors: ValueError for a model that cannot be traced or does not take the example, and with
    `training` for one that does something else in training.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("compact: expected a plain module, got a compiled one; compact it before")
    original, model = model, copied(model).eval()
    with _Reads() as reads:
        graph = _graph(model, example)
    # A copy again, since a trace puts constants that it meets on the model.
    if training and _steps(_graph(copied(original).train(), example)) != _steps(graph):
        raise ValueError(
            f"compact: {type(model).__name__} runs other operations in training than in evaluation; "
            "compact(..., training=False) keeps what it computes in evaluation"
        )
    shapes = _Shapes(fx.GraphModule(model, graph))
    try:
        with torch.no_grad():
            shapes.run(*example)
            output = copied(original).eval()(*example)  # with the hooks of the model itself
    except Exception as error:
        raise ValueError(
            f"compact: {type(model).__name__} does not run on the example, "
            f"{', '.join(str(tuple(getattr(x, 'shape', ()))) for x in example) or 'which is empty'}: "
            + " ".join(str(error).split())
        ) from error
    modules = dict(model.named_modules())
    return Traced(graph, shapes.found, modules, _fixed(graph, modules, reads.found), output)


class _Reads(TorchFunctionMode):
    """Notes the parameters that code computes with while it is traced, as with a sparse layer's `weight`.

    Those computations happen at once and leave only a constant in the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.found |= {id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter)}
        return func(*args, **(kwargs or {}))


class _Proxy(fx.Proxy):
    """Records `y += x` as what it is; torch.fx alone takes it for `y = y + x`."""


for _function in IN_PLACE:
    setattr(
        _Proxy,
        f"__{_function.__name__}__",
        lambda self, other, function=_function: self.tracer.create_proxy(
            "call_function", function, (self, other), {}
        ),
    )


class _Tracer(fx.Tracer):
    """Stops at torch.nn's modules, sparse layers and hooks, and remembers in which module it is."""

    inside = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, SparseLayer | SparseMultiheadAttention) or hooked(m)
        return known or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)

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
    left = [p for p in parameters[len(example) :] if p.default is not p.empty]
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    tracer = _Tracer()
    try:
        with _whole_functions(tracer):
            graph = tracer.trace(model, concrete_args={p.name: p.default for p in left} or None)
    except Exception as error:
        place = f" in {tracer.inside!r}" if tracer.inside else ""
        raise ValueError(
            f"compact: {type(model).__name__} cannot be traced{place} ({' '.join(str(error).split())}); "
            "expected a forward that torch.fx.symbolic_trace can follow: no `if` or loop over values "
            "or shapes of tensors; make such code a function and decorate it with torch.fx.wrap"
        ) from error
    _drop_defaults(graph, len([p for p in single if p not in left]))
    _show_attributes(model, graph)
    return graph


_apply = Function.__dict__["apply"]


@cache
def _application(function: type[Function]) -> Callable[..., Any]:
    """`function.apply` as a function with its name."""
    return wraps(function, updated=())(lambda *args: _apply.__get__(None, function)(*args))


@contextmanager
def _whole_functions(tracer: fx.Tracer) -> Iterator[None]:
    """Records `Function.apply` as one operation: its forward does not tell what its backward does."""

    def apply(cls: type[Function], *args: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(args)):
            return tracer.create_proxy("call_function", _application(cls), args, {})
        return _apply.__get__(None, cls)(*args)

    Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        Function.apply = _apply


def _drop_defaults(graph: fx.Graph, count: int) -> None:
    """Takes out all inputs after the first `count`: defaults, which torch.fx only compares with the trace."""

    def erase(node: Node) -> None:
        for user in list(node.users):
            erase(user)
        graph.erase_node(node)

    places = [n for n in graph.nodes if n.op == "placeholder" and not n.target.startswith("*")]
    for node in places[count:]:
        erase(node)
    graph.set_codegen(CodeGen())  # without it, a tuple as a default asks for a tree of inputs


def attribute_of_a_module(value: Any) -> Any:
    """Stands in a graph for the reader of a tensor that forward leaves on a module."""
    return value


def _show_attributes(model: nn.Module, graph: fx.Graph) -> None:
    """Adds a reader of every tensor that forward has left on a module, as for a loss beside the output."""
    end = next(node for node in graph.nodes if node.op == "output")
    for module in model.modules():
        for key, value in list(vars(module).items()):
            found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, fx.Proxy)]
            for leaf in found:
                with graph.inserting_before(end):
                    graph.call_function(attribute_of_a_module, (leaf.node,))
            if found:
                delattr(module, key)


def _steps(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph does, with the numbers that say what becomes of a constant.

    Without those of opaque operations and of dropout, which follow the mode and matter to no unit.
    """
    steps: list[tuple[Any, ...]] = []
    for n in graph.nodes:
        settings = "" if kind_of_call(n) in ("opaque", "same") else f"{n.args} {n.kwargs}"
        steps.append((n.op, str(n.target), [i.name for i in n.all_input_nodes], settings))
    return steps


def _fixed(graph: fx.Graph, modules: dict[str, nn.Module], reads: set[int]) -> dict[str, str]:
    """Layers and normalisations whose calls do not tell all about them."""
    calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values())
    fixed: dict[str, str] = {}
    for name, module in modules.items():
        known = kind_of_module(module) in ("layer", "norm")
        if not known and not isinstance(module, SparseLayer):  # that may be of a class of its own
            continue
        own = [p for p in module._parameters.values() if p is not None]
        if name not in calls:
            fixed[name] = "it is not called as a module of its own"
        elif calls[name] > 1:
            fixed[name] = "it is called more than once"
        elif (
            name in read
            or any(id(p) in reads for p in own)
            or set(module._parameters) != {"weight", "bias"}
        ):
            fixed[name] = "its parameters are used outside of it or reparametrised"
        elif any(owners[id(p)] > 1 for p in own):
            fixed[name] = "it shares a parameter with another module"
        elif hooked(module):
            fixed[name] = "it has hooks, which may do anything"
    return fixed
