"""A whole training step of a decided ticket: as a user would write it, by other packages, by our plans.

Every provider starts from the same weights and takes the same step, which the engine launches: zero_grad,
forward, cross-entropy, backward, fused AdamW; on a GPU under autocast to bf16.  Before it is timed in some way, its
first step so must give the outputs, the gradients and the weights of the dense*mask step; of a graph its first
replay, the second step.
"""

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sparsecore as sc
from sparsecore import capture
from sparsecore.engine import Engine, Given, TrainingStep, Way, capturable_
from sparsecore.layer import weight_key

from .measure import error, require_as_exact
from .ticket_cases import DENSE, MASKED, TrainCase

# A layer's parameter, and where the kept weights stand in it; None: it holds nothing else.
Kept = dict[str, tuple[nn.Parameter, Tensor | None]]


@dataclass(frozen=True)
class Task:
    """What all providers of a case share at one sparsity.

    Args:
        model: dense, with the weights that every step starts from.
        cache: where "plan auto" remembers.
        low: whether to compute in bf16.
    """

    case: TrainCase
    model: nn.Module
    masks: Mapping[str, Tensor]
    x: Tensor
    y: Tensor
    cache: Path
    low: bool

    @property
    def amp(self) -> torch.dtype | None:
        return torch.bfloat16 if self.low else None


class _Loss:
    """Cross-entropy, and the scores that it was last of."""

    scores: Tensor

    def __call__(self, scores: Tensor, y: Tensor) -> Tensor:
        self.scores = scores.detach()
        return F.cross_entropy(scores, y)


class Step:
    """One training step of a provider.

    Args:
        task: whose dense*mask step it equals.
    """

    def __init__(self, task: Task, model: nn.Module, kept: Kept) -> None:
        self.task, self.model, self.kept = task, model, kept
        held = {id(parameter) for parameter, _ in kept.values()}
        self.others = [p for p in model.parameters() if id(p) not in held]
        self.optimiser = torch.optim.AdamW(model.parameters(), fused=True)
        if capture.possible_on(task.x.device):
            capturable_(self.optimiser)
        self.loss = _Loss()
        self.training = TrainingStep(model, self.loss, self.optimiser, amp=task.amp)

    @contextmanager
    def launched(self, way: Way) -> Iterator[Engine]:
        """The step from the task's weights on, one a call; it leaves no trace."""
        x = self.task.x
        if way.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        feed = Given(x.device)
        feed.now = (x, self.task.y), None
        with self.training.undone():
            yield Engine(self.training, feed, way)

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last step's outputs and gradients, and the weights behind it."""
        return self.loss.scores.clone(), self.gradients(), self.weights()

    def gradients(self) -> Tensor:
        """Of the kept weights in row-major order, layer by layer, and of all other parameters."""
        return self._joined(_gradient)

    def weights(self) -> Tensor:
        """The same of the parameters."""
        return self._joined(lambda parameter: parameter.detach())

    def _joined(self, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        found = [of(p) if at is None else of(p)[at] for p, at in self.kept.values()]
        return torch.cat([t.flatten() for t in (*found, *map(of, self.others))])

    def sizes(self) -> dict[str, int]:
        """Bytes of the optimiser's moments and of the parameters."""
        states = self.optimiser.state.values()
        moments = [state[k] for state in states for k in ("exp_avg", "exp_avg_sq") if k in state]
        return {
            "optimiser state": _bytes(moments),
            "parameters": _bytes(list(self.model.parameters())),
        }

    def formats(self) -> str:
        """What a plan chose, layer by layer, or how often in models of many layers; empty without one."""
        patterns = {name: layer.pattern for name, layer in sc.sparse_layers(self.model).items()}
        chosen = {}
        for plan in sc.report(self.model):
            formats, pattern = plan.choice.formats, patterns[plan.name]
            # A module that takes the weight out of its layer multiplies by itself: nothing is chosen.
            open_ = formats is None and isinstance(pattern, sc.Planned)
            chosen[plan.name] = "weight taken out" if open_ else _text(formats)
        if len(chosen) > 4:
            return "; ".join(
                f"{count} x {text}" for text, count in Counter(chosen.values()).items()
            )
        return "; ".join(f"{name}: {text}" for name, text in chosen.items())


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _text(formats: tuple[str, ...] | None) -> str:
    names = ("mask",) if formats is None else formats
    return names[0] if len(set(names)) == 1 else " / ".join(names)


# --- Providers --------------------------------------------------------------------------------------


def make(provider: str, task: Task, *, captured: bool = False) -> Step:
    """A provider's step.

    Args:
        captured: whether steps will be CUDA graphs, as "plan auto" is told.

    Errors: ImportError for a package that is not there, ValueError for a format that cannot do this, and
    what other packages raise.
    """
    if provider == "sparselab":
        return _sparselab(task)
    model = copy.deepcopy(task.model)
    if provider == DENSE:
        kept = Kept()
    elif provider == MASKED:
        kept = _masked(model, task.masks)
    elif provider.startswith("plan "):
        kept = _planned(model, task, provider.removeprefix("plan "), captured)
    else:
        kept = _csr(model, task.masks, by_hand=provider.endswith("own backward"))
    return Step(task, model, kept)


class _Times(nn.Module):
    """A mask as a parametrization, as torch.nn.utils.prune computes it too."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.get_buffer("mask")


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Kept:
    kept, plain = Kept(), dict(model.named_parameters())
    for name, mask in masks.items():
        path, _, key = weight_key(name, plain).rpartition(".")
        weight = plain[f"{path}.{key}".lstrip(".")]
        factor = torch.empty_like(weight).copy_(mask)
        parametrize.register_parametrization(model.get_submodule(path), key, _Times(factor))
        kept[name] = (weight, mask)
    return kept


def _planned(model: nn.Module, task: Task, plan: str, captured: bool) -> Kept:
    sc.sparsify_(model, lambda name, _: name in task.masks)
    layers = sc.sparse_layers(model)
    for name, mask in task.masks.items():
        layers[name].set_mask_(mask)
    with torch.autocast(task.x.device.type, task.amp, enabled=task.low):
        sc.plan_(model, plan, task.x, captured=captured, cache=task.cache)
    kept = Kept()
    for name, mask in task.masks.items():
        raw = layers[name].raw_weight
        kept[name] = (raw, mask if raw.ndim > 1 else None)
    return kept


class _ByHand(torch.autograd.Function):
    """csr @ x.T with the fastest operations of torch.sparse behind: a transpose made once, sampled_addmm."""

    @staticmethod
    def forward(ctx, values: Tensor, x: Tensor, layer: "_CsrLinear") -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.layer = layer
        return (layer.matrix(values) @ x.T).T

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,), (values, x), layer = grads, ctx.saved_tensors, ctx.layer
        dx = None
        if ctx.needs_input_grad[1]:
            back = _matrix(layer.back, values[layer.order], layer.shape[::-1])
            dx = (back @ dy.T).T
        pattern = layer.matrix(values)
        dw = torch.sparse.sampled_addmm(pattern, dy.T.contiguous(), x, beta=0.0)
        return dw.values(), dx, None


class _CsrLinear(nn.Module):
    """A linear layer on torch.sparse's compressed rows; the parameter holds their values."""

    def __init__(self, layer: nn.Linear, mask: Tensor, *, by_hand: bool) -> None:
        super().__init__()
        self.shape, self.by_hand, self.bias = tuple(mask.shape), by_hand, layer.bias
        self.weight = nn.Parameter(layer.weight.detach()[mask])
        self.rows = _compressed(mask)
        self.back = _compressed(mask.T)
        rank = torch.zeros(mask.shape, dtype=torch.int64)
        rank[mask] = torch.arange(len(self.weight))
        self.order = rank.T[mask.T]

    def matrix(self, values: Tensor) -> Tensor:
        return _matrix(self.rows, values, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            y: Any = _ByHand.apply(self.weight, x, self)
        else:
            y = (self.matrix(self.weight) @ x.T).T
        return y + self.bias


def _compressed(mask: Tensor) -> tuple[Tensor, Tensor]:
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0))
    return offsets.int(), mask.nonzero()[:, 1].int()


def _matrix(at: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_csr_tensor(at[0], at[1], values, shape, check_invariants=False)


def _csr(model: nn.Module, masks: Mapping[str, Tensor], *, by_hand: bool) -> Kept:
    kept = Kept()
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or mask.is_cuda:
            raise ValueError("torch.sparse's compressed rows: expected linear layers on the CPU")
        sparse = _CsrLinear(layer, mask, by_hand=by_hand)
        model.set_submodule(name, sparse)
        kept[name] = (sparse.weight, None)
    return kept


def _sparselab(task: Task) -> Step:
    """The package's layers draw masks of their own, so their step equals that of another ticket."""
    linear = importlib.import_module("sparselab.nn").SparseLinear
    dense_of = importlib.import_module("sparselab.layout").to_dense
    # It remembers transposes by the identity of objects, which others have when those are gone.
    importlib.import_module("sparselab.ops")._clear_transpose_cache()
    model, base = copy.deepcopy(task.model), copy.deepcopy(task.model)
    kept, masks = Kept(), {}
    for name, mask in task.masks.items():
        layer = base.get_submodule(name)
        if not isinstance(layer, nn.Linear) or mask.is_cuda:
            raise ValueError("sparselab: expected linear layers on the CPU")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mask.numel())
            share = float(mask.float().mean())
            sparse = linear(layer.in_features, layer.out_features, sparsity=1 - share)
        rows = sparse._csr
        extents = [(int(s), int(n)) for s, n in zip(rows.row_start, rows.row_nnz, strict=True)]
        slots = torch.cat([torch.arange(s, s + n) for s, n in extents])
        counts = torch.tensor([n for _, n in extents])
        columns = torch.tensor(rows.col_indices)[slots].long()
        mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
        mask[torch.arange(len(counts)).repeat_interleave(counts), columns] = True
        with torch.no_grad():
            layer.weight.copy_(dense_of(rows))
            sparse.bias.copy_(layer.bias)
        model.set_submodule(name, sparse)
        kept[name], masks[name] = (sparse._values, slots), mask
    return Step(replace(task, model=base, masks=masks), model, kept)


# --- Is it right? -----------------------------------------------------------------------------------


class Reference:
    """The first dense*mask steps of a task: in the precision that is timed, and in one above it."""

    WHAT = ("outputs", "gradients", "weights after the step")

    def __init__(self, task: Task) -> None:
        self.count = 2 if capture.possible_on(task.x.device) else 1
        self.task, above = task, replace(task, low=False)
        if not task.low:
            model = copy.deepcopy(task.model).double()
            above = replace(above, model=model, x=task.x.double())
        with _exact():
            self.exact = _taken(make(MASKED, above), self.count, Way())
        self._plain: dict[bool, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def plain(self, channels_last: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        """In the memory format that is timed: PyTorch's BatchNorm on a CPU sums less exactly in channels_last."""
        if channels_last not in self._plain:
            way = Way(channels_last=channels_last)
            self._plain[channels_last] = _taken(make(MASKED, self.task), self.count, way)
        return self._plain[channels_last]

    def require(self, what: str, step: Step, engine: Engine) -> None:
        """Takes the step's first one, of a graph its first two, and compares the last.  Errors: WrongResult."""
        at, way = int(engine.way.graph), engine.way
        # A compiler sums in an order of its own: as exactly as PyTorch does in one of its formats.
        formats = {way.channels_last, way.compiled and self.task.x.ndim == 4}
        plains = [self.plain(last)[at] for last in formats]
        for _ in range(at + 1):
            engine()
        found = zip(self.WHAT, step.found(), *plains, self.exact[at], strict=True)
        for of, mine, *theirs, exact in found:
            worst = max(theirs, key=lambda t, exact=exact: error(t, exact))
            require_as_exact(f"{what}: {of}", mine, worst, exact)


def _taken(step: Step, count: int, way: Way) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each of the first steps gives."""
    found = []
    with step.launched(way) as engine:
        for _ in range(count):
            engine()
            found.append(step.found())
    return found


@contextmanager
def _exact() -> Iterator[None]:
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)
