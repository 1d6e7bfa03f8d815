"""Objectives R that a search minimises over gates, the weights staying frozen (arXiv 2512.07142, section 3).

The sparse network is `net.sparse(x)`; the dense teacher `net.dense(x)` has the same frozen weights,
sees the same batch and takes no gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batches import Batch, parts_of
from .calls import forward
from .convert import require_dense_parameters
from .engine import plainly
from .losses import Loss
from .patterns import Gated
from .writing import FileError

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.PReLU, nn.LeakyReLU, nn.Hardswish)


class TeacherMemory:
    """The teacher's scores by sample.  Its weights are frozen: one epoch says all there is to know."""

    LIMIT = 1 << 28  # bytes; beyond that nothing is remembered

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.rows = torch.empty(0, dtype=torch.int64)  # the present batch's samples
        self.table: Tensor | None = None  # [samples, classes]
        self.complete = False  # after the first epoch

    def output(self, x: Any, dense: Callable[[Any], Any]) -> Any:
        """What `dense` gives for the batch x of the samples `rows`; only tensors are remembered."""
        if self.complete and self.table is not None:
            return self.table.index_select(0, self.rows)
        scores = dense(x)
        if not isinstance(scores, Tensor) or len(scores) != len(self.rows):
            return scores
        if self.samples * scores[0].numel() * scores.element_size() <= self.LIMIT:
            if self.table is None:
                self.table = scores.new_empty(self.samples, *scores.shape[1:])
            self.table.index_copy_(0, self.rows, scores)
        return scores


class Net:
    """A gated model seen as two functions of a batch's inputs: sparse (a sample) and dense (the teacher).

    Class scores are [B, classes, ...], wherever the model has its classes.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        self.model, self.loss = model, loss or Loss()
        self.target: Any = None  # the present batch's
        self.layers = require_dense_parameters(model)
        self.memory: TeacherMemory | None = None
        self.call: Callable[..., Any] = plainly  # how its forward is run
        self.side: Any = None  # a CUDA stream for the teacher, beside the sparse network's

    def task(self, batch: Batch) -> Tensor:
        """The loss of the network as it computes now."""
        return self.loss(self.model, batch, self.call)

    def output(self, x: Any) -> Any:
        """What the sampled sparse network gives."""
        return forward(self.model, x, self.call)

    def dense_output(self, x: Any) -> Any:
        """What the dense network gives, without gradient."""
        with torch.no_grad(), self.opened():
            return forward(self.model, x, self.call)

    def teacher_output(self, x: Any) -> Any:
        """What `dense_output` gives; looked up where the search remembers it."""
        return (
            self.dense_output(x)
            if self.memory is None
            else self.memory.output(x, self.dense_output)
        )

    def outputs(self, x: Any) -> tuple[Any, Any]:
        """(sparse, teacher), side by side where there is a stream for it."""
        if self.side is None:
            teacher = self.teacher_output(x)
            return _alike(self.output(x), teacher)
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            teacher = self.teacher_output(x)
        sparse = self.output(x)
        main.wait_stream(self.side)
        return _alike(sparse, teacher)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sparse, teacher) of the task's loss."""
        if self.loss.takes_model:
            with torch.no_grad(), self.opened():
                teacher = self.task(batch)
            return self.task(batch), teacher
        sparse, dense = self.outputs(parts_of(batch)[0])
        loss = self.loss.unsmoothed
        return loss.of(sparse, batch), loss.of(dense, batch)

    def scores(self, output: Any) -> Tensor:
        """Class scores [B, classes, ...] out of what the model gave.  Errors: ValueError where there are none."""
        return self.loss.class_scores(output, self.target)

    def sparse(self, x: Any) -> Tensor:
        """Class scores [B, classes, ...] of the sampled sparse network."""
        return self.scores(self.output(x))

    def dense(self, x: Any) -> Tensor:
        """Class scores [B, classes, ...] of the dense network, without gradient."""
        return self.scores(self.dense_output(x))

    def teacher(self, x: Any) -> Tensor:
        """What `dense` gives; looked up where the search remembers it."""
        return self.scores(self.teacher_output(x))

    def both(self, x: Any) -> tuple[Tensor, Tensor]:
        """Class scores (sparse, teacher), side by side where there is a stream for it."""
        sparse, teacher = self.outputs(x)
        return self.scores(sparse), self.scores(teacher)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """All gates open: the model computes with its dense weights."""
        gated = [m.pattern for m in self.layers.values() if isinstance(m.pattern, Gated)]
        for pattern in gated:
            pattern.open = True
        try:
            yield
        finally:
            for pattern in gated:
                pattern.open = False

    def weights(self) -> list[nn.Parameter]:
        """The frozen parameters of the gated layers, made differentiable."""
        drawn = (getattr(layer.pattern, "drawn", None) for layer in self.layers.values())
        if any(w is not None for w in drawn):
            raise ValueError(
                "an objective that differentiates in the weights: expected it to say so; give it "
                "second_order=True"
            )
        weights = [layer.raw_weight for layer in self.layers.values()]
        for w in weights:
            w.requires_grad_()
        return weights

    @contextmanager
    def activations(self) -> Iterator[list[Tensor]]:
        """Collects the output of every activation module called inside."""
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output)

        modules = [m for m in self.model.modules() if isinstance(m, ACTIVATIONS)]
        if not modules:
            names = ", ".join(kind.__name__ for kind in ACTIVATIONS)
            raise ValueError(
                f"feature objective: {type(self.model).__name__} has no activation module ({names}); "
                "use nn.ReLU() in place of F.relu, or another objective"
            )
        hooks = [m.register_forward_hook(keep) for m in modules]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Objective:
    """A scalar to minimise.

    `scale`: the constant c in front of R; those of `OBJECTIVES` are the ones of the paper's authors.  Where lambda
    follows a ratio of gradients (GradBalance) it hardly matters, with a lambda of its own it does: `fixed` and
    `lagrangian` weigh c R against the excess.

    `classes`: it compares class scores, which not every loss has.

    `second_order`: it is made of gradients in the weights (`net.weights()`), so that descending it
    differentiates twice.
    """

    name: str
    loss: Callable[[Net, Batch], Tensor]
    scale: float = 100.0
    second_order: bool = False
    classes: bool = False

    def __call__(self, net: Net, batch: Batch) -> Tensor:
        net.target = parts_of(batch)[1]
        return self.loss(net, batch) * self.scale


def _alike(sparse: Any, teacher: Any) -> tuple[Any, Any]:
    """Both outputs.  Errors: FileError where a checkpoint remembered a teacher of another shape."""
    if isinstance(sparse, Tensor) and isinstance(teacher, Tensor) and sparse.shape != teacher.shape:
        raise FileError(
            f"the search's checkpoint: expected a teacher of {tuple(sparse.shape)} scores a batch, got "
            f"{tuple(teacher.shape)}; remove it, and the search begins anew"
        )
    return sparse, teacher


def _task(net: Net, batch: Batch) -> Tensor:
    return net.task(batch)


def _loss_change(net: Net, batch: Batch) -> Tensor:
    sparse, teacher = net.losses(batch)
    return (sparse / teacher - 1).abs()


def _gradient_norm(net: Net, batch: Batch) -> Tensor:
    weights = net.weights()
    grads = torch.autograd.grad(net.task(batch), weights, create_graph=True)
    return -torch.stack([g.square().sum() for g in grads]).sum().sqrt()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), mean over the batch, from log-probabilities [B, classes, ...]: a sum over pixels or tokens."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _reverse_kl(net: Net, batch: Batch) -> Tensor:
    sparse, teacher = net.both(parts_of(batch)[0])
    return _kl(sparse.log_softmax(1), teacher.log_softmax(1))


def _forward_kl(net: Net, batch: Batch) -> Tensor:
    sparse, teacher = net.both(parts_of(batch)[0])
    return _kl(teacher.log_softmax(1), sparse.log_softmax(1))


def _standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / (values.std() + 1e-8)


def _standardised_samples(values: Tensor) -> Tensor:
    """[B, features]: each sample of mean 0 and deviation 1; 0 where all its features are alike."""
    # At least float32: 1e-9 is nothing in half precision.
    values = values.flatten(1).to(torch.promote_types(values.dtype, torch.float32))
    many = values.shape[1] > 1  # a single feature has no deviation from others
    deviation = values.std(1, correction=int(many), keepdim=True)
    return (values - values.mean(1, keepdim=True)) / (deviation + 1e-9)


def _matching(
    sparse: list[Tensor], dense: list[Tensor], standardised: Callable[[Tensor], Tensor]
) -> Tensor:
    pairs = zip(sparse, dense, strict=True)
    return torch.stack([F.mse_loss(standardised(s), standardised(d)) for s, d in pairs]).mean()


def _features(net: Net, batch: Batch) -> Tensor:
    # Without the class scores the last layer would see no gradient.
    x = parts_of(batch)[0]
    with net.activations() as dense:
        dense.append(net.dense(x).softmax(1))
    with net.activations() as sparse:
        sparse.append(net.sparse(x).softmax(1))
    return _matching(sparse, dense, _standardised_samples)


def _gradients(net: Net, batch: Batch) -> Tensor:
    weights = net.weights()
    with net.opened():
        dense = torch.autograd.grad(net.task(batch), weights)
    sparse = torch.autograd.grad(net.task(batch), weights, create_graph=True)
    return _matching(list(sparse), list(dense), _standardised)


task = Objective("task", _task)
loss_change = Objective("loss-change", _loss_change, scale=10_000.0)
"""|L_sparse / L_dense - 1| of the task's loss L."""
gradient_norm = Objective("gradient-norm", _gradient_norm, scale=1.0, second_order=True)
"""-||dL_sparse / dtheta||_2 over the weights under gates alone; the authors' norm counts biases and
normalisation too."""
reverse_kl = Objective("reverse-kl", _reverse_kl, classes=True)
forward_kl = Objective("forward-kl", _forward_kl, classes=True)
features = Objective("features", _features, classes=True)
"""Mean squared difference between the two networks' activations and softmax of class scores, each sample of each
standardised over its features; a mean over the layers."""
gradients = Objective("gradients", _gradients, second_order=True)
"""The same of the gradients of the weights under gates, each layer's standardised as a whole."""

OBJECTIVES = {
    o.name: o
    for o in (task, loss_change, gradient_norm, reverse_kl, forward_kl, features, gradients)
}
