"""Masks and weights out of pruned models of other tools, and back: zeros, and `torch.nn.utils.prune`."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from . import schema
from .convert import dense_layers, is_prunable, sparse_layers
from .layer import weight_key
from .tied import holders
from .zeros import SHARDED, is_sharded

Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # masks by layer, plain weights by key


def zeros_of(model: nn.Module) -> Found:
    """See `Ticket.from_zeros`.  Errors: ValueError."""
    weights = _weights(model)
    return _found(model, {name: weight != 0 for name, weight in weights.items()}, {})


def pruned_of(model: nn.Module) -> Found:
    """See `Ticket.from_prune`.  Errors: ValueError."""
    masks: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    holding: dict[int, dict[str, Tensor | None]] = defaultdict(
        dict
    )  # masks by layer, of one parameter
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            weight = key.removesuffix("_orig")
            mask = None if weight == key else module._buffers.get(f"{weight}_mask")
            place = f"{path}.{weight}".lstrip(".")
            name = _layer_of(path, module, weight)
            if mask is not None:
                if name is None:
                    raise ValueError(
                        f"from_prune: expected masks over weights, got one over {place}; prune.remove it first"
                    )
                plain[place] = parameter.detach()
            holding[id(parameter)][place if name is None else name] = mask
    for by_layer in holding.values():
        found = [mask != 0 for mask in by_layer.values() if mask is not None]
        if not found:
            continue
        if len(found) < len(by_layer) or not all(torch.equal(mask, found[0]) for mask in found):
            raise ValueError(
                f"from_prune: expected one mask for the weight that {', '.join(by_layer)} share, got different ones, "
                "or none in some; prune all of them alike, or give each a weight of its own"
            )
        masks[next(iter(by_layer))] = found[0]  # as sparse layers that share a weight are called
    if not masks:
        raise ValueError(
            "from_prune: expected layers under torch.nn.utils.prune, found none; Ticket.from_zeros takes models whose "
            "pruned weights are zeros"
        )
    return _found(model, masks, plain)


def _layer_of(path: str, module: nn.Module, key: str) -> str | None:
    """The sparse layer that a parameter is the weight of; None for another parameter."""
    if key == "weight":
        return path
    if isinstance(module, nn.MultiheadAttention) and key.endswith("_weight"):
        return f"{path}.{key.removesuffix('_weight')}".lstrip(".")
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and key.startswith("weight_"):
        return f"{path}.{key.removeprefix('weight_')}".lstrip(".")
    return None


def prune_(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """See `Ticket.prune_`.  Errors: ValueError; nothing changes then."""
    if sparse_layers(model):
        raise ValueError("prune_: expected a dense model, got sparse layers; densify_ a copy first")
    state = model.state_dict()
    missing = sorted(set(weights) ^ set(state))
    if missing:
        raise ValueError(
            f"the ticket is for another model: expected the same weights, got others in {', '.join(missing[:4])}"
        )
    for key, value in weights.items():
        schema.castable(value, state[key], f"the ticket's weight {key}")
    shared = holders(model)
    places: list[tuple[nn.Module, str, Tensor]] = []
    for name, mask in masks.items():
        key = weight_key(name, state)
        if key not in state or state[key].shape != mask.shape:
            raise ValueError(
                f"the ticket is for another model: it masks {name} {tuple(mask.shape)}"
            )
        for place in shared[id(model.get_parameter(key))]:
            path, _, parameter = place.rpartition(".")
            places.append((model.get_submodule(path), parameter, mask))
    model.load_state_dict(dict(weights))
    for module, parameter, mask in places:
        prune.custom_from_mask(module, parameter, mask)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Weight matrices by layer, of sparse and of dense ones; of layers that share one by the first."""
    found: dict[str, Tensor] = {}
    groups: dict[int, dict[str, nn.Module]] = defaultdict(dict)
    for name, layer in dense_layers(model).items():
        weight = layer._parameters.get("weight")
        if "weight_orig" in layer._parameters:
            raise ValueError(
                f"from_zeros: expected plain weights, got {name} under torch.nn.utils.prune; take Ticket.from_prune, "
                "or prune.remove it first"
            )
        if weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter):
            groups[id(weight)][name] = layer
    for group in groups.values():
        # An embedding by itself has a row of zeros for padding.
        if any(is_prunable(name, layer) for name, layer in group.items()):
            name, layer = next(iter(group.items()))
            found[name] = layer._parameters["weight"].detach()  # pyright: ignore
    for name, layer in sparse_layers(model).items():
        sharded = is_sharded(layer.raw_weight)
        found[name] = layer.raw_weight if sharded else layer.effective_weight.detach()
    if any(map(is_sharded, found.values())):
        raise ValueError(f"from_zeros: {SHARDED}")
    masked = {name: weight for name, weight in found.items() if (weight == 0).any()}
    for name, weight in masked.items():
        if not weight.isfinite().all():
            raise ValueError(f"from_zeros: expected finite weights, got NaN or infinity in {name}")
    if not masked:
        raise ValueError(
            "from_zeros: expected layers whose pruned weights are zeros, found no zero"
        )
    return masked


def _found(model: nn.Module, masks: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Found:
    hidden = tuple(f"{name}.pattern.".lstrip(".") for name in sparse_layers(model))
    others = {f"{key}{end}" for key in plain for end in ("_orig", "_mask")}
    state = {
        key: value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) and not key.startswith(hidden) and key not in others
    }
    weights = {k: v.detach().cpu().clone() for k, v in {**state, **plain}.items()}
    return {name: mask.cpu() for name, mask in masks.items()}, weights
