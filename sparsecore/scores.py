"""Scores: rank every weight once, keep the best.

`Score = (model, batches, seed) -> {layer: [weight's shape]}`: the larger, the better worth keeping.  Only
the weights of sparse layers are scored; biases and normalisation are never pruned.  `batches` is read
once.  The model is left as it was.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .batches import (
    Batch,
    joined,
    of_samples,
    on,
    parts_of,
    require_samples,
    size_of,
)
from .calls import forward
from .convert import batch_statistics, require_dense_parameters, sparse_layers
from .flow import flow_of, positive, refuse_embeddings
from .losses import Loss, LossLike, loss_of
from .outputs import is_labels, own_loss
from .process import Shared
from .telling import note_gradients

Score = Callable[..., dict[str, Tensor]]  # of (model, batches, seed), and loss= if it has one

_UNLABELLED = "{}: expected samples whose label is not left out, got none; look at the targets"

# The one kernel of attention that can be differentiated twice, which is chosen for the whole process.
_plain_attention = Shared(lambda: sdpa_kernel(SDPBackend.MATH))


def random(
    model: nn.Module, batches: Iterable[Batch], seed: int, *, loss: LossLike = None
) -> dict[str, Tensor]:
    """Uniform noise: the floor that any method has to beat.  loss: not looked at."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {"generator": generator, "dtype": torch.float32}  # whatever the default is
    return {
        name: torch.rand(layer.raw_weight.shape, **drawn).to(layer.raw_weight.device)
        for name, layer in require_dense_parameters(model).items()
    }


def magnitude(
    model: nn.Module, batches: Iterable[Batch], seed: int, *, loss: LossLike = None
) -> dict[str, Tensor]:
    """|theta|.  loss: not looked at."""
    layers = require_dense_parameters(model)
    return {name: layer.raw_weight.detach().abs() for name, layer in layers.items()}


def snip(
    model: nn.Module, batches: Iterable[Batch], seed: int, *, loss: LossLike = None
) -> dict[str, Tensor]:
    """|dL/dtheta * theta| of the loss over one pass of `batches` (Lee, Ajanthan & Torr 2019).

    Every sample counts the same, also those of a smaller last batch; the scale is that of a sum of means over
    batches as large as the first.  More data than the paper's single batch only makes this baseline stronger.

    Errors: ValueError without a batch, for one without samples, or where all labels are left out.
    """
    with _differentiable(model) as weights:
        total = [torch.zeros_like(w) for w in weights.values()]
        size, counted = 0, 0
        by = loss_of(loss)
        for batch in _read(batches, model):
            size = size or size_of(batch)
            value = by(model, batch) * (size_of(batch) / size)
            if own := by.counted(batch):
                counted = counted + own
                _add_(total, _gradient(value, weights))
    if not size:
        raise ValueError("snip: expected at least one batch, got none")
    if not counted:
        raise ValueError(_UNLABELLED.format("snip"))
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
    loss: LossLike = None,
) -> dict[str, Tensor]:
    """theta * Hg, signed: what a weight contributes to the gradient's flow (Wang, Zhang & Grosse 2020, eq. 8).

    The paper removes the highest of -theta * Hg, which are the lowest of these.  g and H are of the
    cross-entropy of logits / `temperature` over `per_class` samples of every class, drawn by `seed` out
    of the first batches that have them.  No more than a batch is differentiated at a time.  Where a sample has many
    labels (pixels, tokens), or the loss is another (which no temperature flattens), it is of the first batch.

    Errors: ValueError if there is no batch, or no sample whose label counts; RuntimeError from PyTorch for an operation
    without a second derivative (hardsigmoid).
    """
    with _differentiable(model) as weights, _plain_attention():
        _require_real("grasp", weights)
        by = loss_of(loss)
        parts = _few_samples(model, _read(batches, model), per_class, seed, by)
        count = sum(size_of(part) for part in parts)

        def cooled(batch: Batch) -> Tensor:
            if not by.is_cross_entropy:
                return by(model, batch)
            inputs, target = parts_of(batch)
            output = forward(model, inputs)
            if own_loss(output) is not None:
                return by.of(output, batch)
            by.of(output, batch)  # refuses what has no such loss
            scores, labels = by.classified(output, target)
            if labels.ndim == 1:
                return F.cross_entropy(scores / temperature, labels, reduction="sum") / count
            return F.cross_entropy(scores / temperature, labels)

        g = [torch.zeros_like(w) for w in weights.values()]
        for part in parts:
            _add_(g, _gradient(cooled(part), weights))
        product = [torch.zeros_like(w) for w in weights.values()]
        for part in parts:  # H is the sum over the parts: g has to be whole before
            own = _gradient(cooled(part), weights, create_graph=True)
            along = torch.stack([(a * b).sum() for a, b in zip(own, g, strict=True)]).sum()
            _add_(product, _gradient(along, weights))
    return {name: w.detach() * hg for (name, w), hg in zip(weights.items(), product, strict=True)}


def synflow(
    model: nn.Module, batches: Iterable[Batch], seed: int, *, loss: LossLike = None
) -> dict[str, Tensor]:
    """|dR/dtheta * theta| / R, R the summed outputs of the |theta| network for ones (Tanaka et al. 2020, eq. 3).

    In a ReLU network the scores into a hidden unit add up to those out of it and, divided by R, to 1 in
    a layer that all signals pass.  Computed in float64 on a copy; of `batches` only a sample's shape is
    used; embeddings of tokens give ones.  loss: not looked at but for its `scores`.
    Prune by it in rounds (`search.Iterative`): at once, it cuts off whole layers.

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

    Errors: ValueError if there is no batch, for a sparse embedding by itself, if R overflows, or if a layer whose
    weights are all 0 (the head of torchvision's ViT at first) lets nothing pass.
    """
    layers = require_dense_parameters(model)
    _require_real("synflow", {name: layer.raw_weight for name, layer in layers.items()})
    refuse_embeddings(model, layers)
    inputs = parts_of(_first(_read(batches, model)))[0]
    net = positive(model)
    weights = {
        name: layer.raw_weight.requires_grad_() for name, layer in sparse_layers(net).items()
    }
    flow = flow_of(net, inputs, loss_of(loss))
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


def scored(
    score: Score, model: nn.Module, batches: Iterable[Batch], seed: int, loss: Loss
) -> dict[str, Tensor]:
    """A score under a loss.

    Errors: ValueError for a score of the user's own that takes none, where one is asked for.
    """
    if not loss.facts:
        return score(model, batches, seed)
    taken = inspect.signature(score).parameters
    if "loss" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ValueError(
            f"loss: expected a score that takes loss=, got {score_name(score)}; give its function that keyword"
        )
    return score(model, batches, seed, loss=loss)  # type: ignore[call-arg]


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
    """d value / d weights, 0 for a weight that takes no part, which is noted.

    Errors: ValueError for a value whose gradients say nothing.
    """
    if not value.isfinite():
        raise ValueError(
            f"the loss is {value.item()}: expected finite numbers; check the data and the weights"
        )
    found = torch.autograd.grad(
        value, list(weights.values()), create_graph=create_graph, allow_unused=True
    )
    note_gradients({name: g is not None for name, g in zip(weights, found, strict=True)})
    return tuple(
        torch.zeros_like(w) if g is None else g
        for w, g in zip(weights.values(), found, strict=True)
    )


def _add_(total: list[Tensor], values: Iterable[Tensor]) -> None:
    for t, v in zip(total, values, strict=True):
        t += v


def _read(batches: Iterable[Batch], model: nn.Module) -> Iterator[Batch]:
    """Batches on the model's device.  Errors: ValueError for one without samples."""
    device = next(model.parameters()).device
    for batch in batches:
        require_samples(batch)
        yield on(device, batch)


def _require_real(score: str, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_complex():
            raise ValueError(
                f"{score}: expected real weights, got complex ones in {name}; leave it dense: "
                f"sparsify_(model, '!{name}')"
            )


def _first(batches: Iterable[Batch]) -> Batch:
    for batch in batches:
        return batch
    raise ValueError("scores: expected at least one batch, got none")


def _few_samples(
    model: nn.Module, batches: Iterator[Batch], count: int, seed: int, loss: Loss
) -> list[Batch]:
    """`count` samples of every class, fewer where there are fewer, in even parts no larger than a batch.

    The first batch where its samples have no single class each.
    """
    first = next(batches, None)
    if first is None:
        raise ValueError("grasp: expected at least one batch, got none")
    target = parts_of(first)[1]
    if not (loss.is_cross_entropy and is_labels(target) and target.ndim == 1):
        return [first]
    generator = torch.Generator().manual_seed(seed)
    taken, size = torch.empty(0, dtype=torch.int64), 1
    found: list[Batch] = []
    for batch in chain([first], batches):
        x, y = parts_of(batch)
        if not found:
            with torch.no_grad():
                output = forward(model, x)
                if own_loss(output) is None:
                    loss.of(output, batch)  # refuses what does not fit
                classes = loss.class_scores(output, y).shape[1]
            taken, size = torch.zeros(classes, dtype=torch.int64), len(y)
        order = torch.randperm(len(y), generator=generator)
        order = order[(y.cpu() != -100)[order]] if bool((y == -100).any()) else order
        labels = y.cpu()[order].long()
        classes = F.one_hot(labels, len(taken))
        place = (taken + classes.cumsum(0)).gather(1, labels[:, None]).squeeze(1)  # from 1
        chosen = order[place <= count].to(y.device)
        found.append(of_samples(batch, chosen))
        taken += classes.sum(0)
        if bool((taken >= count).all()):
            break
    whole = joined(found)
    if not size_of(whole):
        raise ValueError(_UNLABELLED.format("grasp"))
    parts = -(-size_of(whole) // size)
    rows = torch.arange(size_of(whole), device=parts_of(whole)[1].device).tensor_split(parts)
    return [of_samples(whole, slice(int(r[0]), int(r[-1]) + 1)) for r in rows]
