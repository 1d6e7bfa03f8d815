"""Scores: rank every weight once, keep the best.

`Score = (model, batches, seed) -> {layer: [weight's shape]}`: the larger, the better worth keeping.  Only
the weights of sparse layers are scored; biases and normalisation are never pruned.  `batches` is read
once.  The model is left as it was.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from .batches import Batch
from .convert import batch_statistics, require_dense_parameters, sparse_layers

Score = Callable[[nn.Module, Iterable[Batch], int], dict[str, Tensor]]

_NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def random(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """Uniform noise: the floor that any method has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(layer.raw_weight.shape, generator=generator).to(layer.raw_weight.device)
        for name, layer in require_dense_parameters(model).items()
    }


def magnitude(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """|theta|."""
    layers = require_dense_parameters(model)
    return {name: layer.raw_weight.detach().abs() for name, layer in layers.items()}


def snip(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """|dL/dtheta * theta| of the loss over one pass of `batches` (Lee, Ajanthan & Torr 2019).

    Every sample counts the same, also those of a smaller last batch; the scale is that of a sum of means over
    batches as large as the first.  More data than the paper's single batch only makes this baseline stronger.
    """
    with _differentiable(model) as weights:
        total = [torch.zeros_like(w) for w in weights.values()]
        size = 0
        for x, y in batches:
            size = size or len(y)
            loss = F.cross_entropy(model(x), y) * (len(y) / size)
            _add_(total, _gradient(loss, weights))
    return {
        name: (t * w.detach()).abs() for (name, w), t in zip(weights.items(), total, strict=True)
    }


def grasp(
    model: nn.Module,
    batches: Iterable[Batch],
    seed: int,
    *,
    temperature: float = 200.0,
    per_class: int = 10,
) -> dict[str, Tensor]:
    """theta * Hg, signed: what a weight contributes to the gradient's flow (Wang, Zhang & Grosse 2020, eq. 8).

    The paper removes the highest of -theta * Hg, which are the lowest of these.  g and H are of the
    cross-entropy of logits / `temperature` over `per_class` samples of every class, drawn by `seed` out
    of the first batches that have them.  No more than a batch is differentiated at a time.

    Errors: ValueError if there is no batch; RuntimeError from PyTorch for an operation without a second
    derivative (hardsigmoid).
    """
    # The one kernel of attention that can be differentiated twice.
    with _differentiable(model) as weights, sdpa_kernel(SDPBackend.MATH):
        parts = _few_of_each_class(model, batches, per_class, seed)
        count = sum(len(y) for _, y in parts)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x) / temperature, y, reduction="sum") / count

        g = [torch.zeros_like(w) for w in weights.values()]
        for part in parts:
            _add_(g, _gradient(loss(*part), weights))
        product = [torch.zeros_like(w) for w in weights.values()]
        for part in parts:  # H is the sum over the parts: g has to be whole before
            own = _gradient(loss(*part), weights, create_graph=True)
            along = torch.stack([(a * b).sum() for a, b in zip(own, g, strict=True)]).sum()
            _add_(product, _gradient(along, weights))
    return {name: w.detach() * hg for (name, w), hg in zip(weights.items(), product, strict=True)}


def synflow(model: nn.Module, batches: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """|dR/dtheta * theta| / R, R the summed outputs of the |theta| network for ones (Tanaka et al. 2020, eq. 3).

    In a ReLU network the scores into a hidden unit add up to those out of it and, divided by R, to 1 in
    a layer that all signals pass.  Computed in float64 on a copy; of `batches` only a sample's shape is
    used.  Prune by it in rounds (`search.Iterative`): at once, it cuts off whole layers.

    As in the paper's R there are no biases: their signal comes through none of the layers before.
    Two things are this library's.  Every layer is divided by the mean sum of its rows, and
    normalisation divides by the mean of its input, a constant to the gradient, and does nothing else.
    In a plain network neither changes a ranking.  In a residual one, the share of R that goes through a
    branch or a projection then depends neither on its scale (0 at first in some ResNets) nor on how
    sparse it is: the fewer weights are left, the more each is worth, so that none collapses before the
    rest.  With BatchNorm in evaluation mode, the identity at initialisation, whole shortcuts and stages
    do.

    Activations stay as they are.  Attention mixes tokens that are nearly alike for this input, so
    queries and keys score far below values; what lies behind a saturated activation (squeeze and
    excitation) scores nearly nothing.

    Errors: ValueError if there is no batch, if R overflows, or if a layer whose weights are all 0 (the head
    of torchvision's ViT at first) lets nothing pass.
    """
    layers = require_dense_parameters(model)
    x, _ = _first(batches)
    net = _positive(model)
    weights = {
        name: layer.raw_weight.requires_grad_() for name, layer in sparse_layers(net).items()
    }
    flow = net(torch.ones_like(x[:1], dtype=torch.float64)).sum()
    if not flow.isfinite():
        raise ValueError(
            "synflow: expected a finite sum of outputs, got overflow in float64; check the weights, or "
            "use another score for a network this deep"
        )
    silent = [name for name, layer in layers.items() if not layer.raw_weight.any()]
    if not flow and silent:
        raise ValueError(
            f"synflow: expected a signal through every layer, got weights of 0 alone in {silent[0]}; "
            "initialise it otherwise, or train a little first"
        )
    gradient = _gradient(flow, weights)
    # Where no way through is left, R is 0 and so is every score.
    scale = flow.detach().abs().clamp_min(torch.finfo(torch.float64).tiny)
    return {
        name: (g * w.detach() / scale).abs().float()
        for (name, w), g in zip(weights.items(), gradient, strict=True)
    }


SCORES: dict[str, Score] = {
    "random": random,
    "magnitude": magnitude,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
}


def score_name(score: Score) -> str:
    """What provenance calls a score."""
    # A score is any callable; a partial or an instance has no __name__.
    return getattr(score, "__name__", type(score).__name__)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The sparse layers' weights, taking gradients, in a model in search mode; undone on leaving."""
    weights = {name: layer.raw_weight for name, layer in require_dense_parameters(model).items()}
    required = [w.requires_grad for w in weights.values()]
    with batch_statistics(model):
        try:
            for w in weights.values():
                w.requires_grad_()
            yield weights
        finally:
            for w, flag in zip(weights.values(), required, strict=True):
                w.requires_grad_(flag)


def _gradient(
    value: Tensor, weights: Mapping[str, Tensor], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """d value / d weights, 0 for a weight that takes no part."""
    return torch.autograd.grad(
        value, list(weights.values()), create_graph=create_graph, materialize_grads=True
    )


def _add_(total: list[Tensor], values: Iterable[Tensor]) -> None:
    for t, v in zip(total, values, strict=True):
        t += v


def _first(batches: Iterable[Batch]) -> Batch:
    for batch in batches:
        return batch
    raise ValueError("scores: expected at least one batch, got none")


def _few_of_each_class(
    model: nn.Module, batches: Iterable[Batch], count: int, seed: int
) -> list[Batch]:
    """`count` samples of every class, fewer where there are fewer, in even parts no larger than a batch."""
    generator = torch.Generator().manual_seed(seed)
    taken, size = torch.empty(0, dtype=torch.int64), 1
    found: list[Batch] = []
    for x, y in batches:
        if not found:
            with torch.no_grad():
                taken, size = torch.zeros(model(x).shape[-1], dtype=torch.int64), len(y)
        order = torch.randperm(len(y), generator=generator)
        labels = y.cpu()[order]
        classes = F.one_hot(labels, len(taken))
        place = (taken + classes.cumsum(0)).gather(1, labels[:, None]).squeeze(1)  # from 1
        chosen = order[place <= count].to(y.device)
        found.append((x[chosen], y[chosen]))
        taken += classes.sum(0)
        if bool((taken >= count).all()):
            break
    if not found:
        raise ValueError("grasp: expected at least one batch, got none")
    x, y = (torch.cat(values) for values in zip(*found, strict=True))
    parts = -(-len(y) // size)
    return list(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))


def _positive(model: nn.Module) -> nn.Module:
    """A copy in float64 with |theta| that passes ones on with mean 1, positive and, under ReLU, linear.

    No biases, no dropout; `synflow` says why and what becomes of normalisation.
    """
    net = copy.deepcopy(model).double().eval().requires_grad_(False)
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
