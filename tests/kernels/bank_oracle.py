"""A bank's step in float64, from the state that the bank itself is in: no rounding is carried on to the next one.

Every bound is that of `bounds`, or follows from it: an error e of a gradient g moves Adam's m by e / 10, v by
2 |g| e / 1000, and the logit by what these do to m / sqrt(v).  So where g is no more than rounding, the bound is
the whole step.
"""

from collections.abc import Sequence

import bounds
import torch
from bounds import SPECIAL, TINY, UNIT, Expected, require
from torch import Tensor

from sparsecore.kernels import (
    GateBank,
    Rule,
    density_ref,
    density_slope_ref,
    gather_ref,
    project_ref,
)
from sparsecore.kernels.philox import storage_noise
from sparsecore.kernels.units import apply_ref

SUMS = 64 * UNIT  # sums of positive terms: no more additions than that follow each other
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().cpu() for t in tensors]


class Oracle:
    """What a bank should do next.  Call `sampled`, `differentiated` and `stepped` after its three methods.

    Args:
        exact: whether the noise is the kernels' on a CPU too.
    """

    def __init__(self, bank: GateBank, *, exact: bool) -> None:
        self.bank, self.exact = bank, exact
        self.weights, self.logits = wide(bank.weights), wide(bank.logits)
        self.m, self.v = wide(bank.m), wide(bank.v)
        self.log_gain, self.control = wide([bank.log_gain, bank.control])
        self.t = int(bank.step[0]) + 1
        count = len(self.weights)
        self.gains = self.log_gain[0].exp() if len(self.log_gain) else torch.ones(count).double()
        ones = [torch.ones_like(w) for w in self.weights]
        self.sizes = [gather_ref(one, bank.unit) for one in ones]

    def sampled(self) -> None:
        bank = self.bank
        assert bank.step.tolist() == [self.t - 1, self.t]
        self.spread, self.spread_error, self.slopes = [], [], []
        for i, (w, s) in enumerate(zip(self.weights, self.logits, strict=True)):
            seed, step = bank.seeds[i : i + 1], bank.step[1:]
            u = storage_noise(bank.logits[i], seed, step, bank.layers[i], exact=self.exact)
            (z, z_error), slope = bounds.gates(bank.gate, s, u.cpu())
            z, z_error = self._projected(z, z_error)
            if bank.unit.keep:  # what is not among the N has no slope either
                slope = slope[0] * (z != 0), slope[1] + slope[0] * (z_error >= z)
            self.slopes.append(slope)
            one = torch.ones_like(w)
            self.spread.append(apply_ref(one, z, bank.unit))
            self.spread_error.append(apply_ref(one, z_error, bank.unit))
            drawn = self._exactly(w * self.gains[i], 2 * UNIT)
            drawn = drawn.times(self.spread[i], self.spread_error[i])
            require(f"w_eff {i}", bank.out[i].cpu(), drawn)

    def _projected(self, z: Tensor, z_error: Tensor) -> tuple[Tensor, Tensor]:
        """z with 0 where N:M forbids it; a group whose N-th and next z are closer than rounding may go either way."""
        unit = self.bank.unit
        if not unit.keep:
            return z, z_error
        projected = project_ref(z, unit)
        dropped = (z - projected).movedim(1, -1)
        kept = projected.where(projected > 0, torch.inf).movedim(1, -1)
        pad = (0, -z.shape[1] % unit.w)
        last = (
            torch.nn.functional.pad(kept, pad, value=torch.inf).unflatten(-1, (-1, unit.w)).amin(-1)
        )
        first = torch.nn.functional.pad(dropped, pad).unflatten(-1, (-1, unit.w)).amax(-1)
        open_ = (last - first <= 2 * z_error.max()) & (first > 0)
        lanes = open_.repeat_interleave(unit.w, -1)[..., : z.shape[1]].movedim(-1, 1)
        return projected, torch.where(lanes, z.abs() + z_error, z_error)

    def differentiated(self, grads: Sequence[Tensor]) -> None:
        """`grads`: what `backward_` was given, before it was."""
        bank = self.bank
        self.ds, self.dots = [], []
        for i, (grad, w) in enumerate(zip(wide(grads), self.weights, strict=True)):
            through = self._exactly(grad).times(
                w * self.gains[i], 2 * UNIT * (w * self.gains[i]).abs()
            )
            ds = (
                through.summed(lambda t: gather_ref(t, bank.unit))
                if not bank.unit.single
                else through
            )
            slope, slope_error = self.slopes[i]
            found = (bank.grads if bank.unit.single else bank.ds)[i]
            require(f"dR/dlogits {i}", found.cpu(), ds.times(slope, slope_error))
            self.ds.append(found.detach().double().cpu())
            first, last = bank.plan.table[i, -2:].tolist()
            dot = through.times(self.spread[i], self.spread_error[i])
            self.dots.append(float(bank.partials[first:last, 3].double().sum()))
            if len(self.log_gain):
                require(
                    f"gain {i}", torch.tensor([self.dots[i]]), dot.summed(lambda t: t.sum()[None])
                )
            if bank.trained:
                dw = self._exactly(grad).times(self.spread[i], self.spread_error[i])
                require(f"dR/dw {i}", bank.out[i].cpu(), dw.times(self.gains[i], 2 * UNIT))
        self._summed()

    def taken(self, ds: Sequence[Tensor]) -> None:
        """In place of both, of gradients of the logits that `take_` was given."""
        bank = self.bank
        self.ds = wide(ds)
        first = bank.plan.table[:, -2].tolist()
        self.dots = bank.partials[first, 3].double().tolist()
        for mine, right in zip((bank.grads if bank.unit.single else bank.ds), self.ds, strict=True):
            assert torch.equal(mine.double().cpu(), right)
        self._summed()

    def _summed(self) -> None:
        bank = self.bank
        self.sums = bank.sums().double().cpu()
        self.pulls = []
        for group, found in enumerate(self.sums):
            members = [i for i, g in enumerate(bank.groups) if g == group]
            squares = sum(float(self.ds[i].square().sum()) for i in members)
            kept, pull = 0.0, 0.0
            for i in members:
                density = density_ref(bank.gate, self.logits[i])
                slope = density_slope_ref(bank.gate, self.logits[i], density) * self.sizes[i]
                self.pulls.append(slope)
                kept += float((density * self.sizes[i]).sum())
                pull += float(slope.square().sum())
            right = torch.tensor([squares, kept, pull]).double()
            relative = torch.tensor([SUMS, SUMS + SPECIAL, SUMS + 4 * SPECIAL])
            assert ((found - right).abs() <= relative * right).all(), (found, right)

    def stepped(self, rule: Rule) -> None:
        bank = self.bank
        found = {role: wide(getattr(bank, role)) for role in ("logits", "m", "v")}
        assert bank.step.tolist() == [self.t, self.t]
        lr, gain_lr = bank.lr.double().tolist()
        for group, (squares, kept, pull) in enumerate(self.sums.tolist()):
            percent = 100 / float(bank.targets[group])
            excess = percent * kept - 100
            excess_error = SUMS * (percent * kept + 100)
            assert abs(excess) > excess_error  # else either sign is right
            ratio = squares**0.5 / max(percent * pull**0.5, TINY)
            if rule.band == 0 and excess <= 0:
                ratio = 0.0
            weight = rule.keep * float(self.control[0, group]) + rule.follow * ratio
            if rule.follow > 0 and self.t == 1:
                weight = ratio
            error = SUMS * (abs(weight) + ratio)
            rate = rule.ascend + rule.share * lr
            ascent_error = rate * (excess_error + SUMS * abs(excess))
            found_weight = float(bank.control[0, group])
            assert abs(found_weight - weight - rate * excess) <= error + ascent_error
            if rule.band > 0:
                error = error + abs(weight) * excess_error / rule.band
                weight *= min(max(excess / rule.band, 0.0), 1.0)
            for i in (i for i, g in enumerate(bank.groups) if g == group):
                pulled = weight * percent * self.pulls[i]
                g = self.ds[i] + pulled
                slip = (error * percent + abs(weight) * percent * 2 * SPECIAL) * self.pulls[i].abs()
                slip = slip + 2 * UNIT * (self.ds[i].abs() + pulled.abs())
                mine = [found[role][i] for role in ("logits", "m", "v")]
                _adam(
                    f"logits {i}", mine, self.logits[i], self.m[i], self.v[i], g, slip, lr, self.t
                )
        if len(self.log_gain):
            gains = bank.log_gain.double().cpu()
            dots = torch.tensor(self.dots).double()
            bits = SUMS * dots.abs() + TINY
            old = self.log_gain
            _adam(
                "gains",
                [gains[0], gains[2], gains[3]],
                old[0],
                old[2],
                old[3],
                dots,
                bits,
                gain_lr,
                self.t,
            )

    def _exactly(self, t: Tensor, relative: float = 0.0) -> Expected:
        return Expected(t, torch.zeros_like(t), relative * t.abs(), t.ndim == 4)


def _adam(name, found, s, m, v, g, slip, lr: float, t: int) -> None:
    """Adam's m, v and value after a gradient g that is known to `slip`."""
    m, m_error = BETA1 * m + (1 - BETA1) * g, (1 - BETA1) * slip + 4 * UNIT * (m.abs() + g.abs())
    v_error = (1 - BETA2) * (2 * g.abs() + slip) * slip + 4 * UNIT * (v + (1 - BETA2) * g**2) + TINY
    v = BETA2 * v + (1 - BETA2) * g**2
    root, rate = (1 - BETA2**t) ** 0.5, lr / (1 - BETA1**t)
    below = v.sqrt() / root + EPS
    below_error = (v + v_error).sqrt() / root + EPS - below
    least = ((v - v_error).clamp_min(0).sqrt() / root + EPS) * (1 - 16 * UNIT)
    move = rate * m / below
    move_error = rate * (
        m_error / least + m.abs() * (below_error + (below - least)) / (below * least)
    )
    right = [
        (s - move, move_error + 16 * UNIT * (s.abs() + move.abs())),
        (m, m_error),
        (v, v_error),
    ]
    for what, mine, (exact, error) in zip(("values", "m", "v"), found, right, strict=True):
        wrong = ~((mine - exact).abs() <= error)
        assert not wrong.any(), (
            f"{name}, {what}: {int(wrong.sum())} beyond the bound, by {(mine - exact)[wrong].abs().max():.2e}"
        )
