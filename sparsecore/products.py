"""What a planner times: forward, dX and dW of one layer in a format, and dense."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels
from .kernels import Layer, OutOfResources
from .patterns import Dense, Masked


def _gradient(layer: Layer, x: Tensor) -> Tensor:
    """dy in the memory format of x, as a model hands it down."""
    dy = torch.ones(layer.output(x.shape), dtype=x.dtype, device=x.device)
    last = layer.conv and x.is_contiguous(memory_format=torch.channels_last)
    return dy.contiguous(memory_format=torch.channels_last) if last else dy


Products = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


def products_of(name: str, mask: Tensor, layer: Layer, weight: Tensor, x: Tensor) -> Products:
    """Forward, dX and dW of a format, ready to be timed."""
    plan = kernels.plan_of(mask, name, dtype=x.dtype, slide=layer.slide, groups=layer.groups)
    format, storage = plan.forward
    values = weight[mask].float()
    dy = _gradient(layer, x)

    def made() -> Tensor:
        return format.weight(values, layer, storage, x.dtype, None)[0]

    again = made()  # dX takes what forward has made
    if not format.feature_major or layer.conv:
        return (
            lambda: format.forward(x, made(), None, layer, storage),
            lambda: format.grad_input(dy, again, layer, storage, list(x.shape)),
            lambda: format.grad_values(dy, x, values, layer, storage),
        )
    # x is turned once, before forward, unless it comes turned; gradients come as y went.
    turned, dy = x.T.contiguous().T, dy.T.contiguous().T
    return (
        lambda: format.forward(x.T.contiguous().T, made(), None, layer, storage),
        lambda: format.grad_input(dy, again, layer, storage, list(x.shape)),
        lambda: format.grad_values(dy, turned, values, layer, storage),
    )


def dense_products(name: str, mask: Tensor, layer: Layer, weight: Tensor, x: Tensor) -> Products:
    """The same of a dense weight ("dense") or of weight times mask ("mask")."""
    # What such a layer computes with, both ways.
    pattern = Masked(mask) if name == "mask" else Dense()
    dy = _gradient(layer, x)

    def forward() -> Tensor:
        if layer.conv:
            return F.conv2d(x, pattern(weight), None, *layer.pairs, groups=layer.groups)
        return F.linear(x, pattern(weight))

    def backward(want_x: bool) -> Tensor:
        if layer.conv:
            wanted = [want_x, not want_x, False]
            dx, dw, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, *layer.pairs, False, [0, 0], layer.groups, wanted
            )
            result = dx if want_x else dw
        else:
            result = dy @ weight if want_x else dy.T @ x
        return result if want_x else pattern(result)

    return forward, lambda: backward(True), lambda: backward(False)


def runs(products: Products) -> bool:
    """Whether the device has what their kernels ask for; compiles them."""
    try:
        with torch.no_grad():
            for product in products:
                product()
    except OutOfResources:
        return False
    return True
