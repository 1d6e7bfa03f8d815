"""What is measured: cases as data, and the steps built from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.convert import batch_statistics
from sparsecore.gates import Concrete
from sparsecore.kernels import uniform_
from sparsecore.objectives import TeacherMemory
from sparsecore.recipes import build
from sparsecore.search import ConcreteSearch
from sparsecore.search.steps import FusedStep


@dataclass(frozen=True)
class StepCase:
    """One search step of a model at a batch size."""

    model: str
    shape: tuple[int, int, int]
    batch: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.model}/batch={self.batch}"


STEP_CASES = (
    StepCase("lenet-300-100", (1, 28, 28), 128, 100),
    StepCase("lenet-300-100", (1, 28, 28), 512, 60),
    StepCase("resnet-20", (3, 32, 32), 128, 8),
    StepCase("vit-small", (3, 32, 32), 64, 5),
)


class StepBench:
    """A model with gates, its dense twin, and one batch."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.batch, *case.shape, generator=generator).to(device)
        self.y = torch.randint(0, 10, (case.batch,), generator=generator).to(device)
        self.dense = build(case.model, case.shape, 10).to(device).train()
        self.model = sc.sparsify_(build(case.model, case.shape, 10).to(device))
        self.gate = Concrete(tau=1.0)
        self.search = ConcreteSearch(gate=self.gate)
        self._scopes = [
            batch_statistics(self.model),
            self.search._gated(self.model, sc.sparse_layers(self.model), 0.01),
        ]
        self._scopes[0].__enter__()
        self.step = FusedStep(self.search, self.model, self._scopes[1].__enter__(), 0.01)
        self.samples = torch.arange(case.batch, device=device)
        self.memory = TeacherMemory(case.batch)
        self.memory.rows = self.samples
        self.memory.scores(self.x, self.step.net.dense)
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
        loss = self._plain_loss(masked)
        task = torch.autograd.grad(loss, logits)
        kept = torch.stack([torch.sigmoid(s).sum() for s in logits]).sum()
        pulls = torch.autograd.grad(100 * (kept / self.step.target - 1), logits)
        norms = [torch.cat([g.flatten() for g in part]).norm() for part in (task, pulls)]
        for s, a, b in zip(logits, task, pulls, strict=True):
            s.grad = a + norms[0] / norms[1] * b
        self.plain_adam.step()
        return loss.detach()

    def _plain_loss(self, masked: dict[str, Tensor]) -> Tensor:
        """The reverse KL of the network with these weights to the dense one, by plain autograd."""
        with self.step.net.opened():
            with torch.no_grad():
                teacher = self.model(self.x).log_softmax(-1)
            parameters: dict[str, Tensor] = dict(self.model.named_parameters())
            student = torch.func.functional_call(self.model, parameters | masked, (self.x,))
        scores = student.log_softmax(-1)
        return 100 * F.kl_div(teacher, scores, reduction="batchmean", log_target=True)

    def prepare_plain(self) -> None:
        shapes = [w.shape for w in self.weights]
        start = self.gate.init(0.01)
        self.plain_logits = [
            nn.Parameter(torch.full(shape, start, device=self.x.device)) for shape in shapes
        ]
        self.plain_noise = torch.Generator(self.x.device).manual_seed(0)
        self.plain_adam = torch.optim.Adam(self.plain_logits, lr=0.1)

    def check(self) -> None:
        """The gate before any time is taken: the fused step's gradient is autograd's."""
        bank, gates = self.step.bank, self.step.gated.values()
        bank.sample_()
        loss = self.step.objective((self.x, self.y))
        bank.backward_(torch.autograd.grad(loss, self.step.leaves))
        fused = [g.clone() for g in bank.grads]
        masked: dict[str, Tensor] = {}
        for (name, layer), gate in zip(self.step.net.layers.items(), gates, strict=True):
            u = uniform_(torch.empty_like(gate.logits), bank.seeds[:1], bank.step[1:], gate.layer)
            z = torch.sigmoid(torch.logit(u, 2.0**-24) / self.gate.tau + gate.logits)
            masked[f"{name}.weight"] = layer.raw_weight * z
        loss = self._plain_loss(masked)
        logits = [gate.logits for gate in gates]
        for a, b in zip(fused, torch.autograd.grad(loss, logits), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))

    def close(self) -> None:
        for scope in reversed(self._scopes):
            scope.__exit__(None, None, None)
