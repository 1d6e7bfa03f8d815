"""Images in another memory format, and back to what each tensor had; optimisers fit for graphs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..kernels import laid_out_as


class Layout:
    """The memory format of models' images: weights, masks and the state that optimisers hold for them."""

    def __init__(
        self, models: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        self.models, self.optimizers = [*models], [*optimizers]
        self.channels_last = False  # whether all are laid out so
        self._turned: list[
            tuple[nn.Module, str, str]
        ] = []  # what lay otherwise: module, table, name

    def become(self, channels_last: bool) -> None:
        """All channels last, or as each was."""
        if channels_last == self.channels_last:
            return
        if channels_last:
            for model in self.models:
                self._turned += [at for at in _images(model) if not _is_last(_at(at))]
        format = torch.channels_last if channels_last else torch.contiguous_format
        for at in self._turned:
            _turn_(at, format)
        if not channels_last:
            self._turned.clear()
        self.channels_last = channels_last
        for optimizer in self.optimizers:
            for p, slots in optimizer.state.items():
                for name, value in slots.items():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        slots[name] = laid_out_as(value, p)

    def of(self, batch: Any) -> Any:
        """A batch, or a part of one, as the models want it."""
        return channels_last(batch) if self.channels_last else batch


def channels_last(batch: Any) -> Any:
    """A batch whose images lie so."""

    def turned(t: Any) -> Any:
        images = isinstance(t, Tensor) and t.ndim == 4
        return t.contiguous(memory_format=torch.channels_last) if images else t

    return tree_map(turned, batch)


def takes_images(model: nn.Module) -> bool:
    """Whether the memory format of images may matter to it; a planned convolution's parameter is a vector."""
    if any(p.ndim == 4 for p in model.parameters()):
        return True
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _images(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for module in model.modules():
        for table in ("_parameters", "_buffers"):
            for name, t in getattr(module, table).items():
                if t is not None and t.ndim == 4:
                    yield module, table, name


def _at(at: tuple[nn.Module, str, str]) -> Tensor:
    module, table, name = at
    return getattr(module, table)[name]


def _is_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def _turn_(at: tuple[nn.Module, str, str], format: torch.memory_format) -> None:
    module, table, name = at
    t = _at(at)
    if isinstance(t, nn.Parameter):  # optimisers know the object
        t.data = t.data.contiguous(memory_format=format)
    else:
        getattr(module, table)[name] = t.contiguous(memory_format=format)


@contextmanager
def state_kept(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    """Afterwards they hold state for what they held it for, in the same tensors."""
    saved = [{p: dict(slots) for p, slots in o.state.items()} for o in optimizers]
    try:
        yield
    finally:
        for optimizer, state in zip(optimizers, saved, strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)


_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def capturable_(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets an optimiser's steps be part of a graph, its rate included; returns it.

    Rates become tensors, which schedulers of torch fill in place, and those of `_FUSED` compute in one pass, which
    alone takes SGD's rate and a scaler's verdict from the device.
    """
    fused = isinstance(optimizer, _FUSED)
    for group in optimizer.param_groups:
        parameters = group["params"]
        device = parameters[0].device
        if not (fused or "capturable" in group):
            continue
        if "capturable" in group:
            group["capturable"] = device.type == "cuda"
        if fused:
            group |= {"fused": True, "foreach": False}
        for p in parameters:
            slots = optimizer.state.get(p, {})
            if isinstance(count := slots.get("step"), Tensor) and count.device != p.device:
                slots["step"] = count.to(p.device)
            # Fused SGD takes no parameter that joins later without one; a first step is the same with zeros.
            if slots == {} and optimizer.state and group.get("momentum"):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
    if fused:
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return optimizer
