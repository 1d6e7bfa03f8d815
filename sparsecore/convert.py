"""Whole models: make layers sparse-capable, make them plain again, and look at them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .attention import SparseMultiheadAttention, bare_keys, projections
from .claims import require_module, sole
from .given_back import given_back
from .layer import SparseLayer
from .nn import computes_itself, sparse_type
from .patterns import Gated, Planned
from .process import Shared
from .recurrent import RECURRENT, SparseRecurrent, matrices, matrix_keys
from .tied import require_own_memory, tie_

Predicate = Callable[[str, nn.Module], bool]
Filter = Predicate | type | str | Iterable[str | type]

_ATTENTION = (nn.MultiheadAttention, SparseMultiheadAttention)
_WHOLES = (*_ATTENTION, *RECURRENT, *RECURRENT.values())  # whose weights are layers, by parts


def is_prunable(name: str, module: nn.Module) -> bool:
    """The default filter: every layer that multiplies by a weight matrix, first and last layer included.

    These are nn.Linear, nn.Conv1d to Conv3d, ConvTranspose1d to 3d, nn.Bilinear, Hugging Face's Conv1D and their
    subclasses without a forward of their own.  The projections of `nn.MultiheadAttention` are linear layers too:
    `in_proj` (queries, keys and values; `q_proj`, `k_proj` and `v_proj` where keys or values have sizes of their own)
    and `out_proj`, by names such as `encoder.layers.0.self_attn.in_proj`; so are the matrices of nn.LSTM, nn.GRU,
    nn.RNN and their cells: `rnn.ih_l0`, `rnn.hh_l0`, ...  Biases, normalisation and embeddings stay dense; an
    embedding can be chosen, and one that shares its weight with a chosen layer is.
    """
    plain = type(module)
    return (
        sparse_type(plain) is not None
        and not isinstance(module, nn.Embedding)
        and not computes_itself(plain)
    )


@sole("sparsify_", whole=True)
def sparsify_(model: nn.Module, filter_fn: Filter = is_prunable) -> nn.Module:
    """Replaces the chosen layers by their sparse forms in place and returns the model.

    `nn.MultiheadAttention`, `nn.LSTM`, `nn.GRU` and `nn.RNN` with a chosen matrix become `SparseMultiheadAttention`
    and so on.  Parameters are shared, not copied, so an existing optimiser keeps working; outputs are unchanged.
    Layers that share a weight become sparse together and share a pattern: one mask for one tensor.

    Args:
        filter_fn: `f(name, module) -> bool`, a module type, a glob on the layer's name (`"layer?.*"`), or several
            types and globs.  A glob that begins with "!" excludes, and exclusions alone leave all others of the
            default: `["!head", "!*.embed"]`.  Matrices of an attention or a recurrent network are asked about as an
            nn.Linear each; a subclass with a forward of its own has to read `self.weight` there.

    Errors: ValueError if nothing matches, or for a chosen layer whose weight another tool computes
    (`torch.nn.utils.prune`, weight_norm, parametrize, lazy layers), or a model that another thread works with; nothing
    changes then.
    """
    chosen = _as_predicate(filter_fn)
    found = bool(sparse_layers(model))
    wanted = _wanted(model, chosen)
    if not (found or wanted):
        names = list(dense_layers(model))
        raise ValueError(
            f"sparsify_: no layer matches {_told(filter_fn)}; the model's layers with a weight matrix "
            f"are {', '.join(names[:8]) or 'none'}{', …' if len(names) > 8 else ''}"
        )
    _refuse_others(wanted)
    require_own_memory(
        model,
        {id(part._parameters.get("weight")) for of in wanted.values() for part in of.values()},
    )
    made: dict[nn.Module, nn.Module] = {}  # a layer in several places stays one layer
    for module, parts in wanted.items():
        made[module] = _sparse_form(module, [name.rpartition(".")[2] for name in parts])
    if model in made:
        model = made[model]
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and made.get(child, child) is not child:
                setattr(module, name, made[child])
    tie_(model)
    return model


def _wanted(model: nn.Module, chosen: Predicate) -> dict[nn.Module, dict[str, nn.Module]]:
    """The modules that become sparse: those with a chosen part, and those that share a weight with one."""
    parts = {
        module: dict(_dense_parts(name, module))
        for name, module in model.named_modules()
        if not _within_whole(model, name)
    }
    wanted = {
        module: {n: part for n, part in found.items() if chosen(n, part)}
        for module, found in parts.items()
    }
    weights = {id(part._parameters.get("weight")) for of in wanted.values() for part in of.values()}
    weights |= {id(layer.raw_weight) for layer in sparse_layers(model).values()}
    weights.discard(id(None))
    for module, found in parts.items():
        wanted[module] |= {
            n: part for n, part in found.items() if id(part._parameters.get("weight")) in weights
        }
    return {module: found for module, found in wanted.items() if found}


def _within_whole(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of an attention or a recurrent network, which becomes sparse as a whole."""
    parent = name.rpartition(".")[0]
    return name != "" and type(model.get_submodule(parent)) in _WHOLES


def _refuse_others(wanted: Mapping[nn.Module, Mapping[str, nn.Module]]) -> None:
    for module, found in wanted.items():
        if type(module) in _WHOLES and (keys := _computed(module)):
            raise ValueError(
                f"sparsify_: expected the matrices of {', '.join(found)} to be parameters, got "
                f"{', '.join(keys)} as another tool computes them (torch.nn.utils.prune, weight_norm, parametrize): "
                "remove that first, or leave the layers out with filter_fn='!...'"
            )
        for name, part in found.items():
            weight = part._parameters.get("weight")
            if weight is None or parametrize.is_parametrized(part):
                raise ValueError(
                    f"sparsify_: expected a weight that is {name or 'the layer'}'s parameter, got one that "
                    "another tool computes (torch.nn.utils.prune, weight_norm, spectral_norm, parametrize): remove "
                    "that first (Ticket.from_prune keeps the masks of prune), or leave the layer out with filter_fn="
                    f"'!{name}'"
                )
            if "forward" in vars(module):
                raise ValueError(
                    f"sparsify_: expected {name or 'the layer'} to have its class's forward, got one that another tool "
                    "has put before it (accelerate's hooks: remove_hook_from_submodules; or sparsify_ before they are "
                    f"added), or leave the layer out with filter_fn='!{name}'"
                )
            if isinstance(weight, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"sparsify_: expected {name or 'the layer'} to know its shape, got a lazy layer; run the model "
                    "once before"
                )


def _computed(whole: nn.Module) -> list[str]:
    """Of an attention or a recurrent network, the matrices that another tool computes."""
    keys = bare_keys(whole) if isinstance(whole, nn.MultiheadAttention) else matrix_keys(whole)
    return [key for key in keys if whole._parameters.get(key) is None]


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What `sparsify_` asks its filter about, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not _within_whole(model, name):
            found |= _dense_parts(name, module)
    return found


def _dense_parts(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What can become sparse of a module alone, without its submodules, by name."""
    if isinstance(module, SparseLayer):
        return
    if type(module) in _WHOLES:
        find = projections if type(module) in _ATTENTION else matrices
        for name, layer in find(module).items():  # pyright: ignore[reportArgumentType]
            yield f"{path}.{name}".lstrip("."), layer
    elif sparse_type(type(module)) is not None:
        yield path, module


def _sparse_form(module: nn.Module, names: list[str]) -> nn.Module:
    """Its sparse form: of an attention or a recurrent network these parts, of a sparse one these as well."""
    if isinstance(module, SparseMultiheadAttention | SparseRecurrent):
        return module.sparsify_(names)
    if isinstance(module, nn.MultiheadAttention):
        return SparseMultiheadAttention.from_dense(module, names)
    if type(module) in RECURRENT:
        return RECURRENT[type(module)].from_dense(module, names)  # pyright: ignore[reportArgumentType]
    kind = sparse_type(type(module))
    assert kind is not None
    return kind.from_dense(module)


@sole("densify_", whole=True)
def densify_(model: nn.Module) -> nn.Module:
    """Replaces sparse layers by plain ones of PyTorch with the same keys, in place; returns the model.

    Errors: ValueError for a weight that another tool computes, or a model that another thread works with; nothing
    changes then.
    """
    for layer in sparse_layers(model).values():
        layer._require_parameter("densify_")
    baked: dict[int, nn.Parameter | None] = {}  # a weight in several places stays one weight
    made: dict[nn.Module, nn.Module] = {}

    def dense(module: SparseLayer | SparseMultiheadAttention | SparseRecurrent) -> nn.Module:
        if module not in made:
            plain = module.to_dense()
            if isinstance(module, SparseLayer):
                raw = id(module.raw_weight)
                plain._parameters["weight"] = baked.setdefault(raw, plain._parameters["weight"])
            made[module] = plain
        return made[module]

    kinds = (SparseMultiheadAttention, SparseRecurrent)
    if isinstance(model, SparseLayer | SparseMultiheadAttention | SparseRecurrent):
        return dense(model)
    for module in list(model.modules()):
        if isinstance(module, kinds):
            continue  # which is made dense as a whole
        for child_name, child in list(module._modules.items()):
            if isinstance(child, SparseLayer | SparseMultiheadAttention | SparseRecurrent):
                setattr(module, child_name, dense(child))
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Sparse-capable layers by name, in the model's order; of several that share a weight the first alone.

    Errors: TypeError for what is no model.
    """
    require_module(model, "sparse_layers")
    found = {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
    inside = set(found.values())
    return {name: m for name, m in found.items() if m.leader is None or m.leader not in inside}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict's tensors without the patterns of sparse layers; they are the model's own."""
    layers = (
        name
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, SparseLayer)
    )
    patterns = tuple(f"{name}.pattern.".lstrip(".") for name in layers)
    state = model.state_dict()  # get_extra_state may give anything
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and not k.startswith(patterns)}


def require_sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """`sparse_layers`, or a ValueError that says how to get some."""
    tie_(model)
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
    for name, layer in layers.items():
        layer._require_parameter(f"search of {name}")
    return layers


def advance_(model: nn.Module) -> None:
    """Moves every Gated layer on to its next draw: call once per training step."""
    for layer in sparse_layers(model).values():
        if isinstance(layer.pattern, Gated):
            layer.pattern.step += 1


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Search mode: dropout and the like off, BatchNorm on the batch's own statistics.

    PyTorch's fused evaluation of transformers is off too, since it knows no gradients.  The model is given back.
    """
    with given_back(model):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # Without running statistics BatchNorm uses its batch's, and has nothing to update.
                module._buffers.update(running_mean=None, running_var=None)
        with _unfused():
            yield


@contextmanager
def _without_fused() -> Iterator[None]:
    """PyTorch's fused evaluation of transformers is off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_unfused = Shared(_without_fused)


def _as_predicate(filter_fn: Filter) -> Predicate:
    if callable(filter_fn) and not isinstance(filter_fn, type):
        return filter_fn
    wanted = [filter_fn] if isinstance(filter_fn, str | type) else list(filter_fn)
    for one in wanted:
        if not isinstance(one, str | type):
            raise ValueError(
                f"sparsify_: expected layers by globs on names or by types, got {one!r} among them"
            )
    excluded = [one[1:] for one in wanted if isinstance(one, str) and one.startswith("!")]
    included = [one for one in wanted if not (isinstance(one, str) and one.startswith("!"))]

    def matches(name: str, module: nn.Module, one: str | type) -> bool:
        return fnmatchcase(name, one) if isinstance(one, str) else isinstance(module, one)

    def chosen(name: str, module: nn.Module) -> bool:
        if any(fnmatchcase(name, glob) for glob in excluded):
            return False
        if not included:
            return is_prunable(name, module)
        return any(matches(name, module, one) for one in included)

    return chosen


def _told(filter_fn: Filter) -> str:
    """A filter as its user wrote it."""
    if isinstance(filter_fn, str):
        return repr(filter_fn)
    if callable(filter_fn):
        return getattr(filter_fn, "__name__", repr(filter_fn))
    return ", ".join(one.__name__ if isinstance(one, type) else repr(one) for one in filter_fn)
