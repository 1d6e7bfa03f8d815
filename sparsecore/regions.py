"""Whether rounds of pruning stay in one region of the loss: angles, barriers, and a force that drives them apart.

Maene, Li & Moens 2021 (arXiv 2106.06955).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .connectivity import LinearPath, State, path_errors
from .convert import densify_, require_sparse_layers
from .copies import copied
from .kinds import checked
from .layer import SparseLayer, weight_key
from .losses import LossLike
from .patterns import Masked, Planned
from .progress import QUIET, Progress


class Solution(Protocol):
    """What a round of pruning and training gave, such as `rounds.Round`."""

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """bool by sparse layer."""
        ...

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The dense state_dict after training."""
        ...


@checked
def angular_distances(rounds: Sequence[Solution]) -> Float[Tensor, "R R"]:
    """(2 / pi) times the angle between each two rounds' weights, where the masks of both keep them.

    float64: 0 the same direction, 1 orthogonal, 2 opposite; NaN for two rounds that share no weight.

    Errors: ValueError for no rounds, or rounds of different networks.
    """
    _check_rounds(rounds, least=1)
    products = torch.zeros(len(rounds), len(rounds), dtype=torch.float64)
    squares = torch.zeros_like(products)  # [i, j]: of round i's weights, where round j keeps them
    for name in rounds[0].masks:
        masks = torch.stack([r.masks[name].cpu().reshape(-1) for r in rounds]).double()  # [R, n]
        trained = [r.trained[weight_key(name, r.trained)].cpu().reshape(-1) for r in rounds]
        weights = torch.stack(trained).double()
        weights *= masks
        products += weights @ weights.T
        squares += weights.square() @ masks.T
    cosines = products / (squares * squares.T).sqrt()
    return cosines.clamp(-1, 1).acos().mul(2 / math.pi).fill_diagonal_(0)  # acos rounds to 1e-8


@checked
def round_paths(
    model: nn.Module,
    rounds: Sequence[Solution],
    batches: Any,
    *,
    loss: LossLike = None,
    points: int = 20,
    train_batches: Any = None,
    limit: int = 20,
    folder: Path | None = None,
    progress: Progress = QUIET,
) -> list[LinearPath]:
    """The paths from each round to the next; `barrier` gives their heights.

    Each end is under its own mask, so a weight that the second round removed fades on the way.

    Args:
        model: in which the rounds are evaluated, without its own masks; left as it is.
        folder: keeps every path; what is there already is not measured again.
        others: as `path_errors` takes them.

    Errors: as `path_errors`; ValueError for fewer than 2 rounds, or rounds of different networks.
    """
    _check_rounds(rounds, least=2)
    plain = densify_(copied(model))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with progress.task("rounds", total=len(rounds) - 1) as advance:
        for i, (a, b) in enumerate(pairwise(map(_masked, rounds))):
            path = path_errors(
                plain, a, b, batches, loss=loss, points=points, train_batches=train_batches, limit=limit,
                checkpoint=None if folder is None else folder / f"path-{i}.checkpoint", progress=progress,
            )  # fmt: skip
            paths.append(path)
            advance()
    return paths


def _masked(solution: Solution) -> dict[str, Tensor]:
    """The trained state with zeros where the mask removes."""
    state = dict(solution.trained)
    for name, mask in solution.masks.items():
        key = weight_key(name, state)
        state[key] = state[key].where(mask.to(state[key].device), 0)
    return state


def _check_rounds(rounds: Sequence[Solution], least: int) -> None:
    if len(rounds) < least:
        raise ValueError(f"rounds: expected at least {least}, got {len(rounds)}")
    networks = [{name: mask.shape for name, mask in r.masks.items()} for r in rounds]
    for i, network in enumerate(networks):
        if network != networks[0]:
            raise ValueError(
                f"rounds: expected all of one network, got other layers or shapes in number {i}: "
                f"{', '.join(network) or 'none'} instead of {', '.join(networks[0])}"
            )


class _Directions:
    """Unit vectors towards earlier optima, under the masks of the model that was seen last."""

    def __init__(self) -> None:
        self.made_for: list[
            tuple[nn.Module, torch.device]
        ] = []  # patterns held, so none is mistaken
        self.directions: list[Tensor] = []  # [R, n] by layer, n its parameter's size

    def of(self, layers: Mapping[str, SparseLayer], optima: Sequence[State]) -> list[Tensor]:
        now = [(layer.pattern, layer.raw_weight.device) for layer in layers.values()]
        if now != self.made_for:
            rows = [_seen(layer, name, optima) for name, layer in layers.items()]
            norms = torch.stack([row.square().sum(1) for row in rows]).sum(0).sqrt()
            # An optimum of which the masks leave nothing has no direction and no force.
            scale = norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None]
            self.made_for, self.directions = now, [row / scale for row in rows]
        return self.directions


def _seen(layer: SparseLayer, name: str, optima: Sequence[State]) -> Tensor:
    """One layer's weights at the optima, as its parameter would hold them: [R, n]."""
    rows = []
    for i, optimum in enumerate(optima):
        key = weight_key(name, optimum)
        value = optimum.get(key)
        if value is None or value.shape != layer.weight_shape:
            raise ValueError(
                f"repellent: expected {key} of shape {tuple(layer.weight_shape)} in optimum {i}, got "
                f"{'none' if value is None else tuple(value.shape)}; give dense states of this model"
            )
        value = value.to(layer.raw_weight)
        if isinstance(layer.pattern, Planned):
            value = layer.pattern.kept(value)
        elif isinstance(layer.pattern, Masked):
            value = value.where(layer.pattern.mask, 0)
        rows.append(value.reshape(-1))
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Repellent:
    """A penalty of training: strength * mean over earlier optima t of cos²(θ ⊙ m, t ⊙ m).

    θ are the weights of all sparse layers and m their masks.  A positive strength keeps training away from
    the earlier optima (+2 destroys tickets), a negative one draws it there (-1 brings them back in
    unstable training).  `train(..., penalty=Repellent(earlier, 2.0))`.

    Args:
        optima: dense states, one per earlier round; at least one.

    Errors: ValueError for no optima or a strength that is not finite, and at the first step for optima of
    another model.
    """

    capturable: ClassVar[bool] = True  # after its first call it only computes

    optima: Sequence[State]
    strength: float = 2.0
    _directions: _Directions = field(default_factory=_Directions, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.optima:
            raise ValueError("repellent: expected earlier optima, got none; leave the penalty out")
        if not math.isfinite(self.strength):
            raise ValueError(f"repellent strength: expected a finite number, got {self.strength}")

    def __call__(self, model: nn.Module) -> Tensor:
        """A scalar on the model's device, differentiable in its weights."""
        layers = require_sparse_layers(model)
        directions = self._directions.of(layers, self.optima)
        # Removed weights are zero in the parameter itself: no mask needs applying here.
        weights = [layer.raw_weight.reshape(-1) for layer in layers.values()]
        along = torch.stack([d @ w for d, w in zip(directions, weights, strict=True)]).sum(0)  # [R]
        square = torch.stack([w @ w for w in weights]).sum()
        return (
            self.strength * along.square().mean() / square.clamp_min(torch.finfo(square.dtype).tiny)
        )
