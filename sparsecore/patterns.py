"""How one layer's weight is sparse now.  A pattern turns the layer's parameter into the weight it computes with."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from typing_extensions import Self

from . import kernels
from .batches import kind_of
from .gated_product import gated_weight
from .gates import AbstractGate
from .granularity import Granularity, Weight
from .kinds import checked
from .masked_product import Bits, MaskedWeight
from .process import leaving_trainable, torch_that_trains
from .zeros import Keeper

Formats = str | tuple[str, ...]  # of all products, or of forward, dX and dW


class Dense(nn.Module):
    """The parameter itself."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Masked(nn.Module):
    """A mask over a dense weight; it travels in the state_dict as `<layer>.pattern.mask`.

    decided: whether the parameter's own pruned places are zero, and are kept so (`SparseLayer.set_mask_`); a search
    that looks through a mask for a while leaves the parameter as it is.
    """

    choice: Any = None  # why a plan left it so
    decided: bool = False
    keeper: Keeper | None = None

    def __init__(self, mask: Bool[Tensor, "n k *taps"]) -> None:
        super().__init__()
        with torch_that_trains():
            mask = mask.clone() if isinstance(mask, Tensor) and mask.is_inference() else mask
        plain = isinstance(mask, Tensor) and mask.layout == torch.strided
        if not plain or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {kind_of(mask)}; use `scores > 0`")
        self.register_buffer("mask", mask)
        self._bits = Bits()

    @property
    def mask(self) -> Tensor:
        """bool, the weight's shape; a buffer, but found without nn.Module's search, in every forward."""
        try:
            return self._buffers["mask"]  # pyright: ignore
        except KeyError:
            raise AttributeError("mask") from None

    def forward(self, weight: Tensor) -> Tensor:
        if weight.shape != self.mask.shape:
            raise ValueError(
                f"masked layer: expected a weight of the mask's shape {tuple(self.mask.shape)}, got "
                f"{tuple(weight.shape)}; call densify_(model) before layers are resized, then search or apply anew"
            )
        # Tracers and torch.func's transforms know no functions of Python's.
        if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return torch.where(self.mask, weight, 0)
        keeper = None if torch.compiler.is_compiling() else self.keeper
        return MaskedWeight.apply(weight, self.mask, self._bits.of(self.mask, weight), keeper)

    def extra_repr(self) -> str:
        return f"sparsity={1 - self.mask.float().mean().item():.4f}"

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        pass  # the layer reads the mask, or keeps its own where a file is dense


class Planned(nn.Module):
    """A decided mask whose layer's parameter is the vector of kept weights, in row-major order of the mask.

    Pruned weights do not exist, so no optimiser can bring them back and none holds state for them.  The
    layer multiplies by `kernels.sparse_layer` in `formats`.  In a state_dict the layer looks as under
    `Masked`: a dense `weight` and `pattern.mask`.

    Args:
        mask: bool [n, k, *taps].
        formats: one format, or three for forward, dX and dW; None: `choose` is asked at the first use.
        slide, groups: of a convolution, as `kernels.plan_of` takes them.
        channels_last: whether the dense weight lies so, where it is asked for.
        multiplies: whether `multiply` will be asked; a layer of another kind computes with the dense weight
            (`forward`), which is what "state" does.
        choose: f(pattern, x) -> a choice with `formats` (None for the floor), which may measure.

    Errors: those of `kernels.plan_of`, for formats that cannot do this.
    """

    @leaving_trainable
    @checked
    def __init__(
        self,
        mask: Bool[Tensor, "n k *taps"],
        formats: Formats | None = None,
        *,
        slide: Sequence[int] = (),
        groups: int = 1,
        choose: "Callable[[Planned, Tensor], Any] | None" = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        multiplies: bool = True,
    ) -> None:
        super().__init__()
        self.channels_last, self.multiplies = channels_last, multiplies
        self.index = kernels.kept_index(
            mask if multiplies else mask.flatten(1)
        )  # no buffer: averaging or casting it would break it
        self.layer = kernels.Layer(tuple(mask.shape), tuple(slide), groups)
        self.formats, self.choose = formats, choose
        self.choice: Any = None  # what `choose` said, with its reason
        self._plans: dict[torch.dtype, kernels.Plan] = {}
        self._parts: dict[tuple[torch.dtype, tuple[int, ...]], list[kernels.Plan]] = {}
        if multiplies:
            self._prepare(dtype)

    @property
    def mask(self) -> Bool[Tensor, "n k *taps"]:
        mask = torch.zeros(math.prod(self.layer.shape), dtype=torch.bool, device=self.index.device)
        mask[self.index.long()] = True
        return self._laid_out(mask.view(self.layer.shape))

    def _laid_out(self, dense: Tensor) -> Tensor:
        return dense.contiguous(memory_format=torch.channels_last) if self.channels_last else dense

    def on(self, mask: Bool[Tensor, "n k *taps"]) -> "Planned":
        """The same formats for another mask of the same shape; nothing is measured anew."""
        layer = self.layer
        dtype = next(iter(self._plans), torch.float32)
        return Planned(
            mask,
            self.formats,
            slide=layer.slide,
            groups=layer.groups,
            choose=self.choose,
            dtype=dtype,
            channels_last=self.channels_last,
            multiplies=self.multiplies,
        )

    def kept(self, dense: Tensor) -> Float[Tensor, " nnz"]:
        """The kept entries of a dense tensor of the weight's shape."""
        return dense.reshape(-1).index_select(0, self.index.to(dense.device))

    def forward(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, "n k *taps"]:
        """The dense weight, for code that takes it out of the layer."""
        flat = values.new_zeros(math.prod(self.layer.shape))
        return self._laid_out(flat.scatter(0, self.index.long(), values).view(self.layer.shape))

    def multiply(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes.  Errors: ValueError for a weight that another tool has put in the vector's place."""
        if values.ndim != 1:
            raise ValueError(
                f"planned layer: expected the vector of its kept weights, got a parameter {tuple(values.shape)}; "
                "tools that put a state_dict's weights into parameters (offloading) want plan_(model, 'mask')"
            )
        return kernels.sparse_layer(x, values, bias, self.plan(x))

    def plan(self, x: Tensor) -> kernels.Plan:
        """The plan for an input; a new compute dtype prepares one, and an open choice is made."""
        dtype = kernels.compute_dtype(x)
        # Nothing can be prepared inside a graph, and all plans compute alike.
        if torch.compiler.is_compiling():
            return self._plans.get(dtype) or next(iter(self._plans.values()))
        if self.formats is None and self.choose is not None and x.numel():
            if torch.jit.is_tracing():
                raise TypeError(
                    "torch.jit.trace: expected formats that are chosen, got plan='auto' before its first use; run the "
                    "model once on such an input, then trace"
                )
            self.choice = self.choose(self, x)
            self.formats = self.choice.formats or kernels.FLOOR
            self._plans.clear()
            self._parts.clear()
        return self._plans.get(dtype) or self._prepare(dtype)

    def split(self, sizes: Sequence[int], x: Tensor) -> list[kernels.Plan] | None:
        """Plans of so many rows each, for parts that have an input each, like x; values split as rows do.

        None inside a graph if they are not prepared: the dense weight computes alike.
        """
        key = kernels.compute_dtype(x), tuple(sizes)
        if not torch.compiler.is_compiling():
            formats = self.plan(x).formats  # an open choice is made for the whole
            if key not in self._parts:
                masks = self.mask.split(list(sizes))
                self._parts[key] = [kernels.plan_of(m, formats, dtype=key[0]) for m in masks]
        return self._parts.get(key)

    def _prepare(self, dtype: torch.dtype) -> kernels.Plan:
        plan = kernels.plan_of(
            self.mask,
            self.formats or kernels.FLOOR,
            dtype=dtype,
            slide=self.layer.slide,
            groups=self.layer.groups,
        )
        self._plans[dtype] = plan
        return plan

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # Its values move even where parameters get new ones (`to_empty`), and stay where those have none.
        device = fn(self.index[:0]).device
        index = self.index if device.type == "meta" else self.index.to(device)
        if index.device != self.index.device:
            if self.choose is not None:
                self.formats = self.choice = None  # what was measured there says nothing here
            self.index = index
            dtypes = list(self._plans)
            self._plans, self._parts = {}, {}
            for dtype in dtypes[:1]:
                self._prepare(dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Plans are made again from the index.
        return self.__dict__ | {"_plans": list(self._plans), "_parts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtypes, index = state["_plans"], state["index"]
        size = math.prod(state["layer"].shape)
        ascending = len(index) < 2 or bool((index.diff() > 0).all())
        if not ascending or (len(index) and not 0 <= int(index[0]) <= int(index[-1]) < size):
            raise ValueError(
                f"planned layer: expected ascending places of kept weights below {size}, got others; "
                "the file is damaged, load its state_dict into a fresh model instead"
            )
        super().__setstate__(state | {"_plans": {}})
        for dtype in dtypes:
            self._prepare(dtype)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        pass  # the layer reads `pattern.mask` and its weight together

    def extra_repr(self) -> str:
        formats = "not chosen yet" if self.formats is None else self.formats
        return f"{formats}, sparsity={1 - len(self.index) / math.prod(self.layer.shape):.4f}"


class Gated(nn.Module):
    """A gate per unit with trainable logits; samples in training mode, uses the gate's mean in evaluation.

    The sample is a function of (seed, step, layer), so recomputing a forward (activation
    checkpointing) draws the same mask; `advance_(model)` moves on to the next draw.

    Args:
        shape: the weight's shape [n, k, *taps].
        density: initial expected share of kept units, 0 < density < 1.
        seed, layer: with the step, the address of this layer's noise; equal addresses draw equal noise.
        impl: how the layer computes (`kernels.gated_linear`): "auto", "materialise", "epilogue", "fused" or
            "block".
        gain: whether one trainable scale of the whole layer, exp(log_gain), makes up for what the
            gates remove.  Only a search over frozen weights needs it.

    Errors: ValueError for a density out of range.
    """

    seed: Int64[Tensor, "1"]
    step: Int64[Tensor, "1"]

    @leaving_trainable
    @checked
    def __init__(
        self,
        shape: torch.Size,
        gate: AbstractGate,
        granularity: Granularity | None = None,
        *,
        density: float,
        seed: int = 0,
        layer: int = 0,
        gain: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.granularity = granularity or Weight()
        self.layer, self.impl = layer, impl
        self.open = False  # while True the layer computes with its dense weight
        self.captured = False  # whether its step is a CUDA graph, which "auto" then measures
        # A search that draws all layers at once puts here what it drew, and the dense weight as it wants it.
        self.drawn: Tensor | None = None
        self.dense: Tensor | None = None
        units = self.granularity.units(shape)
        self.logits = nn.Parameter(
            torch.full(units, gate.init(density), device=device, dtype=torch.float32)
        )
        self.log_gain = (
            nn.Parameter(torch.zeros((), device=device, dtype=torch.float32)) if gain else None
        )
        self.register_buffer("seed", torch.tensor([seed], dtype=torch.int64, device=device))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        if self.open:
            return weight if self.dense is None else self.dense
        if self.drawn is not None:
            return self.drawn
        if weight.is_cuda and self.samples:
            return kernels.gated_weight(weight, self.logits, self.log_gain, **self.address())
        gain = None if self.log_gain is None else self.log_gain.exp()
        if not self.training:
            z = self.granularity.project(self.gate.mean(self.logits))
            return self.granularity.apply(weight, z if gain is None else z * gain)
        noise = torch.empty_like(self.logits, requires_grad=False)
        if not self.gate.deterministic:
            kernels.uniform_(noise, self.seed, self.step, self.layer)
        return gated_weight(weight, self.logits, noise, self.gate, self.granularity, gain)

    @property
    def samples(self) -> bool:
        """Whether the layer draws a mask of its own now, from a gate that kernels know."""
        drawn = self.open or self.drawn is not None
        return self.training and not drawn and self.gate.spec is not None

    def address(self) -> dict[str, Any]:
        """What kernels take to draw this layer's mask."""
        unit = self.granularity.unit
        address = {"seed": self.seed, "step": self.step, "layer": self.layer}
        return {"gate": self.gate.spec, "unit": unit} | address

    def extra_repr(self) -> str:
        return f"{self.gate}, granularity={self.granularity}, layer={self.layer}"


PATTERNS = (Dense, Gated, Masked, Planned)
