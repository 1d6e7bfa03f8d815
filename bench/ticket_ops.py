"""Products of one layer alone: a format's forward, dX and dW against dense ones and other block kernels.

Each is called as its library is, from operands that already lie as it wants them; a time is that of its
kernels, from an empty level-2 cache, the host running ahead.  The weight's values are float32 parameters for
ours, and copies in the compute dtype for others, who would cast them beside.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecore import kernels
from sparsecore.kernels import Layer

from .measure import Job, require_as_exact, say, timed
from .rows import Rows, add_times
from .ticket_cases import DENSE, OpCase, random_mask

FORWARD, DX, DW = "forward", "dX", "dW"


class Product(NamedTuple):
    """What is timed, and how its result is read: [T, n], [T, k], or the kept weights' gradient [nnz]."""

    step: Callable[[], Any]
    read: Callable[[Any], Tensor] = lambda result: result


Products = dict[str, Product]


@dataclass
class Problem:
    """A layer with a masked weight, its input and the gradient of its output."""

    layer: Layer
    mask: Tensor
    weight: Tensor
    x: Tensor
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        operands = (t.to(dtype) for t in (self.weight, self.x, self.dy))
        return Problem(self.layer, self.mask, *operands)


def problem_of(case: OpCase, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def randn(shape: tuple[int, ...]) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device)
        return made.contiguous(memory_format=torch.channels_last) if case.side else made

    mask = random_mask(case.weight_shape, case.format, case.sparsity).to(device)
    pad = case.taps // 2
    layer = Layer(case.weight_shape, (1, 1, pad, pad, 1, 1) if case.side else ())
    weight = randn(case.weight_shape) * (case.k * case.taps**2) ** -0.5 * mask
    x, dy = randn(case.shape(case.k)), randn(case.shape(case.n))
    return Problem(layer, mask, weight, x, dy).to(dtype)


# --- Providers --------------------------------------------------------------------------------------


def dense(p: Problem) -> Products:
    """The vendor's library."""

    def read(dw: Tensor) -> Tensor:
        return dw[p.mask]

    if not p.layer.conv:
        return {
            FORWARD: Product(lambda: F.linear(p.x, p.weight)),
            DX: Product(lambda: p.dy @ p.weight),
            DW: Product(lambda: p.dy.T @ p.x, read),
        }

    stride, pad, dilation = p.layer.pairs

    def backward(at: int) -> Tensor:
        wanted = [i == at for i in range(3)]
        return torch.ops.aten.convolution_backward(
            p.dy, p.x, p.weight, None, stride, pad, dilation, False, [0, 0], 1, wanted
        )[at]

    return {
        FORWARD: Product(lambda: F.conv2d(p.x, p.weight, None, stride, pad, dilation)),
        DX: Product(lambda: backward(0)),
        DW: Product(lambda: backward(1), read),
    }


def ours(p: Problem, name: str) -> Products:
    """A format's products.  Errors: ValueError for one that does not exist or cannot do this."""
    plan = kernels.plan_of(p.mask, name, dtype=p.x.dtype, slide=p.layer.slide)
    format, storage = plan.forward
    values = p.weight[p.mask].float()
    shape = list(p.x.shape)

    def made() -> Tensor:
        return format.weight(values, p.layer, storage, p.x.dtype, None)[0]

    again = made()  # dX takes what forward has made
    return {
        FORWARD: Product(lambda: format.forward(p.x, made(), None, p.layer, storage)),
        DX: Product(lambda: format.grad_input(p.dy, again, p.layer, storage, shape)),
        DW: Product(lambda: format.grad_values(p.dy, p.x, values, p.layer, storage)),
    }


def torch_bsr(p: Problem, side: int) -> Products:
    """PyTorch's compressed block rows; on a GPU by its Triton kernels, with its own tables of parameters."""
    weight = p.weight.to_sparse_bsr((side, side))
    back = p.weight.T.contiguous().to_sparse_bsr((side, side))
    if not p.x.is_cuda:
        return {
            FORWARD: Product(lambda: (weight @ p.x.T).T),
            DX: Product(lambda: (back @ p.dy.T).T),
        }
    ops = importlib.import_module("torch.sparse._triton_ops")
    return {
        FORWARD: Product(lambda: ops.bsr_dense_mm(weight, p.x.T).T),
        DX: Product(lambda: ops.bsr_dense_mm(back, p.dy.T).T),
        DW: Product(
            lambda: ops.sampled_addmm(weight, p.dy.T, p.x, beta=0.0),
            lambda dw: dw.to_dense()[p.mask],
        ),
    }


def blksprs(p: Problem, side: int) -> Products:
    """The package's block-sparse product; activations are cut into its blocks beforehand."""
    bs: Any = importlib.import_module("blksprs")
    if not p.x.is_cuda or any(size % side for size in (*p.x.shape, *p.dy.shape)):
        raise ValueError(f"blksprs: expected a GPU and sizes that {side} divides")
    layout = p.mask[::side, ::side].contiguous()

    def full(a: Tensor) -> Tensor:
        return torch.ones(len(a) // side, a.shape[1] // side, dtype=torch.bool, device=a.device)

    def product(a: Tensor, at: Tensor, b: Tensor, bt: Tensor, out: Tensor) -> Callable[[], Any]:
        wrap = bs.utils_tensor.BlksprsTensor.wrap
        left, right = (wrap(_blocks(t, on, side)) for t, on in ((a, at), (b, bt)))
        cache: dict[str, Any] = {}
        layouts = [on[None].contiguous() for on in (at, bt, out)]
        return lambda: bs.ops.matmul(
            left, layouts[0], right, layouts[1], layouts[2], side, layout_cache=cache
        )

    bs.utils_tensor = importlib.import_module("blksprs.utils.blksprs_tensor")
    x, dy, y, dx = full(p.x), full(p.dy), full(p.dy), full(p.x)
    return {
        FORWARD: Product(
            product(p.x, x, p.weight.T, layout.T, y), lambda r: _whole(r, y, side)
        ),
        DX: Product(product(p.dy, dy, p.weight, layout, dx), lambda r: _whole(r, dx, side)),
        DW: Product(
            product(p.dy.T, dy.T, p.x, x, layout), lambda r: _whole(r, layout, side)[p.mask]
        ),
    }  # fmt: skip


def _blocks(a: Tensor, layout: Tensor, side: int) -> Tensor:
    """The blocks of a matrix that a layout names, [blocks, side, side], row by row."""
    rows, columns = layout.shape
    return a.reshape(rows, side, columns, side).transpose(1, 2)[layout].contiguous()


def _whole(blocks: Tensor, layout: Tensor, side: int) -> Tensor:
    """The inverse."""
    rows, columns = layout.shape
    whole = torch.zeros(rows, columns, side, side, dtype=blocks.dtype, device=blocks.device)
    whole[layout] = blocks.as_subclass(Tensor)
    return whole.transpose(1, 2).reshape(rows * side, columns * side)


def two_of_four(p: Problem) -> tuple[Problem, Products]:
    """The tensor cores' own pattern, half of the weights; a problem of its own, and the forward alone."""
    if not p.x.is_cuda:
        raise ValueError("2:4: expected a GPU")
    mask = torch.tensor([True, True, False, False], device=p.x.device)
    mask = mask.repeat(p.mask.numel() // 4).view_as(p.mask)
    generator = torch.Generator(p.x.device).manual_seed(1)
    values = torch.randn(mask.shape, generator=generator, device=mask.device) / mask.shape[1] ** 0.5
    own = Problem(p.layer, mask, (values * mask).to(p.x.dtype), p.x, p.dy)
    weight = torch.sparse.to_sparse_semi_structured(own.weight)
    return own, {FORWARD: Product(lambda: F.linear(own.x, weight))}


def providers(case: OpCase, p: Problem) -> dict[str, Callable[[], tuple[Problem, Products]]]:
    """Builders by name, the baseline first; ours are the formats."""
    found: dict[str, Callable[[], tuple[Problem, Products]]] = {
        DENSE: lambda: (p, dense(p)),
        "state": lambda: (p, ours(p, "state")),
        case.format: lambda: (p, ours(p, case.format)),
    }
    kind, _, sides = case.format.partition(":")
    if kind == "block" and not p.layer.conv:
        side = int(sides.partition("x")[0])
        found["torch BSR"] = lambda: (p, torch_bsr(p, side))
        found["torch 2:4 at 50 %"] = lambda: two_of_four(p)
        if case.others:
            found["blksprs"] = lambda: (p, blksprs(p, side))
    return found


# --- Measuring --------------------------------------------------------------------------------------


def op_case(case: OpCase, rows: Rows, device: torch.device, *, quick: bool = False) -> None:
    """Times the products that are right, each against the dense one of the same run.

    Errors: the first of our own formats', when everything else has been timed.
    """
    p = problem_of(case, device)
    right: dict[str, Products] = {}
    problems: list[Exception] = []
    with torch.no_grad():
        for name, build in providers(case, p).items():
            try:
                of, products = build()
            except Exception as error:  # ValueError, ImportError, and what other packages raise
                say(f"left out: {name} of {case.name}: {type(error).__name__}: {error}")
                continue
            right[name] = {}
            for which, product in products.items():
                try:
                    check(f"{case.name}, {name}: {which}", of, which, product)
                    right[name][which] = product
                except Exception as error:
                    say(
                        f"left out: {which} of {name} of {case.name}: {type(error).__name__}: {error}"
                    )
                    if name in ("state", case.format):
                        problems.append(error)
        for which in (FORWARD, DX, DW):
            steps = {
                name: products[which].step for name, products in right.items() if which in products
            }
            jobs = {name: Job(step, cold=True, ahead=True) for name, step in steps.items()}
            found = timed(jobs, device, rounds=2 if quick else 0, budget=0.05)
            add_times(rows, case.name, which, found, DENSE)
    if problems:
        raise problems[0]


def check(what: str, p: Problem, which: str, product: Product) -> None:
    """The gate: at most twice the error of the dense product in the same dtype.  Errors: WrongResult."""
    wide = torch.float64 if p.x.dtype == torch.float32 else torch.float32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain, exact = dense(p)[which], dense(p.to(wide))[which]
        read = product.read(product.step())
        require_as_exact(what, read, plain.read(plain.step()), exact.read(exact.step()))
