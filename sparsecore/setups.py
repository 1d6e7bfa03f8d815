"""What is searched, as a frozen value: one model on one data set, and how tickets are searched and trained in it."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .convert import Filter, is_prunable
from .fields import choose, held_as_float32
from .methods import DTYPES, search_for, split
from .recipe import MOST_EPOCHS, Recipe
from .recipes import check_options, recipe_for
from .search import Search
from .start_weights import TRAINED

_OF_SEARCHES = (
    "search_epochs", "search_lr", "gain_lr", "tau", "search_dtype", "channels_last", "objective", "control",
)  # fmt: skip
_MOST_GLOBS = 1_000
_LONGEST = 1_000  # characters of a glob: matching takes time with their square


@dataclass(frozen=True)
class Setup:
    """One model on one data set and how tickets are searched and trained in it.

    Args:
        rewind_epochs: of dense training before the search, fractions too; tickets start there.
        train_epochs: of training after the rewind point.
        search_epochs, search_lr, gain_lr, tau, objective, control: of searches by gates; None: the method's.
        train_samples: how many of the training data are used, for reduced runs; None: all.
        sparse_layers: globs on layer names, of which those that begin with "!" exclude (`convert.sparsify_`);
            None: all that `convert.is_prunable` takes.
        weights: where training begins, a file's state_dict or DEFAULT, torchvision's trained weights; None: freshly
            initialised.
        drop_last: whether a last, smaller batch of training is left out.
        image_size: side of a folder's images, in pixels; None: the median of theirs.

    Errors: ValueError, listing valid names and ranges.
    """

    model: str
    data: str
    recipe: Recipe
    model_options: dict[str, Any] = field(default_factory=dict)
    rewind_epochs: float = 2
    train_epochs: float = 12
    search_epochs: int | None = None
    search_batch: int = 512
    search_lr: float | None = None
    gain_lr: float | None = None
    tau: float | None = None
    search_dtype: str = "fp32"
    channels_last: bool | None = None
    objective: str | None = None
    control: str | None = None
    granularity: str = "weight"
    train_samples: int | None = None
    sparse_layers: str | tuple[str, ...] | None = None
    weights: str | None = None
    drop_last: bool = False
    image_size: int | None = None

    def __post_init__(self) -> None:
        recipe_for(self.model)  # an unknown model is told at once
        check_options(self.model, self.model_options)
        choose("search dtype", self.search_dtype, DTYPES)
        check_epochs("rewind epochs", self.rewind_epochs)
        check_epochs("train epochs", self.train_epochs)
        check_epochs("rewind and train epochs", self.total_epochs)
        if not 1 <= self.search_batch < 2**31:
            raise ValueError(f"search batch: expected 1 to 2**31 - 1, got {self.search_batch}")
        for name in ("search_lr", "gain_lr", "tau"):
            if not held_as_float32(getattr(self, name) or 0):
                raise ValueError(
                    f"{name.replace('_', ' ')}: expected a finite number that float32 holds, got {getattr(self, name)}"
                )
        if self.train_samples is not None and self.train_samples < 1:
            raise ValueError(f"train samples: expected at least 1, got {self.train_samples}")
        if len(self.globs) > _MOST_GLOBS:
            raise ValueError(
                f"layers: expected at most {_MOST_GLOBS:,} globs, got {len(self.globs):,}"
            )
        for glob in self.globs:
            if len(glob) > _LONGEST:
                raise ValueError(
                    f"layers: expected globs of at most {_LONGEST:,} characters, got one of {len(glob):,}"
                )
        self.search("cts", seed=0)  # refuses its bad names and numbers

    @property
    def filter(self) -> Filter:
        return self.sparse_layers or is_prunable

    @property
    def globs(self) -> tuple[str, ...]:
        """Those of `sparse_layers`."""
        said = () if self.sparse_layers is None else self.sparse_layers
        return (said,) if isinstance(said, str) else said

    @property
    def total_epochs(self) -> float:
        """What the schedule of a whole training spans."""
        return self.rewind_epochs + self.train_epochs

    @property
    def weights_file(self) -> Path | None:
        """The file that `weights` names, if it does."""
        return None if self.weights in (None, TRAINED) else Path(self.weights or "")

    def search(self, method: str, seed: int) -> Search:
        """The search behind a method's name, such as `cts` or `ltr:rate=0.3`."""
        return search_for(self, method, seed)

    def start_of(self, method: str) -> "Setup":
        """This setup with the method's own rewind point; the schedule's end stays where it is."""
        if not split(method)[0].from_init or not self.rewind_epochs:
            return self
        return replace(self, rewind_epochs=0, train_epochs=self.total_epochs)


def check_epochs(what: str, epochs: float) -> None:
    """Errors: ValueError for less than 0 or more than a million epochs."""
    if not 0 <= epochs <= MOST_EPOCHS:  # true for NaN too
        raise ValueError(f"{what}: expected at least 0 and at most {MOST_EPOCHS:,}, got {epochs}")


def unused_options(setup: Setup, method: str) -> list[str]:
    """Fields of the setup that were set for searches, and that the method's has no use for."""
    known = {f.name: f.default for f in fields(setup) if f.name in _OF_SEARCHES}
    given = [name for name, default in known.items() if getattr(setup, name) != default]
    search = setup.search(method, 0)
    return [n for n in given if replace(setup, **{n: known[n]}).search(method, 0) == search]
