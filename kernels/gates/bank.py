"""All gates of a search and what a step changes in them, on the device: three launches a step.

`sample_` (K1) draws every layer's gated weight, `backward_` (K2) turns dR/dw_eff into dR/dlogits where
it lies, `step_` (K2b) balances and moves the logits.  Nothing synchronises with the host, and addresses
stay put, so that a step can be captured as a CUDA graph.  On the CPU the same steps are plain PyTorch,
and small layers lie side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import PLAIN, gpu_kernel
from ..dsl import MISSING
from ..reference import GateSpec, density_ref, density_slope_ref
from ..units import Unit, unit_shape
from .balance import Rule, launch_balanced_step
from .bank_ref import balanced_step_ref_, gates_backward_ref_, sample_gates_ref_, sizes_of
from .joined import Held, join, runs
from .launch import launch_backward, launch_sample
from .segments import (
    FIRST_CHUNK,
    Geometry,
    Hints,
    Segments,
    is_channels_last,
    is_dense,
    laid_out_as,
    offsets_of,
    plan,
)


def launch_sample_gates(
    out: list[Tensor], q: list[Tensor], log_gain: Tensor, step: Tensor, control: Tensor,
    weights: list[Tensor], logits: list[Tensor], seeds: Tensor, plan: list[Tensor],
    layers: list[int], gate: list[float], unit: list[int], hints: list[int], fast: bool,
    trained: bool,
) -> None:  # fmt: skip
    """K1 for all layers."""
    launch_sample(
        Segments(*plan, Hints(bool(hints[0]), hints[1])), GateSpec.of(gate), Unit(*unit),
        weight=weights[0], logits=logits[0],
        out=out[0], q=q[0] if q else None, log_gain=log_gain if log_gain.numel() else None,
        seed=seeds, step=step, control=control, fast=fast,
    )  # fmt: skip


def launch_gates_backward(
    grads: list[Tensor], ds: list[Tensor], pulls: list[Tensor], partials: Tensor,
    grad_offsets: Tensor, weights: list[Tensor], logits: list[Tensor], out: list[Tensor],
    q: list[Tensor],
    log_gain: Tensor, seeds: Tensor, step: Tensor, plan: list[Tensor], layers: list[int],
    gate: list[float], unit: list[int], hints: list[int], fast: bool,
    trained: bool,
) -> None:  # fmt: skip
    """K2 for all layers."""
    launch_backward(
        Segments(*plan, Hints(bool(hints[0]), hints[1])), GateSpec.of(gate), Unit(*unit), grad=grads[0],
        grad_offsets=grad_offsets, weight=weights[0], logits=logits[0], out=out[0],
        q=q[0] if q else None, log_gain=log_gain[1] if log_gain.numel() else None, seed=seeds,
        step=step[1:], ds=ds[0] if ds else grads[0], dw=out[0] if trained else None,
        partials=partials, multi=True, fast=fast,
    )  # fmt: skip


def launch_bank_step(
    logits: list[Tensor], m: list[Tensor], v: list[Tensor], log_gain: Tensor, step: Tensor,
    control: Tensor, grads: list[Tensor], pulls: list[Tensor], grad_offsets: Tensor,
    partials: Tensor, targets: Tensor, lr: Tensor, plan: list[Tensor], gate: list[float],
    unit: list[int], rule: list[float], hints: list[int], fast: bool,
) -> None:  # fmt: skip
    """K2b for all layers."""
    launch_balanced_step(
        Segments(*plan, Hints(bool(hints[0]), hints[1])), GateSpec.of(gate), Unit(*unit), Rule(*rule), logits=logits[0],
        grad=grads[0], grad_offsets=grad_offsets, m=m[0], v=v[0],
        log_gain=log_gain if log_gain.numel() else None, partials=partials, step=step,
        control=control, targets=targets, lr=lr, fast=fast,
    )  # fmt: skip


_sample = torch.library.custom_op(
    "sparsecore::sample_gates_", sample_gates_ref_, device_types=PLAIN,
    mutates_args=("out", "q", "log_gain", "step", "control"),
)  # fmt: skip
_backward = torch.library.custom_op(
    "sparsecore::gates_backward_", gates_backward_ref_, device_types=PLAIN,
    mutates_args=("grads", "ds", "pulls", "partials", "out"),
)  # fmt: skip
_step = torch.library.custom_op(
    "sparsecore::balanced_step_", balanced_step_ref_, device_types=PLAIN,
    mutates_args=("logits", "m", "v", "log_gain", "step", "control"),
)  # fmt: skip
for _operator, _launch in (
    (_sample, launch_sample_gates),
    (_backward, launch_gates_backward),
    (_step, launch_bank_step),
):
    gpu_kernel(_operator)(_launch)
    _operator.register_fake(lambda *args, **kwargs: None)


def plain_on(device: torch.device) -> bool:
    """Whether a bank's steps there are plain PyTorch."""
    return device.type == "cpu" or MISSING is not None


class GateBank:
    """Logits, Adam's moments, gains and lambda of all layers, and the gated weights they give.

    Args:
        weights: float32, [n, k] or [n, k, r, s] each, on one device; contiguous or channels_last.
            On a CPU small ones are copied: the bank's own `weights` are those that steps read.
        start: the logits' first value, one number a group.
        seeds, layers: one number a weight: with the step, the address of its noise.
        groups: for each weight the search it belongs to (several run side by side); ascending from 0.
        targets: expected number of weights that each group aims at.
        rule: how lambda moves; `weight` is its first value.
        gain_lr: 0 leaves gains out.
        dtype: of the gated weights.
        out: where the gated weights go, of the weights' shapes, in place of tensors of its own;
            empty where the layers draw by themselves (`begin_`, `take_`).
        trained: whether the weights train as well: `backward_` then leaves dR/dweight in `out`.
        store_factor: keep q for the backward instead of drawing the noise again (one gate per weight only).

    Errors: ValueError for tensors of another kind.
    """

    def __init__(
        self, weights: Sequence[Tensor], *, gate: GateSpec, unit: Unit, start: Sequence[float],
        seeds: Sequence[int], layers: Sequence[int], groups: Sequence[int],
        targets: Sequence[float], rule: Rule, weight: float = 0.0, lr: float = 0.1,
        gain_lr: float = 0.01, dtype: torch.dtype = torch.float32, out: Sequence[Tensor] | None = None,
        trained: bool = False, store_factor: bool = False, fast: bool = True,
    ) -> None:  # fmt: skip
        for w in weights:
            if w.dtype != torch.float32 or not is_dense(w) or w.device != weights[0].device:
                raise ValueError(
                    f"gate bank: expected dense float32 weights on {weights[0].device}, got {w.dtype} "
                    f"with strides {w.stride()} on {w.device}; use .float().contiguous()"
                )
        device = weights[0].device
        self.gate, self.unit, self.rule, self.fast, self.trained = gate, unit, rule, fast, trained
        self.plain = plain_on(device)
        self.layers, self.groups = list(layers), list(groups)
        shapes = [unit_shape(w.shape, unit) for w in weights]
        logits = [
            _filled(w if unit.single else None, shape, start[group], device)
            for w, shape, group in zip(weights, shapes, groups, strict=True)
        ]
        elementwise = unit.single and not unit.keep
        sizes = [w.numel() for w in weights]
        if self.plain and elementwise and out is None:
            self.held = runs(sizes, self.groups)
        else:
            self.held = [Held(i, [size]) for i, size in enumerate(sizes)]
        if out is None:
            out = [torch.empty_like(w, dtype=dtype) for w in weights]
        # Of each role the layers' tensors, and the same memory as steps on a CPU go over it.
        self.weights, self._weights = join(weights, self.held)
        self.out, self._out = join(out, self.held)
        self.logits, self._logits = join(logits, self.held)
        self.m, self._m = join([torch.zeros_like(s) for s in logits], self.held)
        self.v, self._v = join([torch.zeros_like(s) for s in logits], self.held)
        # On the CPU q is z itself where weights are trained, which need it for their own gradient.
        stored = store_factor and (unit.single if self.plain else elementwise and not trained)
        self.q, self._q = join([torch.empty_like(o) for o in out] if stored else [], self.held)
        self.joined = len(self.held) < len(weights)
        # Where layers lie side by side their gradients are copied there; elsewhere they stay where they come.
        self.grads, self._grads = join(
            [torch.empty_like(o) for o in out] if self.joined else [], self.held
        )
        self._pulls = [torch.empty_like(s) for s in self._logits] if self.plain else []
        self.ds = [] if unit.single else [torch.empty_like(s) for s in self.logits]
        self._sizes = [None if unit.single else sizes_of(w.shape, unit, device) for w in weights]
        count, sets = len(self.weights), max(groups) + 1
        self.log_gain = torch.zeros(
            4 if gain_lr > 0 else 0, count, device=device, dtype=torch.float32
        )
        self.step = torch.zeros(2, dtype=torch.int64, device=device)
        self.control = torch.full((2, sets), weight, device=device, dtype=torch.float32)
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        self.targets = torch.tensor(list(targets), dtype=torch.float32, device=device)
        self.lr = torch.tensor([lr, gain_lr], device=device, dtype=torch.float32)
        roles = (self.weights, self.logits, self.out, self.q or self.ds, self.m, self.v)
        columns = [offsets_of(role) if role else [0] * count for role in roles]
        geometries = [
            Geometry(tuple(w.shape), is_channels_last(w), layer, group)
            for w, layer, group in zip(weights, layers, groups, strict=True)
        ]
        self.plan = plan(geometries, unit, list(zip(*columns, strict=True)), device)
        self.partials = torch.zeros(len(self.plan.chunks), 4, device=device, dtype=torch.float32)
        self._first_chunks = self.plan.table[:, FIRST_CHUNK].tolist()
        self._offsets = torch.zeros(count, dtype=torch.int64, device=device)  # of gradients
        self._cells = list(self._offsets.unbind())
        own = (
            torch.tensor(offsets_of(self.ds), dtype=torch.int64, device=device) if self.ds else None
        )
        self._ds_offsets = self._offsets if own is None else own

    @torch.no_grad()
    def sample_(self) -> list[Tensor]:
        """Begins a step: draws every layer's gated weight into `out`."""
        *tables, hints = self.plan
        # On the CPU directly: calling an operator costs as much there as a tenth of its work.
        run = sample_gates_ref_ if self.plain else _sample
        run(
            self._out, self._q, self.log_gain, self.step, self.control, self._weights, self._logits,
            self.seeds, tables, self.layers, list(map(float, self.gate)), list(self.unit), list(hints),
            self.fast, self.trained,
        )  # fmt: skip
        return self.out

    @torch.no_grad()
    def backward_(self, grads: Sequence[Tensor]) -> None:
        """Takes dR/dw_eff of every layer, of w_eff's dtype; the tensors are overwritten.

        Where weights are trained, `out` becomes dR/dweight.
        """
        if self.joined:
            torch._foreach_copy_(self.grads, list(grads))
        else:
            self.grads = [_as(grad, o) for grad, o in zip(grads, self.out, strict=True)]
            if len({g.data_ptr() for g in self.grads}) < len(self.grads):
                self.grads = [
                    g.clone() for g in self.grads
                ]  # autograd may hand out one tensor twice
            self._grads = self.grads
        *tables, hints = self.plan
        self._locate_(self.grads)
        run = gates_backward_ref_ if self.plain else _backward
        run(
            self._grads, self.ds, self._pulls, self.partials, self._offsets, self._weights, self._logits,
            self._out, self._q, self.log_gain, self.seeds, self.step, tables,
            self.layers, list(map(float, self.gate)), list(self.unit),
            _hints(hints, self.grads), self.fast, self.trained,
        )  # fmt: skip

    @torch.no_grad()
    def begin_(self) -> None:
        """Begins a step in which the layers draw by themselves, at (seeds[i], step[1], layers[i])."""
        torch.add(self.step[:1], 1, out=self.step[1:])
        self.control[1].copy_(self.control[0])
        if self.log_gain.numel():
            self.log_gain[1].copy_(self.log_gain[0])

    @torch.no_grad()
    def take_(self, ds: Sequence[Tensor], dgains: Sequence[Tensor]) -> None:
        """Takes dR/dlogits and dR/dlog_gain of every layer from such a step, in place of `backward_`."""
        self.partials.zero_()
        if self.unit.single:
            self.ds = self.grads = self._grads = [
                _as(d, s) for d, s in zip(ds, self.logits, strict=True)
            ]
            self._locate_(self.grads)
        else:
            torch._foreach_copy_(self.ds, list(ds))
        nothing = self.partials.new_zeros(())
        for i, (s, d, size) in enumerate(zip(self.logits, self.ds, self._sizes, strict=True)):
            density = density_ref(self.gate, s)
            pull = density_slope_ref(self.gate, s, density)
            if size is not None:
                density, pull = density * size, pull.mul_(size)
            if self._pulls:
                self._pulls[i].copy_(pull)
            dgain = dgains[i] if dgains else nothing
            sums = [d.square().sum(), density.sum(), pull.square().sum(), dgain]
            self.partials[self._first_chunks[i]] = torch.stack(sums)

    @torch.no_grad()
    def step_(self, rule: Rule | None = None) -> None:
        """Ends a step: lambda, logits and gains move on."""
        *tables, hints = self.plan
        ds = self._grads if self.unit.single else self.ds
        run = balanced_step_ref_ if self.plain else _step
        run(
            self._logits, self._m, self._v, self.log_gain, self.step, self.control, ds, self._pulls,
            self._ds_offsets, self.partials, self.targets, self.lr, tables, list(map(float, self.gate)),
            list(self.unit), list(rule or self.rule), _hints(hints, ds), self.fast,
        )  # fmt: skip

    def sums(self) -> Tensor:
        """fp32 [groups, 3] of the present step: ||g||^2, expected weights kept, ||size d density/ds||^2."""
        starts = self.partials[:, :3].cumsum(0, dtype=torch.float64)
        first, last = self.plan.groups.long().unbind(1)
        before = torch.where(first[:, None] > 0, starts[(first - 1).clamp_min(0)], 0.0)
        return (starts[last - 1] - before).float()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that steps change, by name; rates aside."""
        found = {"log_gain": self.log_gain, "step": self.step, "control": self.control}
        for role, values in (("logits", self.logits), ("m", self.m), ("v", self.v)):
            found |= {f"{role}/{i}": value for i, value in enumerate(values)}
        return found

    def _locate_(self, tensors: Sequence[Tensor]) -> None:
        """Tells kernels the tensors' offsets from the first.

        They travel as arguments of a launch: nothing is copied from the host, and a graph, whose gradients
        have addresses of their own, writes them anew in each replay.
        """
        if not self.plain:
            self._offsets.zero_()
            torch._foreach_add_(self._cells, offsets_of(tensors))


def _filled(like: Tensor | None, shape: torch.Size, value: float, device: torch.device) -> Tensor:
    if like is not None:
        return torch.full_like(like, value)
    return torch.full(shape, value, device=device, dtype=torch.float32)


def _as(grad: Tensor, out: Tensor) -> Tensor:
    """`grad` in the memory order and dtype of `out`."""
    return laid_out_as(grad.detach().to(out.dtype), out)


def _hints(hints: Hints, tensors: Sequence[Tensor]) -> list[int]:
    """What still holds beside tensors that came from elsewhere."""
    aligned = all(offset % 8 == 0 for offset in offsets_of(tensors))
    return list(hints if aligned else Hints())
