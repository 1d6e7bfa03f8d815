"""Progress bars that vanish when stderr is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from .printable import Screen, printable

_MOST = 200  # characters beside a bar


class Advance:
    """Moves one bar on; keyword values stand beside it."""

    def __init__(self, bars: RichProgress | None, task: Any) -> None:
        self._bars, self._task = bars, task

    def __call__(self, steps: int = 1, **values: Any) -> None:
        if self._bars is not None:
            self._bars.advance(self._task, steps)
            if values:
                self.describe(**values)

    def describe(self, **values: Any) -> None:
        """Shows values without moving on."""
        if self._bars is not None:
            text = "  ".join(f"{k} {_short(v)}" for k, v in values.items())
            self._bars.update(self._task, note=printable(text, _MOST))


class Progress:
    """`with Progress() as progress, progress.task("search", total=100) as advance: advance()`."""

    def __init__(self, *, enabled: bool = True) -> None:
        console = self._console = Screen(stderr=True)
        self._enabled, self._told = enabled, set[str]()
        self._bars = None
        if enabled and console.is_terminal:
            self._bars = RichProgress(
                TextColumn("{task.description:8}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
                transient=True,
            )

    def __enter__(self) -> "Progress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def tell(self, what: str, text: str) -> None:
        """One line above the bars, once; an empty text is none."""
        if self._enabled and text and text not in self._told:
            self._told.add(text)
            self._console.line(f"{what}  {text}")

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """A bar that is there while the block runs."""
        if self._bars is None:
            yield Advance(None, None)
            return
        task = self._bars.add_task(printable(name, _MOST), total=total, note="")
        try:
            yield Advance(self._bars, task)
        finally:
            self._bars.remove_task(task)


QUIET = Progress(enabled=False)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
