"""Plans of whole models: how each masked layer of a ticket computes, what it costs, and why."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import capture, kernels
from .batches import kind_of
from .calls import forward_example
from .claims import sole
from .convert import require_sparse_layers, sparse_layers
from .costs import rounds, stored
from .interrupts import signals_later
from .kernels import Layer
from .layer import SparseLayer, plain_type
from .parts import Part
from .patterns import Masked, Planned
from .planner import SIDES, Cache, Choice, cache_of, choose, order, regime, where
from .ranks import require_one_rank
from .steptime import device_of, step_time, undisturbed
from .telling import SparsityWarning
from .tied import holders

# Kept shares above which a layer stays a mask unless it is measured: indices would cost what they save.
_MOSTLY = 0.6


@dataclass(frozen=True)
class LayerPlan:
    """A row of a model's plan."""

    name: str
    shape: tuple[int, ...]
    kept: int
    choice: Choice

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / max(torch.Size(self.shape).numel(), 1)


@dataclass(frozen=True)
class _Chooser:
    """What a planned layer asks at its first use."""

    cache: str | Path | None
    final: bool  # parameters are what they are: a mask over dense ones is no longer to be had
    captured: bool = False  # steps will be CUDA graphs

    def __call__(self, pattern: Planned, x: Tensor) -> Choice:
        # Nothing in an evaluation says whether training will want dX, so that it is measured as well.
        grad = x.requires_grad or not torch.is_grad_enabled()
        x = x.to(kernels.compute_dtype(x))
        choice = choose(
            pattern.mask,
            pattern.layer,
            x,
            grad=grad,
            captured=self.captured,
            cache=cache_of(self.cache),
        )
        if choice.formats is None and self.final:
            reason = f"{choice.reason}; an example that calls this layer, given to plan_, would have kept the mask"
            return replace(choice, formats=(kernels.FLOOR,) * 3, reason=reason)
        return choice


@sole("plan_")
def plan_(
    model: nn.Module,
    plan: str = "auto",
    *example: Any,
    captured: bool = False,
    cache: str | Path | None = None,
) -> nn.Module:
    """Makes the masked layers of a model compute by a plan; returns the model.

    Parameters become the vectors of kept weights (the objects stay), so make the optimiser afterwards: with
    `decay_groups`, since rules that look for matrices (`p.ndim >= 2` decays, Muon) find none there; plan="mask" keeps
    them.  A weight that several layers share stays under its mask, and layers that no format multiplies for (beside
    nn.Linear and nn.Conv2d) keep a mask under "auto", or their kept weights alone under "state".

    Args:
        plan: "auto" measures each layer; "mask" is a mask over dense weights; a format ("state", "csr",
            "compact", "block:64x64") is used for all, "block" with the sides that store least.  A named
            format never falls back.
        example: the model's inputs of a training step, one by one or a batch's dict of keywords, on its device and
            in its precision: "auto" then measures now.  Without them it does at each layer's first use.
        captured: whether training steps will be CUDA graphs.  "auto" then weighs what kernels take, else
            also what the host takes to launch them, which on a GPU is often more.
        cache: file of remembered choices; see `planner.cache_of`.

    Errors: ValueError for an unknown plan, a layer that a named format cannot take, a weight that several modules
    share under a named format, several ranks, a model that another thread works with or that was made in inference
    mode; nothing changes then, nor after an example that the model refuses.
    """
    found = require_sparse_layers(model)
    check_plan(plan)
    if example and not any(isinstance(t, Tensor) for t in tree_leaves(example)):
        raise ValueError(
            f"plan_: expected the model's inputs of a training step, tensors, got {kind_of(example[0])}"
        )
    if plan != "mask":
        require_one_rank("plan_", "use plan='mask'")
    layers = {name: layer for name, layer in found.items() if mask_of(layer) is not None}
    if plan == "mask":
        with signals_later():
            for layer in layers.values():
                layer.unplan_()
        return model
    shared = _shared(model, layers)
    formats = {name: _named(plan, layer, shared.get(name)) for name, layer in layers.items()}
    before = {layer: layer.pattern for layer in layers.values()}
    try:
        for name, layer in layers.items():
            if formats[name] is None and name in shared:
                _masked_(layer, Choice(None, f"its weight is that of {shared[name]} as well"))
            elif formats[name] is None:
                _open_(layer, cache, measured=bool(example), captured=captured)
            else:
                layer.plan_(formats[name])
        if plan == "auto" and example:
            _measure(model, example, captured, cache_of(cache))
    except BaseException:
        with signals_later():
            for layer, pattern in before.items():
                if layer.pattern is not pattern:
                    weight = layer.effective_weight.detach()
                    kept = pattern.kept(weight) if isinstance(pattern, Planned) else weight
                    layer._become(pattern, kept)
        raise
    if any(isinstance(layer.pattern, Planned) for layer in layers.values()):
        _tell_of_shapes()
    return model


@once
def _tell_of_shapes() -> None:
    """Once: rules that look for matrices find vectors, and say nothing."""
    warn(
        "plan_: a planned layer's parameter is the vector of its kept weights, so that rules that look for matrices "
        "(decay where p.ndim >= 2, Muon) find none: take sparsecore.decay_groups(model, weight_decay), or plan='mask', "
        "which keeps matrices; told once",
        SparsityWarning,
        stacklevel=4,
    )


def check_plan(plan: str) -> None:
    """Errors: ValueError for what is no plan at all."""
    if plan not in ("auto", "mask", "block") and not kernels.is_format(plan):
        raise ValueError(
            f"plan: expected auto, mask, {', '.join(kernels.FORMATS)} (with sides as block:64x64), "
            f"got {plan!r}"
        )


def _open_(layer: SparseLayer, cache: str | Path | None, *, measured: bool, captured: bool) -> None:
    """A layer that is to choose by itself, unless its mask says enough."""
    mask = mask_of(layer)
    assert mask is not None
    share = int(mask.sum()) / max(mask.numel(), 1)  # exact: a mean in float32 rounds to 1
    if share == 1:
        _apply_(layer, Choice((kernels.FLOOR,) * 3, "nothing is pruned: as a dense layer"))
    elif not layer.multiplies:
        _masked_(
            layer,
            Choice(
                None,
                f"no format multiplies for {_kind(layer)}; 'state' keeps only its kept weights",
            ),
        )
    elif share > _MOSTLY and not measured:
        _masked_(layer, Choice(None, f"{share:.0%} is kept: indices would cost what they save"))
    else:
        layer.plan_(None, _Chooser(cache, final=not measured, captured=captured))


def _kind(layer: SparseLayer) -> str:
    """What kind of layer it is, in PyTorch's words; of a part its whole's."""
    plain = plain_type(type(layer)).__name__
    return type(layer.whole).__name__.removeprefix("Sparse") if isinstance(layer, Part) else plain


def _masked_(layer: SparseLayer, choice: Choice) -> None:
    """A mask over a dense weight, and why."""
    pattern = layer.unplan_().pattern.train(layer.training)
    assert isinstance(pattern, Masked)
    pattern.choice = choice


def mask_of(layer: SparseLayer) -> Tensor | None:
    pattern = layer.pattern
    return pattern.mask if isinstance(pattern, Masked | Planned) else None


def _shared(model: nn.Module, layers: Mapping[str, SparseLayer]) -> dict[str, str]:
    """Other places of layers' weights, in words."""
    places, found = holders(model), {}
    for name, layer in layers.items():
        held = places[id(layer.raw_weight)]
        if len(held) > 1:
            found[name] = ", ".join(held)
    return found


def _named(plan: str, layer: SparseLayer, shared: str | None) -> str | None:
    """The format of a layer under a named plan; None under "auto"."""
    if plan == "auto":
        return None
    if shared is not None:
        raise ValueError(
            f"plan {plan!r}: expected weights of one layer each, got one shared by {shared}; "
            "give each its own, or use 'auto' or 'mask'"
        )
    if not layer.multiplies and plan != "state":
        raise ValueError(
            f"plan {plan!r}: no format multiplies for {_kind(layer)}; use 'auto' or 'state'"
        )
    if isinstance(layer, nn.Embedding) and layer.sparse:
        raise ValueError(
            f"plan {plan!r}: expected an embedding with dense gradients, got sparse=True; use 'mask' or 'auto'"
        )
    if not layer.multiplies:
        return plan
    mask = mask_of(layer)
    assert mask is not None
    if plan == "block":
        h, w = min(SIDES, key=lambda side: stored(mask, *side))
        plan = f"block:{h}x{w}"
    of = Layer(tuple(layer.weight_shape), *layer._slide().values())
    reason = kernels.obstacle(plan, mask.device, of, layer.raw_weight.dtype)
    if reason is not None:
        raise ValueError(f"plan {plan!r}: {reason}; use 'auto' or 'state'")
    return plan


def _measure(model: nn.Module, example: Sequence[Any], captured: bool, cache: Cache) -> None:
    """Lets each layer choose in one training forward, then holds the whole step against a mask everywhere.

    What layers hand each other is seen only there: strides that a neighbour has to copy, gradients that one
    call makes together.  Random state, modes and buffers are
    put back; gradients of planned layers are dropped.
    """
    layers: dict[str, SparseLayer] = {}
    choices: dict[str, Choice] = {}
    captured = captured and capture.possible_on(device_of(model))
    how = regime(device_of(model), captured)
    with undisturbed(model):
        forward_example(model, example)
        for name, layer in sparse_layers(model).items():
            if isinstance(layer.pattern, Planned) and layer.pattern.choice is not None:
                layers[name], choices[name] = layer, layer.pattern.choice
        if not any(choice.measured for choice in choices.values()):
            return
        ways = {
            "as measured": choices,
            "row-major": {
                n: c if layers[n].weight_shape[2:] else replace(c, formats=_plain(c.formats))
                for n, c in choices.items()
            },
            "mask": {n: replace(c, formats=None) for n, c in choices.items()},
        }
        if ways["row-major"] == choices:
            del ways["row-major"]

        def make() -> dict[str, float]:
            times = dict.fromkeys(ways, math.inf)
            for patience in (2.0, 4.0):
                for _ in rounds(patience):
                    for way, made in ways.items():
                        now = _step_time(model, example, layers, made, captured)
                        times[way] = min(times[way], now)
                if times["as measured"] == min(times.values()):
                    break  # else the step denies what the layers say, which wants a longer look
            return times

        def read(entry: Any) -> dict[str, float]:
            return {way: float(entry[way]) for way in ways}

        given = [t for t in tree_leaves(example) if isinstance(t, Tensor)]
        shapes = [(list(t.shape), order(t)) for t in given]
        facts = [(n, layers[n].weight_shape, c.formats, c.reason) for n, c in choices.items()]
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        times = cache.get(
            f"step | {where(device_of(model))} | {how} | {shapes} | {digest}", make, read
        )
    for layer in sparse_layers(model).values():
        pattern = layer.pattern
        if isinstance(pattern, Planned) and isinstance(pattern.choose, _Chooser):
            # The example does not call it: by its first use there may be an optimiser.
            pattern.choose = replace(pattern.choose, final=True)
    way = min(ways, key=times.__getitem__)
    told = ", ".join(f"{way} {time:.3g}" for way, time in times.items())
    step = f"as a whole step {how}".strip()
    for name, layer in layers.items():
        choice = ways[way][name]
        if choice.formats != choices[name].formats:
            choice = replace(choice, reason=f"{way}: {step}, ms: {told}; alone {choice.reason}")
        _apply_(layer, choice)


def _plain(formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The formats without those that turn activations."""
    major = {name for name, format in kernels.FORMATS.items() if format.feature_major}
    turns = formats is not None and any(f.partition(":")[0] in major for f in formats)
    return (kernels.FLOOR,) * 3 if turns else formats


def _apply_(layer: SparseLayer, choice: Choice) -> None:
    if choice.formats is None:
        _masked_(layer, choice)
        return
    layer.plan_(choice.formats)
    pattern = layer.pattern
    assert isinstance(pattern, Planned)
    pattern.choice = choice


def _step_time(
    model: nn.Module,
    example: Sequence[Any],
    layers: Mapping[str, SparseLayer],
    choices: Mapping[str, Choice],
    captured: bool,
) -> float:
    """Milliseconds of a training step under these choices."""
    for name, layer in layers.items():
        _apply_(layer, choices[name])
    kinds = ("dense" if choices[name].formats is None else "kept" for name in layers)
    update = sum(choices[n].update.get(k, 0.0) for n, k in zip(layers, kinds, strict=True))
    return step_time(model, example, update, captured=captured)


def report(model: nn.Module) -> list[LayerPlan]:
    """What each masked layer of a planned model does, and why."""
    rows = []
    for name, layer in sparse_layers(model).items():
        pattern = layer.pattern
        if not isinstance(pattern, Masked | Planned):
            continue
        choice = pattern.choice
        if choice is None:
            formats = pattern.formats if isinstance(pattern, Planned) else None
            waits = isinstance(pattern, Planned) and formats is None
            reason = "to be measured at its first use" if waits else "asked for"
            choice = Choice((formats,) * 3 if isinstance(formats, str) else formats, reason)
        mask = pattern.mask
        rows.append(LayerPlan(name, tuple(mask.shape), int(mask.sum()), choice))
    return rows
