"""What every search is: a frozen value that is called with a model and batches and gives a ticket."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..layer import SparseLayer
from ..losses import LossLike
from ..progress import QUIET, Progress
from ..tickets import Ticket

Watch = Callable[
    [nn.Module], float
]  # e.g. the test accuracy, in percent, of a network as it is now


class SearchError(ValueError):
    """A search that cannot go on; the message says what to change."""


def require_full_precision(layers: Mapping[str, SparseLayer], *, double: bool = True) -> None:
    """Errors: ValueError for weights in half precision, which gates of float32 do not multiply, or, unless these take
    it, in double.
    """
    for name, layer in layers.items():
        dtype = layer.raw_weight.dtype
        if dtype != torch.float32 and not (double and dtype == torch.float64):
            raise ValueError(
                f"layer {name}: expected weights of float32 under gates, got {str(dtype).removeprefix('torch.')}; "
                "search in float32, and convert the model afterwards"
            )


class Search(Protocol):
    """A way to find tickets.  Everything that shapes the result is a field of the value or an argument."""

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
        """A ticket of `sparsity`; the model is returned to its former state.

        Args:
            model: with sparse layers (`sparsify_`), holding the weights the ticket shall start from.
            batches: as `loaders.batches_of` takes them.
            sparsity: fraction removed.
            checkpoint: a long search writes here as it goes, goes on from there when it was killed, to the
                same ticket, and removes it at the end.
            watch: measures the network as the search progresses, in one number, which is noted in the ticket's
                provenance and changes nothing.
            loss: of the task, as `losses.Loss` takes it.
            steps_per_epoch: of batches without a length.

        Errors: ValueError for bad arguments; SearchError for a search that cannot go on.
        """
        ...
