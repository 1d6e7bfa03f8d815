"""Rounds of iterative pruning: networks trained under ever sparser masks, kept for reuse and for analyses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from . import safefile, schema
from .kinds import checked
from .layer import weight_key
from .packed import layer_order, pack_mask, unpack_mask


class RoundError(safefile.FileError):
    """Rounds that cannot be read or written: which file, what is wrong with it, how to mend it."""


@dataclass(frozen=True)
class Round:
    """A network that was trained under masks.

    Args:
        index: from 0, the dense round.
        density: the kept fraction it trained at, before it is rounded to whole weights or units.
        masks: bool by sparse layer, each of its weight's shape, on the CPU.
        start: the dense state that training started from (under the masks), by the dense model's
            state_dict keys, as in a ticket.
        trained: the dense state after training, BatchNorm's statistics included; removed weights are 0.
        seconds: that training took.
        accuracy: of the trained network, percent; None where nobody measured it.
        run: fingerprint of the run that the round belongs to.
        engine: how its steps were launched; empty where that is not known.
    """

    index: int
    density: float
    masks: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    seconds: float
    accuracy: float | None
    run: str
    engine: str = ""

    def __repr__(self) -> str:
        measured = "" if self.accuracy is None else f", {self.accuracy:.2f} %"
        return f"Round({self.index}, {100 * self.density:.4g} % kept in {len(self.masks)} layers{measured})"

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by masked layer."""
        return {name: self.trained[weight_key(name, self.trained)] for name in self.masks}

    def ordered_as(self, other: "Round") -> "Round":
        """The same round, its layers and weights in the order of `other`'s, which has the same names."""
        return replace(
            self,
            masks={name: self.masks[name] for name in other.masks},
            start={key: self.start[key] for key in other.start},
            trained={key: self.trained[key] for key in other.start},
        )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with bit-packed masks.  Errors: RoundError if it cannot."""
        tensors = {f"mask/{name}": pack_mask(mask) for name, mask in self.masks.items()}
        tensors |= {f"start/{key}": value for key, value in self.start.items()}
        tensors |= {f"trained/{key}": value for key, value in self.trained.items()}
        meta = {name: getattr(self, name) for name in _Facts.__annotations__}
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        order = {"shapes": shapes, "layers": list(self.masks)}
        try:
            safefile.write(Path(path), tensors, safefile.finite(meta) | order, kind="round")
        except (TypeError, ValueError) as error:
            raise RoundError(str(error)) from None

    @classmethod
    def load(cls, path: str | Path) -> "Round":
        """Reads what `save` wrote.  Errors: RoundError for a missing, foreign or damaged file."""
        path = Path(path)
        try:
            tensors, meta = safefile.read(path, kind="round")
            return cls._from_parts(tensors, meta)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RoundError(
                f"{path} is no usable round ({error}); remove it and the rounds after it, and the "
                "search makes them again"
            ) from None

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> "Round":
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "start": {}, "trained": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        shapes = meta["shapes"]
        if not shapes or set(shapes) != set(parts["mask"]):
            raise ValueError("expected one shape for every mask")
        masks = {
            name: unpack_mask(name, parts["mask"][name], shapes[name]) for name in layer_order(meta)
        }
        expected = {key: value.shape for key, value in parts["start"].items()}
        if expected != {key: value.shape for key, value in parts["trained"].items()}:
            raise ValueError("expected the same weights before and after training")
        for name, mask in masks.items():
            if expected[weight_key(name, expected)] != mask.shape:
                raise ValueError(f"expected a mask of {name}'s shape, got {tuple(mask.shape)}")
        facts = schema.facts({"engine": "", **meta}, _Facts, "round")  # older rounds do not say
        return cls(masks=masks, start=parts["start"], trained=parts["trained"], **facts)


class _Facts(TypedDict):
    """What a file's JSON says."""

    index: schema.Count
    density: schema.Fraction
    seconds: schema.Seconds
    accuracy: float | None
    run: str
    engine: str


def round_path(folder: Path, index: int) -> Path:
    """Where a folder keeps the round."""
    return folder / f"round-{index:04}.safetensors"


def round_files(folder: Path) -> list[Path]:
    """The files of the folder's rounds in order, none if there are none.  Errors: RoundError for a gap."""
    try:
        found = set(folder.glob("round-*.safetensors"))
    except OSError as error:
        raise RoundError(f"{folder}: expected a folder of rounds ({error.strerror})") from None
    paths = [round_path(folder, index) for index in range(len(found))]
    for path in paths:
        if path not in found:
            raise RoundError(
                f"{path} is missing among {len(found)} rounds; put it back, or remove the rounds after "
                "it, and the search makes them again"
            )
    return paths


@checked
def load_rounds(folder: str | Path) -> list[Round]:
    """The rounds that a search kept in a folder, from the dense one on.

    Errors: RoundError for a folder without rounds, a missing or damaged file, or rounds of several runs.
    """
    folder = Path(folder)
    rounds = [Round.load(path) for path in round_files(folder)]
    if not rounds:
        raise RoundError(
            f"{folder}: expected a folder of rounds, found none; a search keeps them there with "
            "Rewinding(rounds=...)"
        )
    for index, found in enumerate(rounds):
        if (found.index, found.run) != (index, rounds[0].run):
            raise RoundError(
                f"{round_path(folder, index)}: expected round {index} of the run {rounds[0].run[:12]}, "
                f"got round {found.index} of {found.run[:12]}; keep each run in a folder of its own"
            )
    return rounds
