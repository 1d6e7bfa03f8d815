"""Edge-popup: a subnetwork of frozen weights that works untrained (Ramanujan et al. 2020, arXiv 1911.13299)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints, schema
from ..batches import EpochBatches
from ..batchnorm import recompute_statistics_
from ..convert import batch_statistics, require_dense_parameters, sparse_layers
from ..copies import copied
from ..engine import Timeline, TrainingStep, check_engine, feed_of, launch, takes_images
from ..gates import TopK
from ..granularity import Granularity, Weight
from ..kinds import check_fields
from ..layer import SparseLayer
from ..loaders import batches_of
from ..losses import Loss, LossLike, loss_of
from ..patterns import Gated, Masked
from ..progress import QUIET, Progress
from ..recipe import Recipe, optimizer_for, steps_in_all
from ..sparsities import (
    Distribution,
    by_layer,
    check_possible,
    check_sparsity,
    kept_count,
    masks_from_scores,
    uniform_densities,
)
from ..telling import note_gradients
from ..tickets import Ticket, dense_state
from ..tied import require_own_weights
from ..unsaved import Unsaved
from .epochs import StepEpochs, require_finite, run_epochs, way_of
from .finished import check_weights, searched_in
from .protocol import Watch, require_full_precision
from .told import telling


@dataclass(frozen=True)
class EdgePopup:
    """Learns one score per unit; each layer computes with its k best by |score|, its weights stay frozen.

    The gradient goes straight through the choice: dL/dscore = dL/dz * sign(score) for every unit, kept or
    not, so that an absent one can pop up.  The ticket is finished: its weights are those that were searched
    in, with BatchNorm's statistics under its masks.  Biases and BatchNorm's parameters are no part of the
    choice: they stay as the model has them (the paper has none).

    Args:
        epochs: passes over the batches; the paper's 100, at batches of 128.
        weights: "signed-constant", sign(w) * sqrt(2 / fan_in), the paper's best; "scaled", the same times
            sqrt(1 / density) of the layer; "as-is", the model's own.  A weight of 0 stays 0.
        distribution: gives every layer its density (`sparsities.erk_densities`); None: the same in each.
        lr, momentum, weight_decay: SGD's on the scores; lr falls along a cosine to 0.
        granularity: blocks that an edge cuts short count as whole ones in a step; the ticket counts weights.
        seed: of the first scores, uniform in +-1 / sqrt(fan_in): kaiming_uniform with a = sqrt(5).

    Errors: ValueError for a number out of range or other weights.
    """

    epochs: int = 100
    weights: str = "signed-constant"
    distribution: Distribution | None = None
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    granularity: Granularity = field(default_factory=Weight)
    seed: int = 0
    engine: str = field(default="auto", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_engine(self.engine)
        check_weights(self.weights)
        if self.epochs < 1:
            raise ValueError(f"epochs: expected at least 1, got {self.epochs}")
        _ = self.recipe  # refuses bad numbers

    @property
    def recipe(self) -> Recipe:
        """How the scores train."""
        return Recipe(
            optimizer="sgd",
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            epochs=self.epochs,
            schedule="cosine",
        )

    @telling
    def __call__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        sparsity: float,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
        watch: Watch | None = None,
        loss: LossLike = None,
        steps_per_epoch: int | None = None,
    ) -> Ticket:
        """The finished ticket of the k best-scored weights of each layer, k = floor((1 - sparsity) * its weights).

        The model is never touched: the search works on copies.

        Args:
            sparsity: fraction removed, in (0, 1).
            checkpoint: written after every epoch; if it exists, the search goes on from there with
                the numbers of an uninterrupted run, and it stays until the ticket is saved.
            watch: measured after every epoch on the ticket that would be found by then.

        Errors: ValueError for bad arguments or a layer that would keep nothing; SearchError if the
        objective is not finite, or for a checkpoint of another search.
        """
        batches, by = batches_of(batches, model, steps_per_epoch), loss_of(loss)
        checkpoints.check_resumable(checkpoint, batches)
        layers = require_dense_parameters(model)
        sparsities = self._sparsities(layers, sparsity)
        require_own_weights(model)
        require_full_precision(layers)
        run = ""
        if checkpoint is not None:
            facts = (replace(self, distribution=None), sparsities)
            run = checkpoints.fingerprint(model, batches, *facts, loss=by)
        densities = {name: 1 - sparsity for name, sparsity in sparsities.items()}
        hard = searched_in(model, self.weights, densities)
        net = copied(hard)
        with batch_statistics(net):
            saved = way_of(checkpoint, run)
            work = _PopupEpochs(self, net, hard, batches, sparsities, watch, saved, by)
            progress.tell("engine", work.engine.told)
            records = run_epochs(
                work,
                self.epochs,
                run=run,
                progress=progress,
                checkpoint=checkpoint,
            )
        work.note()
        masks = {name: mask.cpu() for name, mask in work.harden_().items()}
        scores = require_finite({name: score.cpu() for name, score in work.scores().items()})
        meta = self._meta(sparsity) | {"progress": records, "engine": str(work.engine.way)}
        meta["loss"] = by.name
        ticket = Ticket(masks, dense_state(hard), meta, scores)
        return replace(ticket, unsaved=Unsaved.of([checkpoint])[0])

    def _sparsities(self, layers: Mapping[str, SparseLayer], sparsity: float) -> dict[str, float]:
        """Of each layer; told before the search if a layer cannot be so."""
        if check_sparsity(sparsity) == 0:
            raise ValueError("sparsity: expected 0 < sparsity < 1 for a search, got 0")
        shapes = {name: layer.raw_weight.shape for name, layer in layers.items()}
        distribution = self.distribution or uniform_densities
        densities = by_layer(distribution, shapes, sparsity, self.granularity) or {}
        if set(densities) != set(shapes):
            raise ValueError(
                f"distribution: expected a density for each of {', '.join(shapes)}, got some for "
                f"{', '.join(densities) or 'none'}"
            )
        chosen = {name: 1 - density for name, density in densities.items()}
        for name, shape in shapes.items():
            kept = kept_count(shape.numel(), chosen[name])
            largest = int(self.granularity.sizes(shape).max())
            if kept < largest:
                raise ValueError(
                    f"layer {name}: sparsity {chosen[name]:.6g} keeps {kept} of its {shape.numel()} weights, "
                    f"expected at least one {self.granularity} of {largest}; ask for a lower sparsity, or "
                    "give a distribution that spares small layers"
                )
            check_possible({name: shape}, chosen[name], self.granularity)
        return chosen

    def _meta(self, sparsity: float) -> dict[str, Any]:
        return {
            "method": "edge-popup",
            "finished": True,
            "sparsity": sparsity,
            "seed": self.seed,
            "search_epochs": self.epochs,
            "search_lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "weights": self.weights,
            "granularity": str(self.granularity),
            "torch": torch.__version__,
        }


class _PopupEpochs(StepEpochs):
    """SGD on the scores of `net`, and `hard`, which becomes what the ticket would be by now."""

    def __init__(
        self,
        search: EdgePopup,
        net: nn.Module,
        hard: nn.Module,
        batches: EpochBatches,
        sparsities: Mapping[str, float],
        watch: Watch | None,
        saved: str | None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(batches, watch, loss or Loss())
        self.search, self.net, self.hard = search, net, hard
        self.sparsities, self.recipe = sparsities, search.recipe
        self.gated: dict[str, Gated] = {}
        draws = torch.Generator().manual_seed(search.seed)
        for name, layer in sparse_layers(net).items():
            weight, gate = layer.raw_weight, TopK(sparsities[name])
            pattern = Gated(
                weight.shape,
                gate,
                search.granularity,
                density=1 - gate.sparsity,
                device=weight.device,
            )
            bound = 1 / math.sqrt(weight[0].numel())
            first = (
                2 * torch.rand(pattern.logits.shape, generator=draws, dtype=torch.float32) - 1
            ) * bound
            pattern.logits.data.copy_(first)
            layer.pattern = self.gated[name] = pattern
        logits = [pattern.logits for pattern in self.gated.values()]
        device, steps = logits[0].device, steps_in_all(search.epochs, self.length)
        epochs = [(i + 0.5) / self.length for i in range(steps)]
        self.timeline = Timeline(
            {"lr": [self.recipe.lr_at(e, search.epochs) for e in epochs]}, device
        )
        self.optimizer = optimizer_for(logits, self.recipe, lr=self.timeline.now["lr"])
        step = TrainingStep(net, self.loss, self.optimizer, timeline=self.timeline)
        self.training = step
        self.engine = launch(
            step.become,
            feed_of(batches, device),
            engine=search.engine,
            steps=steps,
            saved=saved,
            layouts=takes_images(net),
        )

    def mean(self, samples: int) -> float:
        return self.training.mean()

    def note(self) -> None:
        """Notes which layers' scores a gradient came to."""
        if (unreached := self.training.unreached) is not None:
            missed = set(map(id, unreached))
            note_gradients({n: id(g.logits) not in missed for n, g in self.gated.items()})

    def scores(self) -> dict[str, Tensor]:
        """|score| by layer, one per unit."""
        return {name: g.gate.score(g.logits.detach()) for name, g in self.gated.items()}

    def harden_(self) -> dict[str, Tensor]:
        """Puts the masks as they are by now into `hard`, and returns them."""
        layers, masks = sparse_layers(self.hard), {}
        for name, score in self.scores().items():
            layer, sparsity = layers[name], self.sparsities[name]
            shapes = {name: layer.raw_weight.shape}
            masks |= masks_from_scores({name: score}, shapes, sparsity, self.search.granularity)
            # Not set_mask_: a ticket's controls draw other masks over the same weights.
            layer.pattern = Masked(masks[name])
        recompute_statistics_(self.hard, self.batches)
        return masks

    def measure(self, watch: Watch) -> float:
        self.harden_()
        return watch(self.hard)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._scores() | checkpoints.pack_optimizer(self.optimizer), {
            "engine": str(self.engine.way)
        }

    def _scores(self) -> dict[str, Tensor]:
        return {f"scores/{name}": g.logits.detach() for name, g in self.gated.items()}

    def load(self, tensors: dict[str, Tensor], rest: dict[str, Any], epochs: int) -> None:
        found, moments = checkpoints.apart(tensors, "optimizer/")
        own = self._scores()
        found = schema.tensors(found, own, "search")
        checkpoints.unpack_optimizer(self.optimizer, moments)
        for name, value in own.items():
            value.copy_(found[name])
