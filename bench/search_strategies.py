"""Forward and backward of one gated linear layer: sampling first, inside the products, or block by block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecore.capture import Captured
from sparsecore.kernels import (
    apply_ref,
    gated_weight,
    sample_ref,
    uniform_,
    unit_shape,
)
from sparsecore.kernels.gated.blocks import block_gated_linear
from sparsecore.kernels.gated.epilogue import epilogue_gated
from sparsecore.kernels.gated.fused import TOKENS, fused_gated_linear

from . import measure
from .measure import Job, require_as_exact, timed
from .rows import Rows, add_times
from .search_cases import GATES, SearchCases, StrategyCase

Forward = Callable[[Tensor, Tensor], Tensor]  # of x and logits


class GatedLayer:
    """A linear layer whose gates are open as often as the case says."""

    def __init__(self, case: StrategyCase, device: torch.device) -> None:
        self.case = case
        # Blocks can only be skipped by a gate that is exactly 0 at times.
        self.gate = GATES["concrete" if case.unit.single else "hard-concrete"]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        size, shape = case.size, (case.tokens, case.size)
        weight = torch.randn(size, size, generator=generator, device=device)
        self.weight = weight * size**-0.5
        self.x = torch.randn(shape, generator=generator, device=device).to(self.dtype)
        self.dy = torch.randn(shape, generator=generator, device=device).to(self.dtype)
        units = unit_shape(self.weight.shape, case.unit)
        level = torch.logit(torch.tensor(case.density)).item() + self.gate.shift
        self.logits = torch.full(units, level, device=device)
        self.x.requires_grad_()
        self.logits.requires_grad_()
        self.seed = torch.tensor([7], device=device)
        self.draw = torch.tensor([1], device=device)  # which draw of the noise

    def forwards(self) -> dict[str, Forward]:
        """The ways by name."""
        at: dict[str, Any] = {"gate": self.gate, "seed": self.seed, "step": self.draw, "layer": 3}

        def materialise(x: Tensor, s: Tensor) -> Tensor:
            unit = self.case.unit
            return F.linear(x, gated_weight(self.weight, s, unit=unit, dtype=self.dtype, **at))

        ways: dict[str, Forward] = {"materialise": materialise}
        if not self.case.unit.single:
            unit = self.case.unit
            ways["block"] = lambda x, s: block_gated_linear(x, self.weight, s, unit=unit, **at)
            return ways
        ways["epilogue"] = lambda x, s: epilogue_gated(x, self.weight, s, None, None, **at)
        if self.case.tokens <= TOKENS:
            ways["fused"] = lambda x, s: fused_gated_linear(x, self.weight, s, **at)
            if self.dtype != torch.float32:
                copy = self.weight.to(self.dtype)  # that a search in lower precision keeps
                ways["fused, bf16 weights"] = lambda x, s: fused_gated_linear(x, copy, s, **at)
        return ways

    def gradients(self, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx, dlogits."""
        y = forward(self.x, self.logits)
        dx, ds = torch.autograd.grad(y, [self.x, self.logits], self.dy)
        return y.detach(), dx, ds

    def reference(self, wide: torch.dtype, low: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same in plain PyTorch: gates in `wide`, products in `low`."""
        noise = torch.empty_like(self.logits, requires_grad=False)
        uniform_(noise, self.seed, self.draw, 3)
        x = self.x.detach().to(low).requires_grad_()
        s = self.logits.detach().to(wide).requires_grad_()
        z = sample_ref(self.gate, s, noise.to(wide))
        y = F.linear(x, apply_ref(self.weight.to(wide), z, self.case.unit).to(low))
        dx, ds = torch.autograd.grad(y, [x, s], self.dy.to(low))
        return y.detach(), dx, ds

    def check(self) -> None:
        """The gate: y, dx and dlogits of every way.  Errors: WrongResult."""
        theirs = self.reference(torch.float32, self.dtype)
        exact = self.reference(torch.float64, torch.float64)
        for name, forward in self.forwards().items():
            found = self.gradients(forward)
            for what, mine, plain, true in zip(
                ("y", "dx", "dlogits"), found, theirs, exact, strict=True
            ):
                require_as_exact(f"{self.case.name}, {name}: {what}", mine, plain, true)


def strategy(case: StrategyCase, cases: SearchCases, rows: Rows, device: torch.device) -> None:
    """Times every way and the dense layer, launched one by one and as a graph."""
    layer = GatedLayer(case, device)
    layer.check()
    dense = layer.weight.to(layer.dtype).requires_grad_()

    def without_gates() -> None:
        torch.autograd.grad(F.linear(layer.x, dense), [layer.x, dense], layer.dy)

    steps: dict[str, Callable[[], Any]] = {
        name: lambda forward=forward: layer.gradients(forward)
        for name, forward in layer.forwards().items()
    }
    steps["dense"] = without_gates
    for mode in measure.modes(device):
        graph = mode == "graph"
        if not graph:
            measure.add_peaks(rows, case.name, mode, steps, device)
        made = {name: Captured(step) if graph else step for name, step in steps.items()}
        jobs = {name: Job(step, cold=graph) for name, step in made.items()}
        found = timed(jobs, device, rounds=cases.rounds, budget=0.1)
        add_times(rows, case.name, mode, found, "materialise", "dense")
