"""Dynamic sparse training: masks move while the weights train, and the ticket is a finished network."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import kernels
from ..batches import Batch, cut
from ..convert import batch_statistics, sparse_layers
from ..granularity import NM, Granularity, Weight
from ..interrupts import signals_later
from ..losses import Loss
from ..patterns import Dense
from ..recipe import Recipe
from ..sparsities import DISTRIBUTIONS, by_layer, masks_from_scores, top_k
from .sparse_training import AbstractSparseTraining, Due, Masks, Shapes, masks_of


@dataclass(frozen=True)
class AbstractRegrowth(AbstractSparseTraining):
    """Masks that start at random and whose layers keep their number of weights: the weakest of each make place
    for others.

    What grows is chosen among all that did not stay, so a dropped unit may come back in the same update.  It
    has not left then, and keeps its values.  What is new starts at 0, without a past in the optimiser.  Under
    N:M only a group with a free place can grow.  Units of unequal sizes (at edges) may leave a layer up to one
    unit short.

    Args:
        distribution: of the first masks' weights over layers: "erk", "uniform" or "global".
    """

    distribution: str = "erk"

    def _checks(self) -> dict[str, tuple[bool, str]]:
        known = self.distribution in DISTRIBUTIONS
        return super()._checks() | {"distribution": (known, f"one of {', '.join(DISTRIBUTIONS)}")}

    @abstractmethod
    def growth(self, due: Due) -> dict[str, Tensor]:
        """A score for every unit: the highest grow."""

    def start(self, shapes: Shapes, sparsity: float) -> Masks:
        masks = random_masks(shapes, sparsity, self.distribution, self.granularity, self.seed)
        empty = [name for name, mask in masks.items() if not mask.any()]
        if empty:
            raise ValueError(
                f"{self.name}: expected weights in every layer, since each keeps its number, got none at "
                f"sparsity {sparsity} in {', '.join(empty[:4])}: ask for a lower sparsity, another "
                "distribution or smaller units"
            )
        return masks

    def update(self, due: Due) -> Masks:
        model, scores = due.step.model, self.growth(due)
        weights = _weights(model)
        return {
            name: exchanged(
                mask, weights[name], scores[name], due.amount, due.counts[name], self.granularity
            )
            for name, mask in masks_of(model).items()
        }


@dataclass(frozen=True)
class SET(AbstractRegrowth):
    """Sparse evolutionary training (Mocanu et al. 2018): in every epoch the smallest |theta| make place for as
    many at random.

    Updates come after the first step of every epoch but the first, so that what is measured at the end of an
    epoch has trained since.  New weights start at 0; positive and negative ones are ranked together.

    Args:
        zeta: fraction of each layer's units that an update drops.
    """

    zeta: float = 0.3

    def _checks(self) -> dict[str, tuple[bool, str]]:
        return super()._checks() | {"zeta": (0 < self.zeta < 1, "0 < zeta < 1")}

    @property
    def name(self) -> str:
        return "set"

    def schedule(self, steps: int, length: int) -> dict[int, float]:
        return dict.fromkeys(range(length + 1, steps, length), self.zeta)

    def growth(self, due: Due) -> dict[str, Tensor]:
        weights = _weights(due.step.model)
        shapes = {name: weight.shape for name, weight in weights.items()}
        noise = _noise(shapes, self.granularity, self.seed, due.taken)
        return {name: u.to(weights[name].device) for name, u in noise.items()}


@dataclass(frozen=True)
class RigL(AbstractRegrowth):
    """The rigged lottery (Evci et al. 2020, algorithm 1): the smallest |theta| make place for the largest
    |dense gradient|.

    After every `interval` steps t, while t < T_end = stop * steps, the fraction
    drop/2 * (1 + cos(pi t / T_end)) of each layer's units is exchanged.  The paper's update takes a step's
    place; this one follows it, on its batch.

    Args:
        drop: fraction of the first updates (the paper's alpha).
        interval: steps between updates (Delta T).
        stop: fraction of the run after which masks stay as they are.
    """

    drop: float = 0.3
    interval: int = 100
    stop: float = 0.75

    def _checks(self) -> dict[str, tuple[bool, str]]:
        return super()._checks() | {
            "drop": (0 < self.drop < 1, "0 < drop < 1"),
            "interval": (self.interval >= 1, "at least 1"),
            "stop": (0 < self.stop <= 1, "0 < stop <= 1"),
        }

    @property
    def name(self) -> str:
        return "rigl"

    def schedule(self, steps: int, length: int) -> dict[int, float]:
        end = self.stop * steps
        times = range(self.interval, math.ceil(end), self.interval)
        return {t: self.drop / 2 * (1 + math.cos(math.pi * t / end)) for t in times}

    def growth(self, due: Due) -> dict[str, Tensor]:
        grads = dense_gradients(due.step.model, due.step.batch, self.recipe, due.loss)
        return {name: self.granularity.mean(grad.abs()) for name, grad in grads.items()}


@dataclass(frozen=True)
class GradualMagnitude(AbstractSparseTraining):
    """Gradual pruning (Zhu & Gupta 2017): trains once while the smallest |theta| of the whole model go.

    After t steps of T the sparsity is s * (1 - (1 - (t/T - begin) / (end - begin))^3), their equation 1 from
    an initial sparsity of 0.  What is pruned stays so.  Under N:M the N largest of every group go last.

    Args:
        begin, end: fractions of the run between which masks tighten.
        updates: how often they do, at even distances; a short run has fewer.
        rewind: whether the ticket is to be trained, from the model's present weights; otherwise it is
            finished and holds the trained ones.
    """

    begin: float = 0.0
    end: float = 0.75
    updates: int = 50
    rewind: bool = False

    def _checks(self) -> dict[str, tuple[bool, str]]:
        return super()._checks() | {
            "begin": (0 <= self.begin < self.end, "0 <= begin < end"),
            "end": (self.end <= 1, "at most 1"),
            "updates": (self.updates >= 1, "at least 1"),
        }

    @property
    def name(self) -> str:
        return "gradual"

    @property
    def finished(self) -> bool:
        return not self.rewind

    def schedule(self, steps: int, length: int) -> dict[int, float]:
        """Shares of the sparsity asked for."""
        begin, end = round(self.begin * steps), max(round(self.end * steps), 1)
        span = end - begin
        times = (begin + round(i * span / self.updates) for i in range(1, self.updates))
        return {t: 1 - (1 - (t - begin) / span) ** 3 for t in times if t > begin} | {end: 1.0}

    def start(self, shapes: Shapes, sparsity: float) -> Masks:
        return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}

    def update(self, due: Due) -> Masks:
        before, scores, shapes = masks_of(due.step.model), {}, {}
        for name, weight in _weights(due.step.model).items():
            kept = _units(before[name], self.granularity)
            size = self.granularity.mean(weight.abs()).where(kept, -math.inf)
            # -1/x keeps the order, and the precision, of those that N:M is going to forbid.
            spare = -1 / size.clamp_min(torch.finfo(size.dtype).tiny)
            score = torch.where(self.granularity.allowed(size), size, spare)
            scores[name] = score.where(kept, -math.inf)
            shapes[name] = weight.shape
        # Those scores rank N:M by themselves, also while the masks hold more than it allows.
        granularity = Weight() if isinstance(self.granularity, NM) else self.granularity
        masks = masks_from_scores(scores, shapes, due.amount * due.sparsity, granularity)
        # Where units differ in size, a small one that is gone could fill a gap.
        return {name: mask & before[name] for name, mask in masks.items()}


def exchanged(
    mask: Tensor,
    weight: Tensor,
    growth: Tensor,
    drop: float,
    count: int,
    granularity: Granularity | None = None,
) -> Tensor:
    """A layer's mask after an update: the units of smallest mean |weight| make place for the best of `growth`.

    Args:
        mask: bool, weight's shape, whose floor(drop * units) weakest units go.
        growth: one score per unit, the highest grow.
        count: weights that the result holds, at most one unit fewer.

    Errors: ValueError for NaN.
    """
    granularity = granularity or Weight()
    kept = _units(mask, granularity)
    number = int(kept.sum())
    stay = number - math.floor(drop * number + 1e-6)
    strong = top_k(granularity.mean(weight.abs()).where(kept, -math.inf), stay)
    scores = growth.float().where(~strong, math.inf)
    return _best(scores, mask.shape, count, granularity)


def dense_gradients(
    model: nn.Module, batch: Batch, recipe: Recipe, loss: Loss | None = None
) -> dict[str, Tensor]:
    """Gradient of the loss in every weight of the masked layers, pruned ones at their value 0 included.

    In float32, with BatchNorm on the batch's own statistics and without dropout: modes, buffers, random state
    and `.grad` are not touched.
    """
    layers = sparse_layers(model)
    patterns = {name: layer.pattern for name, layer in layers.items()}
    weights = [layer.raw_weight for layer in layers.values()]
    total = [torch.zeros_like(w) for w in weights]
    by = (loss or Loss()).smoothed(recipe.label_smoothing)
    with batch_statistics(model):
        try:
            for layer in layers.values():
                layer.pattern = Dense()
            for part in cut(batch, recipe.accumulate):
                value = by.weighed(by(model, part), part, batch)
                # A layer the forward does not reach has no gradient: zeros.
                grads = torch.autograd.grad(
                    value, weights, allow_unused=True, materialize_grads=True
                )
                torch._foreach_add_(total, grads)
        finally:
            with signals_later():
                for name, layer in layers.items():
                    layer.pattern = patterns[name]
    return dict(zip(layers, total, strict=True))


def random_masks(
    shapes: Shapes,
    sparsity: float,
    distribution: str = "erk",
    granularity: Granularity | None = None,
    seed: int = 0,
) -> Masks:
    """Random masks that hold kept_count(d, sparsity) weights together, at most one unit fewer in each layer.

    Args: distribution: of weights over layers, one of DISTRIBUTIONS.
    """
    granularity = granularity or Weight()
    noise = _noise(shapes, granularity, seed, 0)
    densities = by_layer(DISTRIBUTIONS[distribution], shapes, sparsity, granularity)
    return masks_from_scores(noise, shapes, sparsity, granularity, densities)


def _best(scores: Tensor, shape: torch.Size, count: int, granularity: Granularity) -> Tensor:
    """A layer's mask: its best-scored units that hold at most `count` weights."""
    if count == 0:
        return torch.zeros(shape, dtype=torch.bool, device=scores.device)
    sparsity = 1 - count / shape.numel()
    return masks_from_scores({"": scores}, {"": shape}, sparsity, granularity)[""]


def _noise(shapes: Shapes, granularity: Granularity, seed: int, step: int) -> dict[str, Tensor]:
    """A uniform number for every unit, drawn on the CPU: the same on every device."""
    address = torch.tensor([seed]), torch.tensor([step])
    return {
        name: kernels.uniform_(
            torch.empty(granularity.units(shape), dtype=torch.float32), *address, layer
        )
        for layer, (name, shape) in enumerate(shapes.items())
    }


def _units(mask: Tensor, granularity: Granularity) -> Tensor:
    """The units that a mask keeps."""
    return granularity.gather(mask.long()) > 0


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The raw weights by layer."""
    return {name: layer.raw_weight.detach() for name, layer in sparse_layers(model).items()}
