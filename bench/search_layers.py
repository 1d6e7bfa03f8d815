"""A whole search step of one layer: as published code does it, compiled, without gates, and ours.

Each step is forward, dR/dx and dR/dlogits for a given gradient of the output, the teacher's forward, the
gradient of the penalty, GradBalance and Adam.  No provider waits for the device; gains are left out, as
in the published method.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecore.capture import Captured
from sparsecore.control import GradBalance
from sparsecore.kernels import CONCRETE, GateBank, GateSpec, Unit
from sparsecore.kernels.gates.weight import storage_noise

from . import measure
from .measure import Job, peak_memory, require_as_exact, timed
from .rows import Rows, add_times, number
from .search_cases import LayerCase, SearchCases

DENSITY = 0.05
TAU = 1.0
Step = Callable[[], Any]


class Layer:
    """What all providers share: weight, input, gradient of the output."""

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)

        def randn(shape: tuple[int, ...]) -> Tensor:
            made = torch.randn(shape, generator=generator, device=device)
            return made.contiguous(memory_format=torch.channels_last) if case.side else made

        fan_in = case.k * case.taps**2
        self.weight = randn(case.weight_shape) * fan_in**-0.5
        self.x = randn(case.shape(case.k)).to(self.dtype).requires_grad_()
        self.dy = randn(case.shape(case.n)).to(self.dtype)
        self.start = torch.logit(torch.tensor(DENSITY)).item()
        self.target = 1.1 * DENSITY * self.weight.numel()

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=self.case.taps // 2) if self.case.side else F.linear(x, w)

    def autocast(self) -> torch.autocast:
        # Nothing here is cast twice, and a cache does not survive a graph's capture.
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)


def autograd_step(layer: Layer, *, compiled: str = "", capturable: bool = False) -> Step:
    """W * z in float32 by autograd, cast by autocast; the penalty by a second autograd.grad; torch's Adam.

    Args:
        compiled: torch.compile's backend; empty for eager.
    """
    logits = nn.Parameter(torch.full_like(layer.weight, layer.start))
    adam = torch.optim.Adam(
        [logits], lr=0.1, capturable=capturable, foreach=not compiled, fused=bool(compiled)
    )
    pull_weight = torch.zeros((), device=layer.device)

    def forward(x: Tensor, weight: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.rand_like(s)
        z = torch.sigmoid((torch.log(u) - torch.log(1 - u) + s) / TAU)
        with layer.autocast():
            with torch.no_grad():
                teacher = layer.product(x, weight)
            return layer.product(x, weight * z), teacher

    def excess(s: Tensor) -> Tensor:
        return 100 * (torch.sigmoid(s).sum() / layer.target - 1)

    def balance(task: Tensor, pull: Tensor, over: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ratio = torch.linalg.vector_norm(task) / torch.linalg.vector_norm(pull)
        weight = 0.99 * weight + 0.01 * torch.where(over > 0, ratio, 0.0)
        return task + weight * pull, weight

    if compiled:
        options: dict[str, Any] = {"backend": compiled, "dynamic": False, "fullgraph": True}
        forward, excess = torch.compile(forward, **options), torch.compile(excess, **options)
        balance = torch.compile(balance, **options)

    def step() -> None:
        y, _ = forward(layer.x, layer.weight, logits)
        _, task = torch.autograd.grad(y, [layer.x, logits], layer.dy)
        over = excess(logits)
        (pull,) = torch.autograd.grad(over, [logits])
        with torch.no_grad():
            logits.grad, weight = balance(task, pull, over.detach(), pull_weight)
            pull_weight.copy_(weight)
        adam.step()

    return step


def dense_step(layer: Layer) -> Step:
    """The same without gates: forward, dR/dx and dR/dW of a stored weight of lower precision, the teacher."""
    weight = layer.weight.to(layer.dtype).requires_grad_()

    def step() -> None:
        y = layer.product(layer.x, weight)
        with torch.no_grad():
            layer.product(layer.x, weight)
        torch.autograd.grad(y, [layer.x, weight], layer.dy)

    return step


class BankStep:
    """Ours: a bank's three launches around the library's products."""

    def __init__(self, layer: Layer, *, stored: bool) -> None:
        self.layer = layer
        self.bank = GateBank(
            [layer.weight], gate=GateSpec(CONCRETE, TAU), unit=Unit(), start=[layer.start],
            seeds=[0], layers=[0], groups=[0], targets=[layer.target], rule=GradBalance().rule,
            gain_lr=0.0, dtype=layer.dtype, store_factor=stored,
        )  # fmt: skip
        self.leaf = self.bank.out[0].detach().requires_grad_()
        self.dense = layer.weight.to(layer.dtype)

    def __call__(self) -> None:
        self.gradients()
        self.bank.step_()

    def gradients(self) -> None:
        """Everything but the last launch: `bank.grads` holds dR/dlogits."""
        layer = self.layer
        self.bank.sample_()
        y = layer.product(layer.x, self.leaf)
        with torch.no_grad():
            layer.product(layer.x, self.dense)
        _, grad = torch.autograd.grad(y, [layer.x, self.leaf], layer.dy)
        self.bank.backward_([grad])

    def check(self) -> None:
        """The gate: w_eff and dR/dlogits against autograd in the same dtype.  Errors: WrongResult."""
        self.gradients()
        layer, bank = self.layer, self.bank
        noise = storage_noise(bank.logits[0], bank.seeds, bank.step[1:], 0)

        def autograd(wide: torch.dtype, low: torch.dtype) -> tuple[Tensor, Tensor]:
            s = bank.logits[0].detach().to(wide).requires_grad_()
            z = torch.sigmoid(torch.logit(noise.to(wide), 2.0**-24) / TAU + s)
            w_eff = (layer.weight.to(wide) * z).to(low)
            y = layer.product(layer.x.detach().to(low), w_eff)
            return w_eff.detach(), torch.autograd.grad(y, [s], layer.dy.to(low))[0]

        theirs = autograd(torch.float32, layer.dtype)
        exact = autograd(torch.float64, torch.float64)
        found = zip(("w_eff", "dR/dlogits"), (bank.out[0], bank.grads[0]), strict=True)
        for (what, mine), plain, true in zip(found, theirs, exact, strict=True):
            require_as_exact(f"{layer.case.name}: {what}", mine, plain, true)


def layer_step(case: LayerCase, cases: SearchCases, rows: Rows, device: torch.device) -> None:
    """Times every provider, launched one by one and as a graph, and their memory."""
    torch._dynamo.reset()  # each case compiles for its own shapes, from the start
    layer = Layer(case, device)
    for stored in (False, True):
        BankStep(layer, stored=stored).check()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    ours = {
        "sparsecore": lambda: BankStep(layer, stored=False),
        "sparsecore, stored q": lambda: BankStep(layer, stored=True),
    }
    for mode in measure.modes(device):
        graph = mode == "graph"
        build = {
            "eager": lambda graph=graph: autograd_step(layer, capturable=graph),
            "compiled": lambda graph=graph: autograd_step(
                layer, compiled=backend, capturable=graph
            ),
            "no gates": lambda: dense_step(layer),
            **ours,
        }
        jobs = {}
        for provider, make in build.items():
            step, held = peak_memory(make, device)
            if graph:
                step = Captured(step)
            elif held is not None:
                size = number(held / 2**20)
                rows.add(case.name, provider, mode, "peak memory", "MiB", size)
            jobs[provider] = Job(step, cold=graph)
        found = timed(jobs, device, rounds=cases.rounds)
        add_times(rows, case.name, mode, found, "eager", "compiled")
        del jobs
        gc.collect()
