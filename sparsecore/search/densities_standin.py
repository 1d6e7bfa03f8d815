"""STAND-IN: delete this file once `sparsecore.sparsities` has all of it, and import DISTRIBUTIONS from there."""

import math
from collections.abc import Mapping

import torch


def uniform_densities(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """The same density everywhere."""
    return dict.fromkeys(shapes, density)


def erk_densities(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """Proportional to sum(shape) / prod(shape), layers above 1 made dense in turn."""
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        rest = density * sum(sizes.values()) - sum(sizes[n] for n in full)
        share = {n: p for n, p in raw.items() if n not in full}
        scale = rest / sum(p * sizes[n] for n, p in share.items()) if share else 0.0
        over = {n for n, p in share.items() if scale * p > 1}
        if not over:
            return {n: 1.0 if n in full else scale * raw[n] for n in shapes}
        full |= over


DISTRIBUTIONS = {"global": None, "uniform": uniform_densities, "erk": erk_densities}
