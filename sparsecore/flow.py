"""What a network of |theta| passes on for ones: R of `scores.synflow`, whose docstring says why it is made so."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from .batches import Several, of_samples, target_key
from .calls import arguments, forward
from .convert import sparse_layers
from .copies import copied
from .layer import SparseLayer
from .losses import Loss
from .outputs import scores_in

_NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def refuse_embeddings(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """What gives ones whatever its weights are has no flow of its own; a head that shares them has."""
    leading = {m.leader for m in model.modules() if isinstance(m, SparseLayer)}
    for name, layer in layers.items():
        if isinstance(layer, nn.Embedding) and layer not in leading:
            raise ValueError(
                f"synflow: expected layers that a signal passes, got the embedding {name!r}, which gives ones here; "
                "leave it dense, or take another score"
            )


def _ones_for(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.ones_like(output)


def flow_of(net: nn.Module, inputs: Any, loss: Loss) -> Tensor:
    """The sum of what the network gives for ones; where tokens are embedded, for embeddings of ones."""
    embeddings = [m for m in net.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    hooks = [m.register_forward_hook(_ones_for) for m in embeddings]

    def ones(t: Any) -> Any:
        if isinstance(t, PackedSequence):
            return t._replace(data=ones(t.data))
        if isinstance(t, Tensor) and (t.is_floating_point() or not embeddings):
            return torch.ones_like(t, dtype=torch.float64)
        return t

    def output_of(given: Any, target: Mapping[str, Any]) -> Any:
        kind = Several if isinstance(given, Several) else lambda x: x
        first = tuple(given) if kind is Several else given
        # A nest that is one argument may be a sample each: it stays whole, which the scores' scale makes up for.
        args = arguments(net, given)[0]
        if not (len(args) == 1 and isinstance(args[0], (tuple, list))):
            first, target = of_samples((first, target), slice(0, 1))
        first = kind(tree_map(ones, first, is_leaf=lambda t: isinstance(t, PackedSequence)))
        return forward(net, dict(first) | dict(target) if target else first)

    key = target_key(inputs) if isinstance(inputs, Mapping) else None
    without = inputs if key is None else {k: v for k, v in inputs.items() if k != key}
    try:
        output = output_of(without, {})
    except (ValueError, TypeError) as error:
        if key is None:
            raise
        try:  # some make a decoder's inputs of it
            output = output_of(without, {key: inputs[key]})
        except (ValueError, TypeError, RuntimeError):
            raise error from None
        if isinstance(output, Tensor) and not output.ndim:  # a loss by itself
            raise
    finally:
        for hook in hooks:
            hook.remove()
    if loss.scores is not None:
        return loss.scores(output).sum()
    try:
        return scores_in(output).sum()
    except ValueError:  # a nest: all that it gives, but a loss
        found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        return torch.stack([t.sum() for t in [t for t in found if t.ndim] or found]).sum()


def positive(model: nn.Module) -> nn.Module:
    """A copy in float64 with |theta| that passes ones on with mean 1, positive and, under ReLU, linear.

    No biases, no dropout; `synflow` says why and what becomes of normalisation.
    """
    net = copied(model).double().eval().requires_grad_(False)
    for name, p in net.named_parameters():
        p.zero_() if "bias" in name.rpartition(".")[2] else p.abs_()
    for layer in sparse_layers(net).values():
        row = layer.weight.sum() / layer.weight_shape[0]
        layer.raw_weight.div_(row.where(row > 0, 1))
    for module in net.modules():
        if isinstance(module, _NORMALISATION):
            module.forward = _to_mean_one  # pyright: ignore[reportAttributeAccessIssue]
    return net


def _to_mean_one(x: Tensor) -> Tensor:
    mean = x.detach().mean()
    return x / mean.where(mean > 0, 1)
