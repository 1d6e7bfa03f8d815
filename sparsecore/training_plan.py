"""The plan by which a ticket's model trains: without its dead units, in the formats that measure fastest."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .compaction import Compacted, compact
from .data import Batches, Dataset
from .plans import plan_
from .recipe import Recipe
from .telling import SparsityWarning


@dataclass(frozen=True)
class PlannedModel:
    """A ticket's model as it trains: the full one, or a smaller one without its dead units."""

    full: nn.Module
    small: Compacted | None
    told: str  # what became of dead units

    @property
    def model(self) -> nn.Module:
        return self.full if self.small is None else self.small.model

    def restored(self) -> nn.Module:
        """The full model with what has been trained."""
        return self.full if self.small is None else self.small.restore_(self.full)


def plan_for(
    model: nn.Module,
    plan: str,
    dataset: Dataset,
    recipe: Recipe,
    cache: Path | None = None,
    engine: str = "auto",
) -> PlannedModel:
    """Plans a masked model for a recipe's batch, precision and engine on its device; "auto" drops dead units first."""
    device = next(model.parameters()).device
    x = next(iter(Batches(dataset, "train", recipe.batch, device=device)))[0]
    x = x.chunk(recipe.accumulate)[0]
    small, told = None, "dead units stay under a named plan"
    if plan == "auto":
        small, told = _compacted(model, x, recipe)
    planned = PlannedModel(model, small, told)
    # Steps become graphs there unless that was refused.
    captured = device.type == "cuda" and engine in ("auto", "graph", "compile-graph")
    example = [x] if plan == "auto" else []
    with recipe.autocast(device), warnings.catch_warnings():
        # Rules that go by shapes are those of loops of one's own.
        warnings.filterwarnings("ignore", "plan_: a planned layer's parameter", SparsityWarning)
        try:
            plan_(planned.model, plan, *example, cache=cache, captured=captured)
        except RuntimeError:  # what no graph can hold is launched one by one
            if not captured:
                raise
            plan_(planned.model, plan, *example, cache=cache)
    return planned


def _compacted(model: nn.Module, x: torch.Tensor, recipe: Recipe) -> tuple[Compacted | None, str]:
    """The model without dead units, if there are any and it may train so, and what to say about it."""
    if recipe.optimizer == "adam" and recipe.weight_decay:
        return None, "dead units stay: Adam's coupled weight decay can bring one back to life"
    try:
        small = compact(model, x[:2])
    except ValueError as error:  # a model that cannot be traced trains all the same
        return None, f"dead units stay: {error}"
    return (small if small.removed else None), small.table()
