"""gated_linear and gated_conv2d: y = x @ (exp(log_gain) * W * z).T + bias by one of several strategies.

materialise  the gated weight is written once (K1), the vendor's library multiplies, K2 takes its gradient;
epilogue     so forward, but K2 is the end of the product that makes the gradient, which is never written;
fused        each weight tile is sampled inside the product: linear layers of few tokens;
block        one gate a block or channel, and closed ones are skipped forward and backward.

All draw the same mask.  "auto" measures what applies, once for each shape, and `choice` says why.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ..blocks.lists import SIDES
from ..dsl import MISSING, triton
from ..gates.weight import gated_weight
from ..reference import CONCRETE, GateSpec
from ..units import Unit
from .blocks import block_gated_conv2d, block_gated_linear
from .epilogue import epilogue_gated
from .fused import TOKENS, fused_gated_linear, in_compute_dtype

IMPLS = ("materialise", "epilogue", "fused", "block")
_WORTH = 0.95  # another strategy must take less than this share of materialise's time


class Choice(NamedTuple):
    """A strategy, why, and the milliseconds (forward and backward) of those that were measured."""

    impl: str
    reason: str
    times: dict[str, float]


_measured: dict[tuple, Choice] = {}


def gated_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "n k"],
    logits: Float[Tensor, "..."],
    bias: Float[Tensor, " n"] | None = None,
    *,
    gate: GateSpec,
    unit: Unit = Unit(),  # noqa: B008  a value
    seed: Int64[Tensor, "1"],
    step: Int64[Tensor, "1"],
    layer: int,
    log_gain: Float[Tensor, ""] | None = None,
    copy: Float[Tensor, "n k"] | None = None,
    impl: str = "auto",
    captured: bool = False,
) -> Float[Tensor, "*batch n"]:
    """x @ (exp(log_gain) * weight * z).T + bias, z ~ gate(logits) at the address (seed, step, layer).

    Computes in x's dtype, under autocast in autocast's, with float32 sums; differentiable in x, weight,
    logits, bias and log_gain (twice with impl="materialise" alone).

    Args:
        logits: float32, `unit_shape(weight.shape, unit)`.
        copy: of the weight, in a lower precision.  "fused" reads it in the weight's place if it has the dtype
            that is computed in and the weight does not train: fewer bytes, for one more rounding.
        impl: "auto" chooses by measurement (`choice` tells what and why); a name never falls back.
        captured: "auto" measures CUDA graphs, as the step is to become one: kernels without their launches.

    Errors: ValueError for an unknown impl, one that cannot do this, or shapes that do not fit.
    """
    call = _Call(gate, unit, seed, step, layer, log_gain, copy=copy, captured=captured)
    return _apply(call, impl, x, weight, logits, bias)


def gated_conv2d(
    x: Float[Tensor, "b k h w"],
    weight: Float[Tensor, "n k/groups r s"],
    logits: Float[Tensor, "..."],
    bias: Float[Tensor, " n"] | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    gate: GateSpec,
    unit: Unit = Unit(),  # noqa: B008  a value
    seed: Int64[Tensor, "1"],
    step: Int64[Tensor, "1"],
    layer: int,
    log_gain: Float[Tensor, ""] | None = None,
    impl: str = "auto",
    captured: bool = False,
) -> Float[Tensor, "b n oh ow"]:
    """`gated_linear` as a convolution with zero padding; channels-last is the fast layout."""
    slide = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    call = _Call(gate, unit, seed, step, layer, log_gain, slide, captured=captured)
    return _apply(call, impl, x, weight, logits, bias)


class _Call(NamedTuple):
    """Everything but the tensors that a gradient may flow through, log_gain aside."""

    gate: GateSpec
    unit: Unit
    seed: Tensor
    step: Tensor
    layer: int
    log_gain: Tensor | None
    slide: dict[str, Any] | None = None  # a convolution's
    copy: Tensor | None = None  # of a weight that does not train
    captured: bool = False

    def run(
        self, impl: str, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None
    ) -> Tensor:
        address = {"gate": self.gate, "seed": self.seed, "step": self.step, "layer": self.layer}
        if impl == "materialise":
            kind = x.device.type
            autocast = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
            w = gated_weight(weight, logits, self.log_gain, unit=self.unit, dtype=dtype, **address)
            if self.slide is None:
                return F.linear(x, w, None if bias is None else bias.to(dtype))
            return F.conv2d(x, w, None if bias is None else bias.to(dtype), **self.slide)
        if impl == "epilogue":
            slide = None
            if self.slide is not None:
                slide = tuple(_pair(self.slide[n]) for n in ("stride", "padding", "dilation"))
            return epilogue_gated(x, weight, logits, bias, self.log_gain, slide=slide, **address)
        gain = None if self.log_gain is None else self.log_gain.exp()
        if impl == "fused":
            x, copy = in_compute_dtype(x), self.copy
            if copy is not None and copy.dtype == x.dtype and not weight.requires_grad:
                weight = copy
            return fused_gated_linear(x, weight, logits, bias, gain=gain, **address)
        address["unit"] = self.unit
        if self.slide is None:
            return block_gated_linear(x, weight, logits, bias, gain=gain, **address)
        return block_gated_conv2d(x, weight, logits, bias, gain=gain, **self.slide, **address)


def _apply(
    call: _Call, impl: str, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None
) -> Tensor:
    if impl == "auto":
        impl = _choose(call, x, weight, logits, bias).impl
    elif impl not in IMPLS:
        raise ValueError(f"impl: expected auto, {', '.join(IMPLS)}, got {impl!r}")
    elif (obstacle := _obstacle(call, impl, x)) is not None:
        raise ValueError(f"impl={impl!r}: {obstacle}; use another one, or 'auto'")
    return call.run(impl, x, weight, logits, bias)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _obstacle(call: _Call, impl: str, x: Tensor) -> str | None:
    """Why a strategy cannot do this at all."""
    unit = call.unit
    if impl != "materialise" and x.is_cuda and MISSING is not None:
        return f"it {MISSING}"
    if impl != "materialise" and call.slide is not None and call.slide["groups"] != 1:
        return f"it takes one group, got {call.slide['groups']}"
    if impl in ("epilogue", "fused") and (unit.keep or not unit.single):
        return f"it takes one free gate for each weight, got {unit}"
    rows = math.prod(x.shape[:-1])
    if impl == "fused" and (call.slide is not None or rows > TOKENS):
        got = rows if call.slide is None else "a convolution"
        return f"it takes a linear layer and at most {TOKENS} rows of x, got {got}"
    if impl == "block" and not (unit.w == 0 or (unit.h in SIDES and unit.w in SIDES)):
        return f"it takes blocks with sides among {SIDES} or channels, got {unit}"
    return None


def choice(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None = None, **options: Any
) -> Choice:
    """What impl="auto" does with these arguments of `gated_linear` or (4-d weights) `gated_conv2d`."""
    names = ("stride", "padding", "dilation", "groups")
    slide = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    slide |= {name: options[name] for name in names if name in options}
    call = _Call(
        options["gate"], options.get("unit", Unit()), options["seed"], options["step"],
        options["layer"], options.get("log_gain"), slide if weight.ndim == 4 else None,
        options.get("copy"), options.get("captured", False),
    )  # fmt: skip
    return _choose(call, x, weight, logits, bias)


def _choose(call: _Call, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None) -> Choice:
    if not x.is_cuda or MISSING is not None:
        reason = f"the other strategies' kernels need {'a GPU' if not x.is_cuda else 'Triton'}"
        return Choice("materialise", reason, {})
    others = [impl for impl in IMPLS[1:] if _obstacle(call, impl, x) is None]
    if call.gate.kind == CONCRETE and "block" in others:
        others.remove("block")  # its gates never close: there is nothing to skip
    if not others:
        return Choice("materialise", f"no other strategy takes {call.unit} here", {})
    slide = None if call.slide is None else tuple(map(str, call.slide.values()))
    key = (
        x.device, tuple(x.shape), x.dtype, tuple(weight.shape), weight.dtype, weight.requires_grad,
        x.requires_grad, call.gate, call.unit, slide, torch.is_autocast_enabled("cuda"),
        None if call.copy is None else call.copy.dtype, call.captured,
    )  # fmt: skip
    if key in _measured:
        return _measured[key]
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return Choice("materialise", "not measured before a graph was made of it", {})
    times = {impl: _time(call, impl, x, weight, logits, bias) for impl in ("materialise", *others)}
    best = min(times, key=lambda impl: times[impl])
    if times[best] > _WORTH * times["materialise"]:
        best = "materialise"
    told = ", ".join(f"{impl} {ms:.3f} ms" for impl, ms in times.items())
    how = " as CUDA graphs" if call.captured else ""
    _measured[key] = Choice(best, f"measured forward and backward{how}: {told}", times)
    return _measured[key]


def _time(
    call: _Call, impl: str, x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None
) -> float:
    """Milliseconds of a forward and a backward; the arguments and their gradients stay as they are."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().requires_grad_(t.requires_grad)

    inputs = [leaf(t) for t in (x, weight, logits, bias)]
    call = call._replace(log_gain=leaf(call.log_gain))
    wanted = [t for t in (*inputs, call.log_gain) if t is not None and t.requires_grad]

    def run() -> None:
        with torch.enable_grad():
            y = call.run(impl, *inputs)  # pyright: ignore[reportArgumentType]
            if wanted:
                torch.autograd.grad(y, wanted, torch.ones_like(y))

    if call.captured:
        as_graph: Callable[..., Any] = triton.testing.do_bench_cudagraph
        try:
            return float(as_graph(run, rep=40, return_mode="median"))
        finally:
            torch.clear_autocast_cache()  # what the graph has cast is gone with it
    bench: Callable[..., Any] = triton.testing.do_bench
    return float(bench(run, warmup=10, rep=40, return_mode="median"))


def forget() -> None:
    """Measures anew from here on: a structured search gets sparser, and then other strategies win."""
    _measured.clear()
