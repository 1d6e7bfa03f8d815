"""How to train: optimiser, schedule and precision, as a frozen value."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .kinds import check_fields

MOST_EPOCHS = 1_000_000
MOST_MILESTONES = 1_000
_OPTIMIZERS = ("sgd", "adam", "adamw")
_SCHEDULES = ("constant", "step", "cosine")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to train.  Errors: ValueError for a value out of range.

    Args:
        schedule: `step` multiplies lr by `gamma` at each of `milestones` (fractions of the run, 1,000 at most).
        accumulate: micro-batches that a batch is cut into; the numbers are the same to rounding, where the loss is a
            mean over samples or labels, and not one that compares the samples of a batch.
        amp: `bf16` or `fp16` (GPU only) autocast; None trains in float32.
        ema: decay of an average of the weights that is evaluated in their place; None: off.
        augment: whether the data set's customary augmentation is used.
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    batch: int = 128
    epochs: int = 12
    schedule: str = "step"
    milestones: tuple[float, ...] = (0.7,)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    amp: str | None = None
    accumulate: int = 1
    ema: float | None = None
    clip_norm: float | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.milestones) > MOST_MILESTONES:
            raise ValueError(
                f"recipe milestones: expected at most {MOST_MILESTONES:,} fractions, got {len(self.milestones):,}"
            )
        nesterov = not self.nesterov or self.optimizer != "sgd" or self.momentum > 0
        checks = (
            ("optimizer", self.optimizer in _OPTIMIZERS, f"one of {', '.join(_OPTIMIZERS)}"),
            ("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
            ("amp", self.amp in (None, *_DTYPES), "null, bf16 or fp16"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("momentum", 0 <= self.momentum < 1, "0 <= momentum < 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("nesterov", nesterov, "false where sgd's momentum is 0"),
            ("batch", 1 <= self.batch < 2**31, "1 to 2**31 - 1"),
            ("epochs", 1 <= self.epochs <= MOST_EPOCHS, f"1 to {MOST_EPOCHS:,}"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "fractions between 0 and 1"),
            ("gamma", 0 < self.gamma <= 1, "0 < gamma <= 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs <= MOST_EPOCHS, f"0 to {MOST_EPOCHS:,}"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 <= label_smoothing < 1"),
            ("accumulate", 1 <= self.accumulate <= self.batch, "1 <= accumulate <= batch"),
            ("ema", self.ema is None or 0 < self.ema < 1, "null or 0 < ema < 1"),
            (
                "clip_norm",
                self.clip_norm is None or 0 < self.clip_norm < math.inf,
                "null or positive",
            ),
        )
        for name, good, expected in checks:
            if not good:
                raise ValueError(f"recipe {name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Of autocast; None: there is none."""
        return _DTYPES.get(self.amp or "")

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that forwards run in."""
        return torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def lr_at(self, epoch: float, total: float) -> float:
        """The learning rate at an absolute, fractional epoch of a run of `total` epochs."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= m * total - 1e-9 for m in self.milestones)
        if self.schedule == "cosine":
            done = (epoch - self.warmup_epochs) / max(total - self.warmup_epochs, 1e-9)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.lr


MOST_STEPS = 2**25  # a table of 256 MiB
_CHUNK = 2**20


def steps_in_all(epochs: int, steps: int) -> int:
    """Of so many epochs of so many steps.  Errors: ValueError for more than 33 million, which tables are made of."""
    if epochs * steps > MOST_STEPS:
        raise ValueError(
            f"epochs: expected at most {MOST_STEPS:,} steps in all, got {epochs:,} epochs of {steps:,}; take fewer "
            "epochs, or larger batches"
        )
    return epochs * steps


def rates(recipe: Recipe, total: float, stop: float, steps: int) -> Tensor:
    """`lr_at` in the middle of every step of a run: float64 [ceil(stop) * steps], bit for bit, in a tenth of the time.

    The middle, since a warm-up shall not start with a step of size 0.

    Args:
        total: epochs that the schedule spans.
        stop: the epoch at which the run ends.
        steps: in an epoch.

    Errors: ValueError for more than 33 million steps.
    """
    epochs = math.ceil(stop)
    steps_in_all(epochs, steps)
    middles = np.array([(i + 0.5) / steps for i in range(steps)])
    rows = max(_CHUNK // max(steps, 1), 1)
    parts = [
        _rates_at(recipe, total, np.add.outer(np.arange(a, min(a + rows, epochs)), middles).ravel())
        for a in range(0, epochs, rows)
    ]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.float64)


def _rates_at(recipe: Recipe, total: float, epochs: np.ndarray) -> np.ndarray:
    """`recipe.lr_at` of many epochs, by the same operations in the same order."""
    found = np.full_like(epochs, recipe.lr)
    if recipe.schedule == "step":
        passed = sum((epochs >= m * total - 1e-9).astype(int) for m in recipe.milestones)
        powers = [recipe.lr * recipe.gamma**k for k in range(len(recipe.milestones) + 1)]
        found = np.array(powers)[passed + np.zeros(len(epochs), int)]
    if recipe.schedule == "cosine":
        done = (epochs - recipe.warmup_epochs) / max(total - recipe.warmup_epochs, 1e-9)
        # numpy's cosine may differ from Python's in the last bit
        cosines = np.fromiter(map(math.cos, (math.pi * np.minimum(done, 1.0)).tolist()), float)
        found = recipe.lr * 0.5 * (1 + cosines)
    early = epochs < recipe.warmup_epochs
    if early.any():
        found[early] = recipe.lr * epochs[early] / recipe.warmup_epochs
    return found


def require_trainable(model: nn.Module) -> None:
    """Errors: ValueError for a model without parameters that require gradients."""
    if not any(p.requires_grad for p in model.parameters()):
        count = sum(1 for _ in model.parameters())
        got = (
            f"{count} that are frozen; call requires_grad_(True) on what shall train"
            if count
            else "none"
        )
        raise ValueError(f"model: expected parameters that require gradients, got {got}")
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise ValueError(
                f"model: expected real parameters, as optimisers here take them, got {name} of "
                f"{str(p.dtype).removeprefix('torch.')}; freeze it, or hold it as torch.view_as_real"
            )


def optimizer_for(
    parameters: list[nn.Parameter], recipe: Recipe, *, lr: Tensor | None = None
) -> torch.optim.Optimizer:
    """A recipe's optimiser, whose steps may be part of a CUDA graph.

    lr: the tensor [1] that it takes its rate from; None: one of its own.
    """
    device = parameters[0].device
    if lr is None:  # the CPU reads it as Python's own number
        wide = torch.float64 if device.type == "cpu" else torch.float32
        lr = torch.tensor([recipe.lr], dtype=wide, device=device)
    # fused: one pass over weights, gradients and moments
    options: dict[str, Any] = {"lr": lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
        return torch.optim.SGD(parameters, **options)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, capturable=device.type == "cuda", **options)
