"""How often a model is right, in evaluation mode: the same feed and the same engine as for training."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, EpochBatches
from .engine import AbstractStep, Engine, Way, stamp
from .feeds import feed_of


class Evaluation(AbstractStep):
    """Accuracy of one model on the same batches, as often as asked.

    Args:
        way: of which a graph counts; a forward alone is not worth compiling.
    """

    def __init__(self, model: nn.Module, batches: EpochBatches, way: Way = Way()) -> None:  # noqa: B008  a value
        self.model, self.length = model, len(batches)
        self.device = next(model.parameters()).device
        self.total = torch.zeros(2, dtype=torch.int64, device=self.device)  # hits, of how many
        self.channels_last = way.channels_last
        self.engine = Engine(self, feed_of(batches, self.device), Way(graph=way.graph))

    def measure(self) -> float:
        """Accuracy in percent, in evaluation mode; every module's mode is put back.  One host sync."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.inference_mode():
                self.clear()
                self.engine.begin(0)
                for _ in range(self.length):
                    self.engine()
                hits, count = self.total.tolist()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return 100 * (hits / count)

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> None:
        x, y = batch
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        hits = self.model(x).argmax(-1) == y
        self.total[0].add_(hits.sum())
        self.total[1].add_(hits.numel())

    def changes(self) -> list[Tensor]:
        return [self.total]

    def version(self) -> Hashable:
        return stamp(self.model)

    def keep(self) -> Any:
        return list(self.model.modules())
