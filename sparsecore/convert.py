"""Whole models: make layers sparse-capable, make them plain again, and look at them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from threading import Lock
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .attention import SparseMultiheadAttention, projections
from .nn import SparseConv2d, SparseLayer, SparseLinear
from .patterns import Gated, Planned

Filter = Callable[[str, nn.Module], bool] | type | str | Iterable[str]

# Exact types only: a subclass may compute something else with its weight.
_SPARSE_TYPES: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    NonDynamicallyQuantizableLinear: SparseLinear,  # the output projection of nn.MultiheadAttention
    nn.Conv2d: SparseConv2d,
}
_ATTENTION = (nn.MultiheadAttention, SparseMultiheadAttention)


def is_prunable(name: str, module: nn.Module) -> bool:
    """The default filter: every nn.Linear and nn.Conv2d, first and last layer included.

    The projections of `nn.MultiheadAttention` are linear layers too: `in_proj` (queries, keys and values; `q_proj`,
    `k_proj` and `v_proj` where keys or values have sizes of their own) and `out_proj`, by names such as
    `encoder.layers.0.self_attn.in_proj`.  Biases, normalisation and embeddings stay dense.
    """
    return type(module) in _SPARSE_TYPES


def sparsify_(model: nn.Module, filter_fn: Filter = is_prunable) -> nn.Module:
    """Replaces the chosen layers by their sparse forms in place and returns the model.

    `nn.MultiheadAttention` with a chosen projection becomes `SparseMultiheadAttention`.  Parameters are shared,
    not copied, so an existing optimiser keeps working; outputs are unchanged.

    Args:
        filter_fn: `f(name, module) -> bool`, a module type, a glob on the layer's name
            (`"layer?.*"`), or several globs.  Only nn.Linear and nn.Conv2d can be chosen, and the projections of
            nn.MultiheadAttention, of which it is asked as an nn.Linear each.

    Errors: ValueError if nothing matches.
    """
    chosen = _as_predicate(filter_fn)
    found = bool(sparse_layers(model))
    made: dict[nn.Module, nn.Module] = {}  # a layer in several places stays one layer

    def sparse(path: str, layer: nn.Module) -> nn.Module:
        names = [name for name, part in _dense_parts(path, layer) if chosen(name, part)]
        if layer not in made and names:
            made[layer] = _sparse_form(layer, [name.rpartition(".")[2] for name in names])
        return made.get(layer, layer)

    if type(model) in _SPARSE_TYPES or type(model) in _ATTENTION:
        return sparse("", model)
    for name, module in list(model.named_modules()):
        if type(module) in _ATTENTION:
            continue  # what it holds is its own
        for child_name, child in list(module._modules.items()):
            if child is not None:
                path = f"{name}.{child_name}" if name else child_name
                if (new := sparse(path, child)) is not child:
                    setattr(module, child_name, new)
    if not (found or made):
        names = list(dense_layers(model))
        raise ValueError(
            f"sparsify_: no layer matches {filter_fn!r}; the model's linear and convolution layers "
            f"are {', '.join(names[:8]) or 'none'}{', …' if len(names) > 8 else ''}"
        )
    return model


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What `sparsify_` asks its filter about, by name."""
    parts = (part for name, module in model.named_modules() for part in _dense_parts(name, module))
    return dict(parts)


def _dense_parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What can become sparse of a module alone, without its submodules, by name."""
    if type(module) in _SPARSE_TYPES:
        yield path, module
    elif type(module) in _ATTENTION:
        for name, layer in projections(cast(nn.MultiheadAttention, module)).items():
            yield f"{path}.{name}".lstrip("."), layer


def _sparse_form(module: nn.Module, names: list[str]) -> nn.Module:
    """Its sparse form: of an attention these projections, of a sparse one these as well."""
    if isinstance(module, SparseMultiheadAttention):
        return module.sparsify_(names)
    if isinstance(module, nn.MultiheadAttention):
        return SparseMultiheadAttention.from_dense(module, names)
    return _SPARSE_TYPES[type(module)].from_dense(module)


def densify_(model: nn.Module) -> nn.Module:
    """Replaces sparse layers by plain ones of PyTorch with the same keys, in place; returns the model."""
    if isinstance(model, SparseLayer | SparseMultiheadAttention):
        return model.to_dense()
    made: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if isinstance(module, SparseMultiheadAttention):
            continue  # which is made dense as a whole
        for child_name, child in list(module._modules.items()):
            if isinstance(child, SparseLayer | SparseMultiheadAttention):
                if child not in made:
                    made[child] = child.to_dense()
                setattr(module, child_name, made[child])
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Sparse-capable layers by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict's tensors without the patterns of sparse layers; they are the model's own."""
    patterns = tuple(f"{name}.pattern.".lstrip(".") for name in sparse_layers(model))
    state = model.state_dict()  # get_extra_state may give anything
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and not k.startswith(patterns)}


def require_sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """`sparse_layers`, or a ValueError that says how to get some."""
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no sparse layers: call sparsecore.sparsify_(model) first"
        )
    return layers


def require_dense_parameters(model: nn.Module) -> dict[str, SparseLayer]:
    """Sparse layers whose parameters are weights, as searches need them, or a ValueError."""
    layers = require_sparse_layers(model)
    planned = [name for name, layer in layers.items() if isinstance(layer.pattern, Planned)]
    if planned:
        raise ValueError(
            f"expected dense weights, got kept weights alone in {', '.join(planned[:4])}: "
            "call sparsecore.plan_(model, 'mask') first"
        )
    return layers


def advance_(model: nn.Module) -> None:
    """Moves every Gated layer on to its next draw: call once per training step."""
    for layer in sparse_layers(model).values():
        if isinstance(layer.pattern, Gated):
            layer.pattern.step += 1


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Search mode: dropout and the like off, BatchNorm on the batch's own statistics.

    PyTorch's fused evaluation of transformers is off too, since it knows no gradients.  On leaving, modes and
    all buffers (running statistics) are what they were.
    """
    modes = {module: module.training for module in model.modules()}
    running: dict[nn.Module, dict[str, Tensor | None]] = {}
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Without running statistics BatchNorm uses its batch's, and has nothing to update.
            running[module] = module._buffers.copy()
            module._buffers.update(running_mean=None, running_var=None)
    try:
        with _unfused:
            yield
    finally:
        for module, buffers in running.items():
            module._buffers.update(buffers)
        for module, mode in modes.items():
            module.training = mode


class _Unfused:
    """PyTorch's fused evaluation of transformers is off while anybody is within: it is the process's, not a model's.

    Who leaves last puts it back, as threads and generators leave in any order.
    """

    def __init__(self) -> None:
        self.lock, self.within, self.before = Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if self.within == 0:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.within += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.within -= 1
            if self.within == 0:
                torch.backends.mha.set_fastpath_enabled(self.before)


_unfused = _Unfused()


def _as_predicate(filter_fn: Filter) -> Callable[[str, nn.Module], bool]:
    if isinstance(filter_fn, type):
        return lambda name, module: isinstance(module, filter_fn)
    if isinstance(filter_fn, str):
        return lambda name, module: fnmatchcase(name, filter_fn)
    if callable(filter_fn):
        return filter_fn
    globs = tuple(filter_fn)
    return lambda name, module: any(fnmatchcase(name, glob) for glob in globs)
