"""Masks and weights out of pruned models of other tools, and back: zeros, and `torch.nn.utils.prune`."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import prune

from .convert import dense_layers, is_prunable, sparse_layers
from .layer import weight_key

Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # masks by layer, plain weights by key


def zeros_of(model: nn.Module) -> Found:
    """See `Ticket.from_zeros`.  Errors: ValueError."""
    weights = _weights(model)
    return _found(model, {name: weight != 0 for name, weight in weights.items()}, {})


def pruned_of(model: nn.Module) -> Found:
    """See `Ticket.from_prune`.  Errors: ValueError."""
    masks: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for key in [k for k in module._buffers if k.endswith("_mask")]:
            original = module._parameters.get(f"{key.removesuffix('_mask')}_orig")
            mask = module._buffers[key]
            if original is None or mask is None:
                continue
            if key != "weight_mask":
                raise ValueError(
                    f"from_prune: expected masks over weights, got one over {name}.{key.removesuffix('_mask')}; "
                    "prune.remove it first"
                )
            masks[name] = mask != 0
            plain[f"{name}.weight".lstrip(".")] = original.detach()
    if not masks:
        raise ValueError(
            "from_prune: expected layers under torch.nn.utils.prune, found none; Ticket.from_zeros takes models whose "
            "pruned weights are zeros"
        )
    return _found(model, masks, plain)


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
    places = {}
    for name, mask in masks.items():
        key = weight_key(name, state)
        if key not in state or state[key].shape != mask.shape:
            raise ValueError(
                f"the ticket is for another model: it masks {name} {tuple(mask.shape)}"
            )
        path, _, parameter = key.rpartition(".")
        places[name] = (model.get_submodule(path), parameter)
    model.load_state_dict(dict(weights))
    for name, (module, parameter) in places.items():
        prune.custom_from_mask(module, parameter, masks[name])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Weight matrices by layer, of sparse and of dense ones."""
    found: dict[str, Tensor] = {}
    for name, layer in dense_layers(model).items():
        if not is_prunable(name, layer):
            continue  # an embedding has a row of zeros for padding
        weight = layer._parameters.get("weight")
        if weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter):
            found[name] = weight.detach()
    found |= {n: layer.effective_weight.detach() for n, layer in sparse_layers(model).items()}
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
    ends = ("weight_orig", "weight_mask")
    state = {
        key: value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) and not key.startswith(hidden) and not key.endswith(ends)
    }
    weights = {k: v.detach().cpu().clone() for k, v in {**state, **plain}.items()}
    return {name: mask.cpu() for name, mask in masks.items()}, weights
