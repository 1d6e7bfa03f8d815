"""A model's whole search step: cases as data, the step, and what it is measured against."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.convert import batch_statistics
from sparsecore.gates import Concrete
from sparsecore.kernels.gates.weight import storage_noise
from sparsecore.objectives import TeacherMemory
from sparsecore.recipes import build
from sparsecore.search import ConcreteSearch
from sparsecore.search.many_step import ManyStep
from sparsecore.search.steps import FusedStep

from .measure import require_as_exact, require_close

DENSITY = 0.01


@dataclass(frozen=True)
class StepCase:
    """One search step of a model at a batch size; `members` > 1 searches run side by side."""

    model: str
    shape: tuple[int, int, int]
    batch: int
    rounds: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    members: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}/batch={self.batch}"


STEP_CASES = (
    StepCase("lenet-300-100", (1, 28, 28), 128, 100),
    StepCase("lenet-300-100", (1, 28, 28), 512, 60),
    StepCase("resnet-20", (3, 32, 32), 128, 8),
    StepCase("vit-small", (3, 32, 32), 64, 5),
)
QUICK_STEP_CASES = (StepCase("lenet-300-100", (1, 8, 8), 32, 3),)


class StepBench:
    """A model with gates, its dense twin, and one batch."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case = case
        self.x = torch.randn(case.batch, *case.shape, generator=generator).to(device)
        self.y = torch.randint(0, 10, (case.batch,), generator=generator).to(device)
        self.dense = build(case.model, case.shape, 10).to(device).train()
        self.model = sc.sparsify_(build(case.model, case.shape, 10).to(device))
        self.gate = Concrete(tau=1.0)
        self.search = ConcreteSearch(
            gate=self.gate, dtype=case.dtype, channels_last=case.channels_last
        )
        self._scopes = [
            batch_statistics(self.model),
            self.search._gated(self.model, sc.sparse_layers(self.model), 1 - DENSITY),
        ]
        self._scopes[0].__enter__()
        gated = self._scopes[1].__enter__()
        self.step: FusedStep
        if case.members > 1:
            members = [(DENSITY, seed) for seed in range(case.members)]
            self.step = ManyStep(self.search, self.model, gated, members)
        else:
            self.step = FusedStep(self.search, self.model, gated, [(DENSITY, 0)])
        self.samples = torch.arange(case.batch, device=device)
        self.memory = TeacherMemory(case.batch)
        self.memory.rows = self.samples
        if case.dtype == torch.float32 and not self.step.batchwise:
            self.memory.output(self.x, self.step.net.dense)
        self.weights = [m.raw_weight for m in sc.sparse_layers(self.model).values()]

    def providers(self) -> dict[str, Callable[[], Any]]:
        """The search step, one dense forward and backward, and what published code does."""
        later = {} if self.step.batchwise else {"search step, later epochs": self.later_step}
        return {
            "dense forward-backward": self.dense_step,
            "search step": self.search_step,
            **later,
            "plain autograd search step": self.plain_step,
        }

    def dense_step(self) -> None:
        self.dense.zero_grad()
        F.cross_entropy(self.dense(self.x), self.y).backward()

    def search_step(self) -> None:
        """A step of the first epoch, in which the teacher is asked."""
        self.step.net.memory = None
        self.step((self.x, self.y))

    def later_step(self) -> None:
        """A step of a later epoch, in which the teacher's scores are looked up."""
        self.step.net.memory = self.memory
        self.memory.complete = True
        self.step((self.x, self.y), self.samples)

    def plain_step(self) -> Tensor:
        """The same step as a user would write it: gates through autograd, penalty by backward."""
        logits = self.plain_logits
        masked: dict[str, Tensor] = {}
        for (name, layer), s in zip(sc.sparse_layers(self.model).items(), logits, strict=True):
            u = torch.rand(s.shape, generator=self.plain_noise, device=s.device)
            z = torch.sigmoid(torch.logit(u, 1e-7) / self.gate.tau + s)
            masked[f"{name}.weight"] = layer.raw_weight * z
        loss = self._plain_loss(masked, self.case.dtype)
        task = torch.autograd.grad(loss, logits)
        kept = torch.stack([torch.sigmoid(s).sum() for s in logits]).sum()
        pulls = torch.autograd.grad(100 * (kept / self.step.first_targets()[0] - 1), logits)
        norms = [torch.cat([g.flatten() for g in part]).norm() for part in (task, pulls)]
        for s, a, b in zip(logits, task, pulls, strict=True):
            s.grad = a + norms[0] / norms[1] * b
        self.plain_adam.step()
        return loss.detach()

    def _plain_loss(self, masked: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The reverse KL of the network with these weights to the dense one, by plain autograd."""
        lower = dtype != torch.float32
        scope = torch.autocast(self.x.device.type, dtype) if lower else nullcontext()
        with self.step.net.opened(), self._own_weights(), scope:
            with torch.no_grad():
                teacher = self.model(self.x).log_softmax(-1)
            parameters: dict[str, Tensor] = dict(self.model.named_parameters())
            student = torch.func.functional_call(self.model, parameters | masked, (self.x,))
            scores = student.log_softmax(-1)
            return 100 * F.kl_div(teacher, scores, reduction="batchmean", log_target=True)

    @contextmanager
    def _own_weights(self) -> Iterator[None]:
        """Open layers compute with the weights they are given, not with the step's copies of lower precision."""
        patterns = list(self.step.gated.values())
        copies = [pattern.dense for pattern in patterns]
        for pattern in patterns:
            pattern.dense = None
        try:
            yield
        finally:
            for pattern, copy in zip(patterns, copies, strict=True):
                pattern.dense = copy

    def prepare_plain(self, *, capturable: bool = False) -> None:
        """`capturable`: for a CUDA graph."""
        shapes = [w.shape for w in self.weights]
        start = self.gate.init(DENSITY)
        self.plain_logits = [
            nn.Parameter(torch.full(shape, start, device=self.x.device)) for shape in shapes
        ]
        self.plain_noise = torch.Generator(self.x.device).manual_seed(0)
        self.plain_adam = torch.optim.Adam(self.plain_logits, lr=0.1, capturable=capturable)

    def check(self) -> None:
        """The gate before any time is taken: the fused step's gradient is autograd's.

        In float32 they agree; in a lower precision both are compared with autograd in float32.

        Errors: WrongResult.
        """
        bank, layers = self.step.bank, self.step.net.layers
        memory, self.step.net.memory = self.step.net.memory, None
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            bank.sample_()
            loss = self.step.objective((self.x, self.y))
            bank.backward_(self.step.gradients(loss))
            for member in range(self.case.members):
                part = slice(member * len(layers), (member + 1) * len(layers))
                self._check_member(f"{self.case.name}, search {member}", part)
        self.step.net.memory = memory

    def _check_member(self, name: str, part: slice) -> None:
        bank = self.step.bank
        fused = _joined(bank.grads[part])
        exact = self._plain_gradient(part, torch.float32)
        if self.case.dtype == torch.float32:
            require_close(f"{name}: dR/dlogits against autograd's", fused, exact, 1e-3)
        else:
            theirs = self._plain_gradient(part, self.case.dtype)
            require_as_exact(f"{name}: dR/dlogits", fused, theirs, exact)

    def _plain_gradient(self, part: slice, dtype: torch.dtype) -> Tensor:
        bank = self.step.bank
        masked: dict[str, Tensor] = {}
        logits = [s.detach().clone().requires_grad_() for s in bank.logits[part]]
        places = range(part.start, part.stop)
        for (name, layer), i, s in zip(self.step.net.layers.items(), places, logits, strict=True):
            u = storage_noise(s.detach(), bank.seeds[i : i + 1], bank.step[1:], bank.layers[i])
            z = torch.sigmoid(torch.logit(u, 2.0**-24) / self.gate.tau + s)
            masked[f"{name}.weight"] = layer.raw_weight * z
        loss = self._plain_loss(masked, dtype)
        return _joined(torch.autograd.grad(loss, logits))

    def close(self) -> None:
        for scope in reversed(self._scopes):
            scope.__exit__(None, None, None)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten().float() for t in tensors])
