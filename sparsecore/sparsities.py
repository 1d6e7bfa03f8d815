"""From a sparsity to exact counts and exact masks."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .granularity import Granularity, Weight


def check_sparsity(sparsity: float) -> float:
    """Returns `sparsity` unchanged; ValueError unless it is a number in [0, 1)."""
    if not 0 <= sparsity < 1:  # False for NaN too
        raise ValueError(
            f"sparsity is the fraction removed: expected 0 <= sparsity < 1, got {sparsity}"
        )
    return sparsity


def kept_count(total: int, sparsity: float) -> int:
    """k = floor((1 - sparsity) * total), immune to binary rounding: (10, 0.9) keeps 1, not 0."""
    return math.floor((1 - check_sparsity(sparsity)) * total + 1e-6)


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


def masks_from_scores(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    granularity: Granularity | None = None,
) -> dict[str, Tensor]:
    """Global, exact top-k over all layers: weight-shaped boolean masks.

    Keeps the best-scoring units (ties: earlier layer, lower index) while they hold at most
    k = kept_count(d) weights: exactly k for single weights, at most one unit fewer otherwise.

    Args:
        scores: one score per unit, shaped `granularity.units(shapes[name])`.
        granularity: what one score covers; N:M first drops all but the N best of each group.

    Errors: ValueError for NaN scores, a wrong shape, or an N:M pattern that cannot hold k weights.
    """
    granularity = granularity or Weight()
    for name, score in scores.items():
        expected = granularity.units(shapes[name])
        if tuple(score.shape) != tuple(expected):
            raise ValueError(
                f"scores of {name}: expected shape {tuple(expected)}, got {tuple(score.shape)}"
            )
    total = sum(shapes[name].numel() for name in scores)
    k = kept_count(total, sparsity)
    allowed = {name: granularity.allowed(score) for name, score in scores.items()}
    flat = torch.cat(
        [
            torch.where(allowed[name], score.float(), -math.inf).flatten()
            for name, score in scores.items()
        ]
    )
    possible = torch.cat([a.flatten() for a in allowed.values()])
    sizes = torch.cat([granularity.sizes(shapes[name]).flatten() for name in scores]).to(
        flat.device
    )
    if int((sizes * possible).sum()) < k:
        raise ValueError(
            f"{granularity} allows at most {int((sizes * possible).sum())} of {total} weights, "
            f"sparsity {sparsity} keeps {k}: ask for a higher sparsity"
        )
    if bool((sizes == 1).all()):
        chosen = top_k(flat, k)
    else:
        top_k(flat, 0)  # for its NaN check
        order = torch.sort(flat, descending=True, stable=True).indices
        fits = sizes[order].cumsum(0) <= k
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[order[fits]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {
        name: granularity.spread(part.view(score.shape), shapes[name])
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }
