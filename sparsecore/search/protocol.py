"""What every search is: a frozen value that is called with a model and batches and gives a ticket."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import nn

from ..batches import EpochBatches
from ..progress import QUIET, Progress
from ..tickets import Ticket

Watch = Callable[
    [nn.Module], float
]  # e.g. the test accuracy, in percent, of a network as it is now


class SearchError(ValueError):
    """A search that cannot go on; the message says what to change."""


class Search(Protocol):
    """A way to find tickets.  Everything that shapes the result is a field of the value or an argument."""

    def __call__(
        self,
        model: nn.Module,
        batches: EpochBatches,
        *,
        sparsity: float,
        progress: Progress = QUIET,
        checkpoint: Path | None = None,
        watch: Watch | None = None,
    ) -> Ticket:
        """A ticket of `sparsity`; the model is returned to its former state.

        Args:
            model: with sparse layers (`sparsify_`), holding the weights the ticket shall start from.
            sparsity: fraction removed.
            checkpoint: a long search writes here as it goes, goes on from there when it was killed, to the
                same ticket, and removes it at the end.
            watch: measures the network as the search progresses; what it says is noted in the
                ticket's provenance and changes nothing.

        Errors: ValueError for bad arguments; SearchError for a search that cannot go on.
        """
        ...
