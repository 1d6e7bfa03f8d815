"""A bank's steps in plain PyTorch: what its kernels are held against, and what runs on a CPU.

A tensor of a role may hold several layers, one after the other in the order of their memory
(`joined.py`): all is elementwise there but the noise, the gains and their gradients.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..philox import uniform_
from ..reference import (
    GateSpec,
    density_ref,
    density_slope_ref,
    sample_ref,
    slope_ref,
    squares_ref,
)
from ..units import Unit, apply_ref, gather_ref, project_ref
from .joined import Held, held_in
from .segments import FIRST_CHUNK, GROUP, LAST_CHUNK, NUMEL, UNITS


def sample_gates_ref_(
    out: list[Tensor], q: list[Tensor], log_gain: Tensor, step: Tensor, control: Tensor,
    weights: list[Tensor], logits: list[Tensor], seeds: Tensor, plan: list[Tensor],
    layers: list[int], gate: list[float], unit: list[int], hints: list[int], fast: bool,
    trained: bool,
) -> None:  # fmt: skip
    spec, covers = GateSpec.of(gate), Unit(*unit)
    step[1] = step[0] + 1
    control[1] = control[0]
    if log_gain.numel():
        log_gain[1] = log_gain[0]
    gains = log_gain[1].exp() if log_gain.numel() else None
    for i, held in enumerate(held_in(weights, plan[0][:, NUMEL].tolist())):
        weight, s = weights[i], logits[i]
        spare = covers.single and out[i].dtype == torch.float32  # to be written soon anyway
        noise = _draw_(out[i] if spare else torch.empty_like(s), held, seeds, step, layers)
        z = project_ref(sample_ref(spec, s, noise), covers)
        if q and trained:
            q[i].copy_(z)
        elif q:
            torch.mul(slope_ref(spec, z, s), weight, out=q[i])
        if spare:
            torch.mul(weight, z, out=out[i])
        else:
            out[i].copy_(apply_ref(weight, z, covers))
        if gains is not None:
            _scale_(out[i], held, gains)
            if q and not trained:
                _scale_(q[i], held, gains)


def gates_backward_ref_(
    grads: list[Tensor], ds: list[Tensor], pulls: list[Tensor], partials: Tensor,
    grad_offsets: Tensor, weights: list[Tensor], logits: list[Tensor], out: list[Tensor],
    q: list[Tensor],
    log_gain: Tensor, seeds: Tensor, step: Tensor, plan: list[Tensor], layers: list[int],
    gate: list[float], unit: list[int], hints: list[int], fast: bool,
    trained: bool,
) -> None:  # fmt: skip
    """`ds` is empty where each weight has a gate: its gradient takes the place of dR/dw_eff in `grads`.

    Where weights are `trained`, `out`, not needed any more, becomes dR/dweight.
    `pulls`, size d density/ds of each layer, is for `balanced_step_ref_`; kernels compute it twice.
    """
    spec, covers = GateSpec.of(gate), Unit(*unit)
    gains = log_gain[1].exp() if log_gain.numel() else None
    firsts = plan[0][:, FIRST_CHUNK].tolist()
    partials.zero_()
    for i, held in enumerate(held_in(weights, plan[0][:, NUMEL].tolist())):
        weight, s, grad = weights[i], logits[i], grads[i]
        flat = grad.to(torch.float32)
        if gains is not None:
            parts = zip(held.split(flat), held.split(out[i]), strict=True)
            for layer, (g, drawn) in enumerate(parts, held.first):
                partials[firsts[layer], 3] = torch.dot(g, drawn.to(torch.float32))
        if q and not trained:
            found = grad.mul_(q[i])
        else:
            if q:
                z = q[i]
            else:
                noise = _draw_(torch.empty_like(s), held, seeds, step, layers)
                z = project_ref(sample_ref(spec, s, noise), covers)
            if trained and covers.single and out[i].dtype == torch.float32:
                torch.mul(flat, z, out=out[i])
            elif trained:
                out[i].copy_(apply_ref(flat, z, covers))
            found = slope_ref(spec, z, s)
            if covers.single:
                found.mul_(flat).mul_(weight)
            else:
                found.mul_(gather_ref(flat * weight, covers))
            if gains is not None:
                _scale_(found, held, gains)
                if trained:
                    _scale_(out[i], held, gains)
            found = (grads[i] if covers.single else ds[i]).copy_(found)
        density = density_ref(spec, s)
        pulls[i].copy_(density_slope_ref(spec, s, density))
        if not covers.single:
            sizes = sizes_of(weight.shape, covers, weight.device)
            density, pulls[i] = density * sizes, pulls[i].mul_(sizes)
        row = [squares_ref(found), density.sum(), squares_ref(pulls[i])]
        partials[firsts[held.first], :3] = torch.stack(row)


def balanced_step_ref_(
    logits: list[Tensor], m: list[Tensor], v: list[Tensor], log_gain: Tensor, step: Tensor,
    control: Tensor, grads: list[Tensor], pulls: list[Tensor], grad_offsets: Tensor,
    partials: Tensor, targets: Tensor, lr: Tensor, plan: list[Tensor], gate: list[float],
    unit: list[int], rule: list[float], hints: list[int], fast: bool,
) -> None:  # fmt: skip
    """`pulls` as `gates_backward_ref_` left them."""
    keep, follow, ascend, band, share = rule
    table, _, _, groups = plan
    t, tiny = step[1], torch.finfo(torch.float32).tiny
    weights = []  # of the pulls, lambda times percent, a group
    for group, (first, last) in enumerate(groups.tolist()):
        task, kept, pull = partials[first:last, :3].sum(0).unbind()
        percent = 100 / targets[group]
        excess = percent * kept - 100
        ratio = task.sqrt() / (percent * pull.sqrt()).clamp_min(tiny)
        if band == 0:
            ratio = torch.where(excess > 0, ratio, torch.zeros_like(ratio))
        weight = keep * control[1, group] + follow * ratio
        if follow > 0:
            weight = torch.where(t == 1, ratio, weight)
        control[0, group] = weight + (ascend + share * lr[0]) * excess
        if band > 0:
            weight = weight * (excess / band).clamp(0, 1)
        weights.append(weight * percent)
    members = table[:, GROUP].tolist()
    totals = [
        torch.addcmul(grads[i].to(logits[i].dtype), pulls[i], weights[members[held.first]])
        for i, held in enumerate(held_in(logits, table[:, UNITS].tolist()))
    ]
    steps = t.to(torch.float32)
    logit_lr, gain_lr = lr.tolist()
    adam = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    torch.ops.aten._fused_adam_(
        logits, totals, m, v, [], [steps.clone() for _ in logits],
        lr=logit_lr, **adam, amsgrad=False, maximize=False,
    )  # fmt: skip
    if log_gain.numel():
        dots = [partials[row[FIRST_CHUNK] : row[LAST_CHUNK], 3].sum() for row in table.tolist()]
        log_gain[0] = log_gain[1]
        torch.ops.aten._fused_adam_(
            [log_gain[0]], [torch.stack(dots)], [log_gain[2]], [log_gain[3]], [], [steps],
            lr=gain_lr, **adam, amsgrad=False, maximize=False,
        )  # fmt: skip
    step[0] = t


def _draw_(noise: Tensor, held: Held, seeds: Tensor, step: Tensor, layers: list[int]) -> Tensor:
    """The present step's u of each gate, every layer at its own address."""
    for layer, part in enumerate(held.split(noise), held.first):
        uniform_(part, seeds[layer : layer + 1], step[1:], layers[layer])
    return noise


def _scale_(t: Tensor, held: Held, gains: Tensor) -> None:
    for part, gain in zip(held.split(t), gains[held.first :], strict=False):
        part.mul_(gain)


@lru_cache(maxsize=1024)
def sizes_of(shape: torch.Size, unit: Unit, device: torch.device) -> Tensor:
    """Weights in each unit, float32; kept, since making it takes a tensor of the weight's size."""
    return gather_ref(torch.ones(shape, device=device, dtype=torch.float32), unit)
