"""From a sparsity to exact counts and exact masks, over all layers or by layer."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .granularity import NM, Granularity, Weight
from .kinds import checked

# From the layers' shapes and the density of all, the density of each.
Distribution = Callable[[Mapping[str, torch.Size], float], dict[str, float]]


@checked
def check_sparsity(sparsity: float) -> float:
    """Returns `sparsity` unchanged; ValueError unless it is a number in [0, 1)."""
    if not 0 <= sparsity < 1:  # False for NaN too
        raise ValueError(
            f"sparsity is the fraction removed: expected 0 <= sparsity < 1, got {sparsity}"
        )
    return sparsity


@checked
def kept_count(total: int, sparsity: float) -> int:
    """k = floor((1 - sparsity) * total), immune to binary rounding: (10, 0.9) keeps 1, not 0."""
    return math.floor((1 - check_sparsity(sparsity)) * total + 1e-6)


@checked
def top_k(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of exactly the k largest scores; among equals the lower index wins.

    Args: scores: float, any shape. Errors: ValueError if k is out of range or a score is NaN.
    """
    flat = scores.flatten()
    if not 0 <= k <= flat.numel():
        raise ValueError(f"k: expected 0 to {flat.numel()} (the number of scores), got {k}")
    if torch.isnan(flat).any():
        raise ValueError("scores hold NaN: expected finite numbers; check the data and the weights")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = torch.topk(flat, k, sorted=False).values.min()
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: k - int(mask.sum())]] = True
    return mask.view_as(scores)


@checked
def uniform_densities(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """The same share of weights kept in every layer."""
    return dict.fromkeys(shapes, _check_density(density))


@checked
def erk_densities(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: shares proportional to sum(shape) / prod(shape), at most 1 (Evci et al. 2020).

    For linear layers this is Erdos-Renyi, (n_in + n_out) / (n_in * n_out) (Mocanu et al. 2018).  Layers
    whose share exceeds 1 are dense, and the others share what is left, over again.
    """
    total = sum(shape.numel() for shape in shapes.values())
    left, rest, scale = _check_density(density) * total, dict(shapes), 0.0
    while rest:
        # A share of scale * sum(shape) / prod(shape) is scale * sum(shape) weights.
        scale = left / sum(sum(shape) for shape in rest.values())
        over = [name for name, shape in rest.items() if scale * sum(shape) > shape.numel()]
        if not over:
            break
        left -= sum(rest.pop(name).numel() for name in over)
    return {
        name: scale * sum(shape) / shape.numel() if name in rest else 1.0
        for name, shape in shapes.items()
    }


DISTRIBUTIONS: dict[str, Distribution | None] = {
    "global": None,
    "uniform": uniform_densities,
    "erk": erk_densities,
}


@checked
def by_layer(
    distribution: Distribution | None,
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    granularity: Granularity,
) -> dict[str, float] | None:
    """Share of weights to keep in each layer; None where all are ranked together.

    What N:M can hold counts as the whole of a layer: none is asked for more.
    """
    density = 1 - check_sparsity(sparsity)
    if distribution is None:
        return None
    whole = granularity.n / granularity.m if isinstance(granularity, NM) else 1.0
    if density > whole:  # impossible, which `check_possible` tells
        whole = 1.0
    return {name: whole * p for name, p in distribution(shapes, density / whole).items()}


@checked
def layer_counts(
    shapes: Mapping[str, torch.Size], sparsity: float, densities: Mapping[str, float]
) -> dict[str, int]:
    """Weights to keep by layer: kept_count(d) in total, split by largest remainder (ties: earlier layer).

    Errors: ValueError for densities of other layers, outside [0, 1], or of another total than the sparsity's.
    """
    if set(shapes) != set(densities) or not all(0 <= p <= 1 for p in densities.values()):
        raise ValueError(
            f"densities: expected one in [0, 1] for each of {', '.join(shapes)}, got {dict(densities)}"
        )
    quotas = {name: densities[name] * shape.numel() for name, shape in shapes.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    k = kept_count(sum(shape.numel() for shape in shapes.values()), sparsity)
    missing = k - sum(counts.values())
    partial = [name for name, shape in shapes.items() if counts[name] < shape.numel()]
    if not 0 <= missing <= len(partial):
        raise ValueError(
            f"densities: expected {k} weights kept in all (sparsity {sparsity}), got {sum(quotas.values()):.1f}"
        )
    for name in sorted(partial, key=lambda name: counts[name] - quotas[name])[:missing]:
        counts[name] += 1
    return counts


def _check_density(density: float) -> float:
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction kept: expected 0 < density <= 1, got {density}")
    return density


class _Units(NamedTuple):
    """What competes for a place, flat."""

    scores: Tensor  # float32 [units], -inf where the pattern forbids one
    sizes: Tensor  # int64 [units], weights in each
    possible: Tensor  # bool [units]


@checked
def masks_from_scores(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    granularity: Granularity | None = None,
    densities: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Exact top-k over all layers, or within each: weight-shaped boolean masks.

    Keeps the best-scoring units (ties: earlier layer, lower index) while they hold at most k weights:
    exactly k for single weights, at most one unit fewer otherwise.

    Args:
        scores: one score per unit, shaped `granularity.units(shapes[name])`.
        granularity: what one score covers; N:M first drops all but the N best of each group.
        densities: None ranks all layers together, k = kept_count(d); else every layer is ranked by itself,
            with its k from `layer_counts`.

    Errors: ValueError for NaN scores, a wrong shape, an N:M pattern that cannot hold k weights, or as
    `layer_counts`.
    """
    granularity = granularity or Weight()
    shapes = {name: shapes[name] for name in scores}
    if densities is None:
        k = kept_count(sum(shape.numel() for shape in shapes.values()), sparsity)
        contests = [(list(scores), k)]
    else:
        counts = layer_counts(shapes, sparsity, densities)
        contests = [([name], k) for name, k in counts.items()]
    masks = {}
    for names, k in contests:
        layers = [_units(name, scores[name], shapes[name], granularity) for name in names]
        units = _Units(*(torch.cat(parts) for parts in zip(*layers, strict=True)))
        chosen = _best(units, k, granularity, "" if densities is None else f" of {names[0]}")
        parts = chosen.split([scores[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            masks[name] = granularity.spread(part.view(scores[name].shape), shapes[name])
    return masks


@checked
def check_possible(
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    granularity: Granularity,
    densities: Mapping[str, float] | None = None,
) -> None:
    """The errors that `masks_from_scores` has for any scores, before there are any."""
    level = {
        name: torch.zeros(granularity.units(shape), dtype=torch.float32)
        for name, shape in shapes.items()
    }
    masks_from_scores(level, shapes, sparsity, granularity, densities)


@checked
def check_extent(shapes: Mapping[str, torch.Size], granularity: Granularity) -> None:
    """Errors: ValueError for units that are larger than every layer, in one direction: no choice is left there."""
    height = max(shape[0] for shape in shapes.values())
    width = max(shape[1] if len(shape) > 1 else 1 for shape in shapes.values())
    unit = granularity.unit
    if unit.h > height or unit.w > width:
        raise ValueError(
            f"granularity: expected units within the layers, the largest of which have {height} rows and {width} "
            f"columns, got {granularity}; take a smaller one"
        )


def _units(name: str, score: Tensor, shape: torch.Size, granularity: Granularity) -> _Units:
    expected = granularity.units(shape)
    if tuple(score.shape) != tuple(expected):
        raise ValueError(
            f"scores of {name}: expected shape {tuple(expected)}, got {tuple(score.shape)}"
        )
    allowed = granularity.allowed(score)
    return _Units(
        torch.where(allowed, score.float(), -math.inf).flatten(),
        granularity.sizes(shape).flatten().to(score.device),
        allowed.flatten(),
    )


def _best(units: _Units, k: int, granularity: Granularity, of: str = "") -> Tensor:
    """Boolean [units]: the best-scoring ones that hold at most k weights together."""
    most = int((units.sizes * units.possible).sum())
    if most < k:
        raise ValueError(
            f"{granularity} allows at most {most} of {int(units.sizes.sum())} weights{of}, expected to "
            f"keep {k}: ask for a higher sparsity"
        )
    if bool((units.sizes == 1).all()):
        return top_k(units.scores, k)
    top_k(units.scores, 0)  # for its NaN check
    order = torch.sort(units.scores, descending=True, stable=True).indices
    fits = units.sizes[order].cumsum(0) <= k
    chosen = torch.zeros_like(units.possible)
    chosen[order[fits]] = True
    return chosen
