"""What the machine can do at most, and the bank's three launches by counted bytes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsecore.capture import Captured
from sparsecore.control import GradBalance
from sparsecore.kernels import GateBank, Unit, density_ref, density_slope_ref, sample_ref, slope_ref
from sparsecore.kernels.gates.bank_ref import balanced_step_ref_
from sparsecore.kernels.gates.weight import storage_noise

from . import measure
from .measure import Job, require_as_exact, require_close, timed
from .rows import Rows, number
from .search_cases import GATES, OpCase, SearchCases, weights_of

DENSITY = 0.05


def ceilings(cases: SearchCases, rows: Rows, device: torch.device) -> float:
    """Copy bandwidth and matrix rate, once for all rows; returns the first, in bytes a second."""
    if (known := rows.find(case="ceiling/copy")) is not None:
        return 1e9 * float(known["median"])
    source = torch.randint(-128, 128, (cases.copy,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (_randn((cases.matmul, cases.matmul), i, device).to(dtype) for i in range(2))
    product = torch.empty_like(a)
    jobs = {
        "copy": Job(lambda: target.copy_(source)),
        "matmul": Job(lambda: torch.mm(a, b, out=product)),
    }
    found = timed(jobs, device, rounds=cases.rounds)
    moved = 2 * source.numel()  # read and written
    rates = [number(1e-9 * moved / seconds) for seconds in found["copy"]]
    rows.add("ceiling/copy", "torch", "eager", "bandwidth", "GB/s", rates[0], rates[2], rates[1])
    operations = 2 * cases.matmul**3
    rates = [number(1e-12 * operations / seconds) for seconds in found["matmul"]]
    name = f"ceiling/matmul {str(dtype).removeprefix('torch.')} {cases.matmul}^3"
    rows.add(name, "torch", "eager", "rate", "TFLOP/s", rates[0], rates[2], rates[1])
    return moved / found["copy"].median


def op(
    case: OpCase, cases: SearchCases, rows: Rows, device: torch.device, bandwidth: float
) -> None:
    """K1, K2 and K2b of one bank."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bank, fresh = build_bank(case, device, dtype)
    check_bank(case, bank, fresh)
    grads = [g.clone() for g in fresh]

    def refresh() -> None:
        torch._foreach_copy_(grads, fresh)  # K2 writes its result over them

    steps: dict[str, Callable[[], Any]] = {
        "K1 sample": bank.sample_,
        "K2 backward": lambda: bank.backward_(grads),
        "K2b balanced step": bank.step_,
    }
    mode = measure.modes(device)[-1]
    if mode == "graph":  # launches by themselves, without what calling them costs the host
        steps = {n: Captured(step) for n, step in steps.items()}
    jobs = {
        n: Job(s, refresh if n.startswith("K2 ") else None, cold=True) for n, s in steps.items()
    }
    found = timed(jobs, device, rounds=cases.rounds)
    count = sum(w.numel() for w in bank.weights)
    for name, size in bytes_a_weight(case, dtype).items():
        spread = found[name]
        provider = f"{name}: {case.provider}"
        rows.add(case.name, provider, mode, "time", "us", *(number(1e6 * s) for s in spread))
        rate = size * count / spread.median
        rows.add(case.name, provider, mode, "bandwidth", "GB/s", number(1e-9 * rate))
        share = 100 * rate / bandwidth
        rows.add(case.name, provider, mode, "share of copy bandwidth", "%", f"{share:.1f}")


def bytes_a_weight(case: OpCase, dtype: torch.dtype) -> dict[str, int]:
    """The fewest bytes a launch must move for each weight: what it reads and what it writes, once."""
    low = dtype.itemsize
    factor = low if case.stored else 0
    return {
        "K1 sample": 4 + 4 + low + factor,  # weight, logit; w_eff, q
        # gradient in and out, logit; the weight, or q and w_eff
        "K2 backward": low + low + 4 + (2 * low if case.stored else 4),
        "K2b balanced step": low + 12 + 12,  # gradient; logit and two moments, in and out
    }


def build_bank(
    case: OpCase, device: torch.device, dtype: torch.dtype
) -> tuple[GateBank, list[Tensor]]:
    """A bank over the case's weights and a gradient dR/dw_eff for each."""
    weights = [_randn(shape, i, device) for i, shape in enumerate(weights_of(case.model))]
    weights = [
        w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights
    ]
    gate, count = GATES[case.gate], len(weights)
    start = torch.logit(torch.tensor(DENSITY)).item() + gate.shift
    bank = GateBank(
        weights, gate=gate, unit=Unit(), start=[start], seeds=[0] * count,
        layers=range(count), groups=[0] * count,
        targets=[1.1 * DENSITY * sum(w.numel() for w in weights)], rule=GradBalance().rule,
        gain_lr=0.0, dtype=dtype, store_factor=case.stored, fast=case.fast,
    )  # fmt: skip
    for i, s in enumerate(bank.logits):  # a search's logits differ
        s.add_(_randn(tuple(s.shape), 1000 + i, device))
    grads = [torch.empty_like(o).copy_(_randn(tuple(o.shape), 2000 + i, device))
             for i, o in enumerate(bank.out)]  # fmt: skip
    return bank, grads


def check_bank(case: OpCase, bank: GateBank, fresh: list[Tensor]) -> None:
    """The gate: w_eff, dR/dlogits and the balanced step of random data.  Errors: WrongResult."""
    name = f"{case.name}, {case.provider}"
    bank.sample_()
    bank.backward_([g.clone() for g in fresh])
    ours, theirs, exact = ([], []), ([], []), ([], [])
    for i, (w, s, g) in enumerate(zip(bank.weights, bank.logits, fresh, strict=True)):
        noise = storage_noise(s, bank.seeds[i : i + 1], bank.step[1:], bank.layers[i])
        for pair, wide in ((theirs, torch.float32), (exact, torch.float64)):
            z = sample_ref(bank.gate, s.to(wide), noise.to(wide))
            slope = slope_ref(bank.gate, z, s.to(wide))
            values = (w.to(wide) * z, g.to(wide) * w.to(wide) * slope)
            kept = bank.out[i].dtype if pair is theirs else wide
            for half, value in zip(pair, values, strict=True):
                half.append(value.to(kept))
        ours[0].append(bank.out[i])
        ours[1].append(bank.grads[i])
    for what, *halves in zip(("w_eff", "dR/dlogits"), ours, theirs, exact, strict=True):
        joined = [torch.cat([t.flatten() for t in half]) for half in halves]
        require_as_exact(f"{name}: {what}", *joined)
    _check_step(name, bank)


def _check_step(name: str, bank: GateBank) -> None:
    """Logits after a step against the reference's, as the change that the step makes."""
    *tables, hints = bank.plan
    logits, m, v = ([t.clone() for t in role] for role in (bank.logits, bank.m, bank.v))
    before = [s.clone() for s in bank.logits]
    densities = [density_ref(bank.gate, s) for s in before]
    pulls = [density_slope_ref(bank.gate, s, d) for s, d in zip(before, densities, strict=True)]
    balanced_step_ref_(
        logits, m, v, bank.log_gain.clone(), bank.step.clone(), bank.control.clone(), bank.grads,
        pulls, bank._ds_offsets, bank.partials, bank.targets, bank.lr, tables,
        list(map(float, bank.gate)), list(bank.unit), list(bank.rule), [int(h) for h in hints],
        bank.fast,
    )  # fmt: skip
    kept = sum(d.sum(dtype=torch.float64) for d in densities)
    bank.step_()
    ours, theirs = (
        torch.cat([(new - old).flatten() for new, old in zip(found, before, strict=True)])
        for found in (bank.logits, logits)
    )
    require_close(f"{name}: change of the logits", ours, theirs, 1e-3)
    require_close(f"{name}: expected weights kept", bank.sums()[0, 1], torch.as_tensor(kept), 1e-3)


def _randn(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)
