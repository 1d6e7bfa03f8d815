"""Concrete Ticket Search: train one gate logit per unit on frozen weights (arXiv 2512.07142)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoints
from ..convert import require_dense_parameters
from ..gates import Concrete
from ..loaders import batches_of
from ..losses import Loss, LossLike, loss_of
from ..patterns import Gated
from ..progress import QUIET, Progress
from ..tickets import Ticket
from .gated import AbstractGateSearch
from .several import in_turn, worth_stacking
from .steps import LayerwiseStep, Members, SearchStep
from .told import telling


@dataclass(frozen=True)
class ConcreteSearch(AbstractGateSearch):
    """Finds a ticket in a model's present weights, which stay as they are.

    With `rewind` weights (a few epochs of dense training first) and `reverse_kl` this is the paper's
    best variant, CTS-KL; from untrained weights use `objectives.task`.

    Args:
        epochs: the paper's "short" is 12.5 % of the training epochs.
        gate: the paper's is Concrete(tau=2/3), but there P(z > 1/2) is sigmoid(2s/3), many times the
            sigmoid(s) that the penalty counts: what is searched is denser than what is found.
        lr: 0.1 for CIFAR-sized models, 0.4 for ImageNet.
        gain_lr: 0, as in the paper, makes a ticket match the teacher at the dense weights' scale, so that
            it keeps large weights rather than the right ones.  The README measures it.
        layerwise: whether each layer draws by itself, by the strategy that measures fastest at its shape
            (`kernels.gated_linear`), instead of all in one launch.  None: on a GPU, where gates of
            several weights can close, so that what is closed is skipped.

    The other fields and errors are those of `AbstractGateSearch`.
    """

    layerwise: bool | None = None

    @property
    def name(self) -> str:
        return "cts"

    @telling
    def many(
        self,
        model: nn.Module,
        batches: Any,
        *,
        sparsities: Sequence[float],
        seeds: Sequence[int] | None = None,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
        loss: LossLike = None,
        steps_per_epoch: int | None = None,
    ) -> list[Ticket]:
        """Several searches at once, sparsities[i] with the gates' noise from seeds[i]: for small models.

        Each ticket is what a search of its own would find, to rounding; the networks are computed
        side by side (`torch.vmap`) on the same batches, so that their launches are one model's.  On a GPU
        that is slower where gates are in convolutions: there the searches run in turn, with a warning.

        Args:
            seeds: by default `self.seed` for all.

        Errors: as `__call__`; ValueError for lengths that differ and, side by side, channels_last or an
        objective that needs more than class scores.
        """
        seeds = [self.seed] * len(sparsities) if seeds is None else seeds
        if len(seeds) != len(sparsities) or len(sparsities) == 0:
            raise ValueError(
                f"many: expected as many seeds as sparsities, at least one of each, got {len(seeds)} "
                f"and {len(sparsities)}"
            )
        batches, by = batches_of(batches, model, steps_per_epoch), loss_of(loss)
        checkpoints.check_resumable(checkpoint, batches)
        members = list(zip(sparsities, seeds, strict=True))
        layers = require_dense_parameters(model)
        device = next(model.parameters()).device
        if len(members) == 1 or worth_stacking(device, layers.values()):
            return self._find(model, batches, members, progress, checkpoint, None, by)
        warnings.warn(
            f"many: {len(members)} searches run in turn, since convolutions side by side are slower on a GPU",
            stacklevel=2,
        )
        return in_turn(
            self, model, batches, members, progress=progress, checkpoint=checkpoint, loss=by
        )

    def _step(
        self,
        model: nn.Module,
        gated: dict[str, Gated],
        members: Members,
        loss: Loss | None = None,
    ) -> SearchStep:
        layerwise = self.layerwise
        if layerwise is None:
            closes = not isinstance(self.gate, Concrete) and not self.granularity.unit.single
            layerwise = closes and next(model.parameters()).is_cuda
        if layerwise and self.fusible and len(members) == 1:
            return LayerwiseStep(self, model, gated, members, loss)
        return super()._step(model, gated, members, loss)
