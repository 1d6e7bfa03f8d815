"""Tickets: masks by layer, the weights they start from, and where they come from."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from . import foreign, safefile, schema
from .claims import sole
from .convert import plain_state, require_sparse_layers
from .fits import TicketError as TicketError
from .fits import check_castable, check_names, check_plain, check_shapes, check_values
from .granularity import NM, Granularity, Weight, parse_granularity
from .interrupts import signals_later
from .kinds import check_fields, checked
from .packed import layer_order, pack_mask, unpack_mask
from .patterns import Dense
from .plans import check_plan, plan_
from .sparsities import masks_from_scores, top_k
from .telling import tell_applied
from .tied import require_own_memory
from .unsaved import Unsaved


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict under its plain keys (no patterns), as clones on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in plain_state(model).items()}


@dataclass(frozen=True, eq=False)
class Ticket:
    """A sparse subnetwork.  One is equal to itself alone; `hash` tells whether masks are.

    Args:
        masks: bool by sparse layer, each of its weight's shape.
        weights: the dense state training starts from, by the dense model's state_dict keys.
        meta: JSON-able provenance (method, sparsity asked for, seed, granularity, ...).
        scores: one per unit, for `inverted`; None where there are none.
        unsaved: the checkpoint of the search that found it, which `save` removes.

    Errors: TicketError for tensors that are sparse, nested, quantised or on meta, and masks that are not bool.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Tensor] | None = None
    unsaved: Unsaved | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_plain("masks", self.masks, masks=True)
        check_plain("weights", self.weights)
        check_plain("scores", self.scores or {})
        if self.unsaved is not None:
            self.unsaved.belongs_to(self.masks)

    @classmethod
    @checked
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        model: nn.Module,
        sparsity: float,
        granularity: Granularity | None = None,
        meta: Mapping[str, Any] | None = None,
        densities: Mapping[str, float] | None = None,
    ) -> "Ticket":
        """Keeps the best-scored units, of all or by layer, and the model's present weights.

        Args: densities: share of weights kept by layer; None ranks all layers together.

        Errors: ValueError from `masks_from_scores`.
        """
        granularity = granularity or Weight()
        layers = require_sparse_layers(model)
        shapes = {name: layers[name].weight_shape for name in scores}
        masks = masks_from_scores(scores, shapes, sparsity, granularity, densities)
        return cls(
            {name: mask.cpu() for name, mask in masks.items()},
            dense_state(model),
            dict(meta or {}) | {"granularity": str(granularity), "torch": torch.__version__},
            {name: score.detach().float().cpu().clone() for name, score in scores.items()},
        )

    def __repr__(self) -> str:
        total = sum(mask.numel() for mask in self.masks.values())
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        method = self.meta.get("method")
        return (
            f"Ticket({method if isinstance(method, str) else 'of unknown origin'}: {kept:,} of {total:,} weights in "
            f"{len(self.masks)} layers, {100 * (1 - kept / max(total, 1)):.4g} % removed, {self.granularity})"
        )

    @classmethod
    @checked
    def from_zeros(cls, model: nn.Module) -> "Ticket":
        """The ticket of a model whose pruned weights are zeros: what other tools leave when they are done.

        Every layer with a weight matrix that has a zero gets a mask, of its entries that are not; the weights are
        the model's.  The model may be dense or sparse, and stays as it is.

        Errors: TicketError for a model without such zeros, or with weights that are not finite.
        """
        return cls._found("from_zeros", foreign.zeros_of, model)

    @classmethod
    @checked
    def from_prune(cls, model: nn.Module) -> "Ticket":
        """The ticket of a dense model under `torch.nn.utils.prune`: its masks, and the weights below them.

        Pruned weights keep the values in `weight_orig`.  Apply it to a fresh model, or to this one after
        `prune.remove`.

        Errors: TicketError for a model that holds no such mask, or one over another parameter than a weight.
        """
        return cls._found("from_prune", foreign.pruned_of, model)

    @classmethod
    def _found(
        cls, name: str, how: Callable[[nn.Module], foreign.Found], model: nn.Module
    ) -> "Ticket":
        try:
            masks, weights = how(model)
        except ValueError as error:
            raise TicketError(str(error)) from None
        meta = {"method": name, "granularity": "weight", "torch": torch.__version__}
        return cls(masks, weights, meta)

    @sole("prune_", whole=True)
    def prune_(self, model: nn.Module) -> nn.Module:
        """Writes the ticket as masks of `torch.nn.utils.prune` into a dense model; returns the model.

        Weights are the ticket's.  A mask of an attention's or a recurrent network's matrix is over that parameter.
        `prune.remove` makes zeros of it; a plain checkpoint is `densify_(ticket.apply_(model)).state_dict()`.

        Errors: TicketError for a ticket of another model, or a sparse one; nothing changes then.
        """
        try:
            foreign.prune_(self.masks, self.weights, model)
        except ValueError as error:
            raise TicketError(str(error)) from None
        return model

    @property
    def sparsity(self) -> float:
        """Fraction of the masked layers' weights that is removed."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / max(total, 1)

    @property
    def density(self) -> float:
        return 1 - self.sparsity

    @property
    def granularity(self) -> Granularity:
        return parse_granularity(self.meta.get("granularity", "weight"))

    @property
    def finished(self) -> bool:
        """Whether `weights` are meant to be used as they are: a strong ticket, or one that trained while it
        was searched."""
        return bool(self.meta.get("finished", False))

    @property
    def hash(self) -> str:
        """SHA-256 of the masks: equal exactly when they are (ranks of a job compare it)."""
        digest = hashlib.sha256()
        for name in sorted(self.masks):
            mask = self.masks[name]
            bits = pack_mask(mask).numpy().tobytes()
            digest.update(f"{name}\0{tuple(mask.shape)}\0".encode() + bits)
        return digest.hexdigest()

    def layer_sparsities(self) -> dict[str, float]:
        """Fraction removed, by layer."""
        return {name: 1 - int(m.sum()) / max(m.numel(), 1) for name, m in self.masks.items()}

    @sole("apply_")
    def apply_(
        self,
        model: nn.Module,
        *example: Any,
        weights: bool = True,
        plan: str = "mask",
        captured: bool = False,
    ) -> nn.Module:
        """Loads the start weights and fixes the masks; returns the model.

        Sparse layers that the ticket does not name become dense.  Everything is checked first:
        after an error the model is what it was.  A SparsityWarning tells of layers and units that keep nothing and
        of frozen layers, the first time that the ticket is applied.

        Args:
            example: the model's inputs of a training step, for plan="auto" to measure with at once.
            weights: False keeps the model's own weights under the masks.
            plan: how layers compute, as `plan_` takes it; "mask": a mask over dense weights, "auto": the
                fastest way.  "block" takes the ticket's own sides where it has some.
            captured: whether "auto" is to measure CUDA graphs, since steps will be some.

        Errors: TicketError for a ticket of another model, ValueError for an unknown plan, a model that another thread
        works with or that was made in inference mode; other errors of `plan_` leave it masked.
        """
        check_plan(plan)
        try:
            layers = require_sparse_layers(model)
        except ValueError as error:
            raise TicketError(str(error)) from None
        own = plain_state(model)
        found = {name: layer.weight_shape for name, layer in layers.items()}
        check_names("sparse layers", self.masks, found, subset=True)
        check_shapes({f"mask of {n}": (m, found[n]) for n, m in self.masks.items()})
        if weights:
            check_names("weights", self.weights, own)
            check_shapes({key: (w, own[key].shape) for key, w in self.weights.items()})
            check_values(own)
            check_castable(self.weights, own)
        require_own_memory(model)
        for name, mask in self.masks.items():
            layers[name]._require_parameter("apply_")
            layers[name].require_one_mask(mask)
        with signals_later():
            for layer in layers.values():
                layer.unplan_()
            if weights:
                state = model.state_dict()  # of dense parameters, which alone can be written to
                with torch.no_grad():
                    for key, value in self.weights.items():
                        state[key].copy_(value)
            for name, layer in layers.items():
                if name in self.masks:
                    layer.set_mask_(self.masks[name])
                else:
                    layer.pattern = Dense()
            if plan != "auto":  # which measures, for seconds
                plan_(model, self._sided(plan), *example, captured=captured)
        tell_applied(self, model, stacklevel=4)
        return plan_(model, plan, *example, captured=captured) if plan == "auto" else model

    def _sided(self, plan: str) -> str:
        """ "block" with the sides that the masks were searched with."""
        sides = str(self.granularity)
        return sides if plan == "block" and sides.startswith("block:") else plan

    @checked
    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with bit-packed masks; then its search's checkpoint is no longer needed and goes.

        Errors: TicketError if it cannot; the checkpoint, and an older file, are as they were.
        """
        tensors = {f"mask/{name}": pack_mask(mask) for name, mask in self.masks.items()}
        tensors |= {f"weight/{key}": value for key, value in self.weights.items()}
        tensors |= {f"score/{name}": score for name, score in (self.scores or {}).items()}
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        meta = {
            "shapes": shapes,
            "layers": list(self.masks),
            "provenance": safefile.finite(self.meta),
        }
        try:
            safefile.write(Path(path), tensors, meta, kind="ticket")
        except (TypeError, ValueError) as error:
            raise TicketError(str(error)) from None
        if self.unsaved is not None:
            self.unsaved.saved(self.masks)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> "Ticket":
        """Reads what `save` wrote; nothing in a file is ever run.

        Errors: TicketError for a missing, foreign, damaged or hostile file.
        """
        path = Path(path)
        try:
            tensors, meta = safefile.read(path, kind="ticket")
        except safefile.FileError as error:
            raise TicketError(str(error)) from None
        try:
            return cls._from_parts(tensors, meta)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TicketError(f"{path}: not a usable ticket: {error}") from None

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> "Ticket":
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "weight": {}, "score": {}}
        for key, value in tensors.items():
            part, slash, name = key.partition("/")
            if not slash or part not in parts:
                raise ValueError(f"expected mask/, weight/ and score/ tensors, got {key!r}")
            parts[part][name] = value
        meta = schema.facts(meta, _Header, "header")
        shapes, provenance = meta["shapes"], meta["provenance"]
        if set(shapes) != set(parts["mask"]) or not shapes:
            raise ValueError("expected provenance and one shape for every mask")
        granularity = parse_granularity(provenance.get("granularity", "weight"))
        packed = parts["mask"]
        names = layer_order(meta)
        masks = {name: unpack_mask(name, packed[name], shapes[name]) for name in names}
        known = [name for name in names if name in parts["score"]]
        parts["score"] = {name: parts["score"][name] for name in known} | parts["score"]
        for name, score in parts["score"].items():
            expected = granularity.units(masks[name].shape)
            if score.shape != expected or score.dtype != torch.float32 or score.isnan().any():
                raise ValueError(
                    f"scores of {name}: expected {tuple(expected)} numbers of float32, got others"
                )
        return cls(masks, parts["weight"], provenance, parts["score"] or None)

    @checked
    def shuffled(self, seed: int) -> "Ticket":
        """Each layer keeps as many units, at random places: the layerwise shuffle control."""
        generator = torch.Generator().manual_seed(seed)
        noise = {
            name: torch.rand(
                self.granularity.units(mask.shape), generator=generator, dtype=torch.float32
            )
            for name, mask in self.masks.items()
        }
        masks = self._reranked(lambda name: noise[name])
        meta = self.meta | {"sanity": "shuffle"}
        return replace(self, masks=masks, scores=None, meta=meta, unsaved=None)

    def inverted(self) -> "Ticket":
        """Each layer keeps as many units, those with the lowest scores.

        Errors: TicketError without scores.
        """
        scores = self.scores
        if scores is None:
            raise TicketError("inverting a ticket needs its scores, this one has none")
        masks = self._reranked(lambda name: -scores[name])
        negated = {name: -score for name, score in scores.items()}
        meta = self.meta | {"sanity": "invert"}
        return replace(self, masks=masks, scores=negated, meta=meta, unsaved=None)

    @checked
    def reinitialised(self, weights: Mapping[str, Tensor]) -> "Ticket":
        """The same masks on other start weights: a fresh model's state_dict.

        Errors: TicketError if the names or shapes are not the ticket's.
        """
        patterns = tuple(f"{name}.pattern.".lstrip(".") for name in self.masks)
        plain = {key: w for key, w in weights.items() if not key.startswith(patterns)}
        check_names("weights", plain, self.weights)
        check_shapes({key: (w, self.weights[key].shape) for key, w in plain.items()})
        fresh = {key: w.detach().cpu().clone() for key, w in plain.items()}
        meta = self.meta | {"sanity": "reinit"}
        return replace(self, weights=fresh, meta=meta, unsaved=None)

    def _reranked(self, ranking: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Masks with the same number of units per layer (per group under N:M), by another ranking."""
        granularity, masks = self.granularity, {}
        for name, mask in self.masks.items():
            units = granularity.gather(mask.long()) > 0
            values = ranking(name)
            if isinstance(granularity, NM):
                allowed = granularity.allowed(values)
                values = torch.where(allowed, values, -torch.inf)
            chosen = top_k(values, int(units.sum()))
            masks[name] = granularity.spread(chosen, mask.shape)
        return masks


class _Header(TypedDict):
    """What a file's JSON says."""

    shapes: dict[str, schema.Shape]
    layers: NotRequired[list[str]]
    provenance: schema.Facts
