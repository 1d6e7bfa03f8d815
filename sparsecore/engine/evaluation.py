"""How often a model is right, in evaluation mode: the same feed and the same engine as for training."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import capture
from ..batches import Batch, EpochBatches
from .auto import launch
from .engine import AbstractStep, stamp, structure
from .feeds import feed_of


class Measured(NamedTuple):
    """accuracy in percent; loss: cross-entropy in nats, NaN where it was not asked for."""

    accuracy: float
    loss: float


class Evaluation(AbstractStep):
    """One model on the same batches, as often as asked; `total` sums hits, samples and their losses.

    Args:
        engine: of the steps; a forward alone is not worth compiling.
        times: about how often it will be asked.
        loss: whether that is wanted too.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: EpochBatches,
        *,
        engine: str = "eager",
        times: int = 1,
        loss: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.model, self.length, self.loss = model, len(batches), loss
        self.device = next(model.parameters()).device
        self.total = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.format = torch.channels_last if channels_last else torch.preserve_format
        if not capture.possible_on(self.device):
            engine = "eager"
        self.engine = launch(
            lambda way: self,
            feed_of(batches, self.device),
            engine={"compile": "eager", "compile-graph": "graph"}.get(engine, engine),
            steps=times * self.length,
        )

    def measure(self) -> Measured:
        """In evaluation mode; every module's mode is put back.  One host sync."""
        with self._evaluating():
            self.clear()
            self.engine.begin(0)
            for _ in range(self.length):
                self.engine()
            hits, count, losses = self.total.tolist()
        if not count:
            raise ValueError("evaluation: expected at least one sample, got data without any")
        return Measured(100 * (hits / count), losses / count if self.loss else float("nan"))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def undone(self) -> Iterator[None]:
        with self._evaluating(), super().undone():
            yield

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> None:
        x, y = batch
        scores = self.model(x.to(memory_format=self.format) if x.ndim == 4 else x)
        hits = scores.argmax(-1) == y
        self.total[0].add_(hits.sum())
        self.total[1].add_(hits.numel())
        if self.loss:
            self.total[2].add_(
                F.cross_entropy(scores, y, reduction="none").sum(dtype=torch.float64)
            )

    def changes(self) -> list[Tensor]:
        return [self.total]

    def version(self) -> Hashable:
        return stamp(self.model)

    def keep(self) -> Any:
        return list(self.model.modules())

    def facts(self) -> Any:
        return super().facts(), structure(self.model), self.loss
