"""For loops of one's own: a step that is launched by the engine, or a model whose passes are graphs."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import capture
from ..batches import Batch, kind_of
from ..kinds import checked
from ..losses import LossLike
from ..recipe import require_trainable
from .auto import launch
from .engine import check_engine, stamp
from .feeds import Given
from .layout import capturable_, takes_images
from .training_step import Penalty, TrainingStep


class TrainStep:
    """One optimiser step a call, launched one by one, as a CUDA graph, compiled, or both; whatever is fastest.

        step = sparsecore.TrainStep(model, F.cross_entropy, optimizer, (x, y))
        for x, y in loader:
            loss = step(x, y)

    Between steps everything may change: the rate, masks and plans, modes of modules, frozen parameters, what is
    loaded; a graph of another model is captured anew.  A batch of another shape than the example's, as the last of
    an epoch, is launched by itself.  Other numbers are the graph's own: one of the optimiser's that changes in every
    step (OneCycleLR's momentum: `cycle_momentum=False`) leaves no graph, and a dropout's p that changes is not seen.

    Args:
        model: on its device, in training mode, planned already if it is to be.
        loss: of (what the model gives, y), a mean over the batch, or what else `losses.Loss` takes.  As part of a
            graph it runs once: what it counts or draws in Python it does no more, and tensors that it reads are to be
            changed in place.
        optimizer: of the model's parameters.  On a GPU its rate becomes a tensor there, and SGD, Adam and AdamW
            compute fused.
        example: a batch (x, y) like those to come; also a flat tuple of several inputs and y, or a dict.
        engine: "auto" tries some steps, which leave no trace, and may lay convolutions out channels last; or
            "eager", "graph", "compile", "compile-graph".
        steps: about how many there will be: compiling has to pay in them.
        amp: the dtype of autocast, that around a call by default; fp16 wants a `scaler`.
        clip_norm: of all gradients together.
        accumulate: micro-batches that a batch is cut into.
        penalty: of the model, added to the loss.

    Attributes:
        told: how steps are launched, and why if there was a choice.

    Errors: ValueError for no engine's name; EngineError for one that is not possible here.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        loss: LossLike,
        optimizer: torch.optim.Optimizer,
        example: Batch,
        *,
        engine: str = "auto",
        steps: int = 10_000,
        amp: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        penalty: Penalty | None = None,
    ) -> None:
        require_trainable(model)
        device = next(model.parameters()).device
        wanted = check_engine(engine) not in ("eager", "compile")
        self._graphs = wanted and capture.possible_on(device)
        self._rates: dict[int, Tensor] = {}  # of graphs, by the optimiser's group
        self._optimizer, self._amp = optimizer, amp
        self._hold_rates()
        step = TrainingStep(
            model, loss, optimizer, amp=self._precision(device), scaler=scaler, clip_norm=clip_norm,
            accumulate=accumulate, penalty=penalty,
        )  # fmt: skip
        self._step, self._feed = step, Given(device)
        self._feed.put((example, None))  # its shape is the usual one
        layouts = takes_images(model)
        self._engine = launch(step.become, self._feed, engine=engine, steps=steps, layouts=layouts)
        self.told = self._engine.told or str(self._engine.way)

    def __call__(self, *batch: Any) -> Tensor:
        """The mean loss before the step, 0-dim, on the device; no host sync.

        batch: x and y, all parts of a flat batch, or a whole batch as one argument.
        """
        self._step.amp = self._precision(self._step.device)
        self._hold_rates()
        self._feed.now = (batch[0] if len(batch) == 1 else batch), None
        self._engine.refresh()
        self._engine()
        return self._step.last.clone()

    def _precision(self, device: torch.device) -> torch.dtype | None:
        if self._amp is None and torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self._amp

    def _hold_rates(self) -> None:
        """Rates go where a graph reads them, those too that somebody set as numbers."""
        if not self._graphs:
            return
        groups = self._optimizer.param_groups
        for i, group in enumerate(groups):
            if i in self._rates and not isinstance(group["lr"], Tensor):
                group["lr"] = self._rates[i].fill_(group["lr"])
        capturable_(self._optimizer)
        rates = {i: group["lr"] for i, group in enumerate(groups)}
        self._rates = {i: rate for i, rate in rates.items() if isinstance(rate, Tensor)}


@checked
def graphed(model: nn.Module, *example: Tensor) -> nn.Module:
    """The model, whose forward and backward in training mode are CUDA graphs; loop, AMP and DDP stay one's own.

    `torch.cuda.make_graphed_callables` underneath, with its conditions: the forward makes no host sync, and calls come
    one at a time.  Here other shapes, keywords, evaluation and a forward without gradients run as before, and
    another mask, plan or autocast is captured anew, at the next call.  Wrap it in DDP afterwards.  Without a
    GPU nothing changes.

    Args:
        example: inputs of a training step: their shapes and dtypes count.

    Errors: ValueError for inputs that are not tensors (`TrainStep` takes batches of any kind).
    """
    for given in example:
        if not isinstance(given, Tensor):
            raise ValueError(
                f"graphed: expected tensors, one for each input, got {kind_of(given)}; "
                "TrainStep takes batches of any kind"
            )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not capture.possible_on(device):
        return model
    model.forward = _Passes(model, example)
    return model


class _Passes:
    """A model's forward as graphs, in its forward's place."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        self.model, self.example, self.plain = model, example, model.forward
        self.made_of: Any = None
        self.run: Callable[..., Any] = self.plain

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        model, example = self.model, self.example
        usual = not named and len(inputs) == len(example) and all(map(_alike, inputs, example))
        if not (usual and model.training and torch.is_grad_enabled()):
            return self.plain(*inputs, **named)
        kind = inputs[0].device.type
        now = stamp(model), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        if now != self.made_of:
            model.forward = self.plain
            try:
                self.run, self.made_of = _captured(model, example), now
            finally:
                model.forward = self
        return self.run(*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy computes with its own weights, as a model that is not graphed."""
        return MethodType(type(self.model).forward, memo[id(self.model)])


def _captured(model: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """A graphed forward; the passes that it is tried with leave no trace."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    inputs = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in example)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # what is cast in a graph stays in the graph
    try:
        with capture.aside(example[0].device):
            torch.cuda.make_graphed_callables(model, inputs)
    finally:
        torch.set_autocast_cache_enabled(cached)
    with torch.no_grad():
        for b, before in buffers:
            b.copy_(before)
    for p, before in grads:
        p.grad = before
    return model.forward


def _alike(t: Any, example: Tensor) -> bool:
    return (
        isinstance(t, Tensor)
        and t.shape == example.shape
        and t.dtype == example.dtype
        and t.requires_grad == example.requires_grad
    )
