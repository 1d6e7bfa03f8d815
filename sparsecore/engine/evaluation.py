"""How often a model is right, in evaluation mode: the same feed and the same engine as for training."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import capture
from ..accuracy import hits
from ..batches import Batch, EpochBatches, on, parts_of, size_of
from ..calls import fits, forward
from ..interrupts import ending_with
from ..loss_functions import plain
from ..losses import Loss
from .auto import launch
from .engine import AbstractStep, stamp, structure
from .feeds import feed_of
from .layout import channels_last

_HITS, _COUNTED, _VALUE, _OF, _FOREIGN = range(5)  # places in an evaluation's `total`


class Measured(NamedTuple):
    """accuracy in percent, of labels: NaN where there are no classes or another metric was asked for.  loss: a mean,
    cross-entropy in nats, of labels where it has some and of samples otherwise, or that of the metric that was asked
    for; NaN where neither was.
    """

    accuracy: float
    loss: float


class Evaluation(AbstractStep):
    """One model on the same batches, as often as asked; `total` sums hits, labels, and losses with what they are of.

    Args:
        engine: of the steps; a forward alone is not worth compiling.
        times: about how often it will be asked.
        loss: whether that is wanted too; it is measured in any case where there are no classes.
        by: the loss, which also knows the classes.
        metric: measured in place of both; "accuracy" is measured whatever the loss, or refused.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: EpochBatches,
        *,
        engine: str = "eager",
        times: int = 1,
        loss: bool = False,
        by: Loss | None = None,
        metric: Loss | Literal["accuracy"] | None = None,
        channels_last: bool = False,
    ) -> None:
        self.model, self.length, self.loss = model, len(batches), loss
        self.by, self.asked = by or Loss(), metric == "accuracy"
        self.metric = metric if isinstance(metric, Loss) else None
        # Until an output shows none.
        self.classes = self.asked or (metric is None and self.by.tells_classes)
        tensors = chain(model.parameters(), model.buffers())
        self.device = next((t.device for t in tensors), torch.device("cpu"))
        self.total = torch.zeros(5, dtype=torch.float64, device=self.device)
        self.sums = self.total.unbind()  # its places
        self.channels_last = channels_last
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
            right, labels, value, count, foreign = self.total.tolist()
        if not (labels or count):
            raise ValueError(
                "evaluation: expected at least one sample whose label is not left out, got data without any"
            )
        if foreign:
            raise ValueError(
                f"accuracy: expected labels of the model's classes, got {foreign:.0f} others among {labels:.0f}; mend "
                "them, or leave a label out by the loss's ignore_index: loss=nn.CrossEntropyLoss(ignore_index=255)"
            )
        nan = float("nan")
        return Measured(100 * (right / labels) if labels else nan, value / count if count else nan)

    def try_first(self, batches: EpochBatches) -> None:
        """The first batch, without a trace: what does not fit is refused before anything is trained.

        Errors: ValueError, which names metric= where none was asked for.
        """
        batch = next(iter(batches.epoch(0)), None)
        if batch is None:
            return
        classes = self.classes
        try:
            with self.undone():
                self(on(self.device, batch))
        except ValueError as error:
            if self.metric is not None or self.asked:
                raise
            raise ValueError(
                f"{error} (the test data is measured by the loss: say metric='accuracy', or metric= a function of "
                "(output, target), where it is of another kind)"
            ) from error
        finally:
            self.classes = classes

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        # What judges may have modes too, and must not learn from what it judges.
        judges = [plain(by.fn) for by in (self.by, self.metric) if by is not None]
        parts = [self.model, *(fn for fn in judges if isinstance(fn, nn.Module))]
        modes = {module: module.training for part in parts for module in part.modules()}

        def put_back() -> None:
            for module, mode in modes.items():
                module.training = mode

        with ending_with(put_back):
            for part in parts:
                part.eval()
            # Not inference_mode: what a model keeps for later, as positions, has to be fit for training.
            with torch.no_grad():
                yield

    @contextmanager
    def undone(self) -> Iterator[None]:
        with self._evaluating(), super().undone():
            yield

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> None:
        batch = channels_last(batch) if self.channels_last else batch
        inputs = parts_of(batch)[0]
        judge = self.by if self.metric is None else self.metric
        if judge.takes_model and not (self.classes and fits(self.model, inputs)):
            self._add(judge(self.model, batch).double() * size_of(batch), size_of(batch))
            return
        output = forward(self.model, inputs)
        if self.classes:
            found = hits(judge, output, batch, self.asked)
            if found is None:
                self.classes = False
            else:
                right, counts, others = found
                self.sums[_HITS].add_((right & counts).sum())
                self.sums[_COUNTED].add_(counts.sum())
                self.sums[_FOREIGN].add_(others.sum())
        if self.loss or not self.classes:
            if judge.takes_model:
                self._add(judge(self.model, batch).double() * size_of(batch), size_of(batch))
            else:
                self._add(judge.summed(output, batch), judge.counted(batch))

    def _add(self, value: Tensor, count: Tensor | int) -> None:
        self.sums[_VALUE].add_(value)
        self.sums[_OF].add_(count)

    def changes(self) -> list[Tensor]:
        return [self.total]

    def version(self) -> Hashable:
        return stamp(self.model)

    def keep(self) -> Any:
        return list(self.model.modules())

    def facts(self) -> Any:
        return super().facts(), structure(self.model), self.loss
