"""Products with kept weights, in every format, against a dense weight that has zeros for the others."""

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from bounds import Expected, products, require
from helpers import DEVICE, ChannelsLast, rand, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsecore import kernels
from sparsecore.kernels.formats import Layer
from sparsecore.kernels.sparse import csr
from sparsecore.kernels.sparse import layers as sparse_layers

CPU = ["state", "csr", "compact"]
KERNELS = ["block:16x16", "block:32x16"]
TILED = ("block:16x16/2", "block:16x16", "block:16x16/1")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
MIXED = ("csr", "state", "compact")
LINEAR = ((7, 13), (), 1, (5, 13))
CONVS = {
    "stride, dilation": ((6, 5, 3, 3), (2, 1, 1, 0, 1, 2), 1, (2, 5, 9, 8)),
    "stride, even": ((6, 5, 3, 3), (2, 2, 1, 1, 1, 1), 1, (2, 5, 8, 8)),  # its last row is not seen
    "pointwise": ((6, 4, 1, 1), (1, 1, 0, 0, 1, 1), 1, (2, 4, 3, 3)),
    "pointwise, stride": ((6, 4, 1, 1), (2, 2, 0, 0, 1, 1), 1, (2, 4, 5, 5)),
    "groups": ((6, 2, 3, 3), (1, 1, 1, 1, 1, 1), 3, (2, 6, 5, 4)),
}


def dense(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, slide=(), groups=1) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, *Layer(tuple(weight.shape), slide).pairs, groups)


def results(format, mask: Tensor, x: Tensor, draw=randn, slide=(), groups=1) -> Iterator[tuple]:
    """(name, ours, the expected one) of y, dx, dvalues and dbias."""
    plan = kernels.plan_of(mask, format, dtype=x.dtype, slide=slide, groups=groups)
    values, bias = draw(plan.nnz, seed=1).to(x), draw(mask.shape[0], seed=2).to(x)
    inputs = [t.detach().requires_grad_() for t in (x, values, bias)]
    y = kernels.sparse_layer(*inputs, plan)
    dy = draw(*y.shape, seed=3).to(y)
    ours = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    weight, product = dense(values, mask), partial(layer, slide=slide, groups=groups)
    right = products(product, x, weight, bias, dy)
    right[2] = Expected(*(t[mask] for t in right[2][:3]))
    for name, mine, expected in zip(["y", "dx", "dvalues", "dbias"], ours, right, strict=True):
        assert mine.dtype == x.dtype
        yield name, mine, expected


def compare(format, mask: Tensor, x: Tensor, slide=(), groups=1) -> None:
    for name, mine, expected in results(format, mask, x, slide=slide, groups=groups):
        require(name, mine, expected)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """From -4 to 4: float32 has their products and sums exactly, in any order."""
    return (2 * randn(*shape, seed=seed)).round().clamp(-4, 4)


SHAPES = {
    "n": st.integers(1, 70),
    "k": st.integers(1, 70),
    "tokens": st.sampled_from([1, 2, 63, 64, 65, 130]),
    "density": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    "major": st.booleans(),
}


@pytest.mark.parametrize("format", [*CPU, MIXED])
@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_any_linear_layer_of_integers_is_exact(
    format, n: int, k: int, tokens: int, density: float, major: bool
) -> None:
    mask = rand(n, k, seed=n + 100 * k) < density
    x = integers(k, tokens).T if major else integers(tokens, k)
    for name, mine, expected in results(format, mask, x, integers):
        assert torch.equal(mine.double(), expected.exact), name


@pytest.mark.parametrize("format", [*CPU, MIXED])
@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_any_linear_layer(format, n: int, k: int, tokens: int, density: float, major: bool) -> None:
    mask = rand(n, k, seed=n + 100 * k) < density
    x = randn(k, tokens).T if major else randn(tokens, k)
    compare(format, mask, x)


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("format", [*CPU, MIXED])
def test_convolutions(format, case: str) -> None:
    shape, slide, groups, image = CONVS[case]
    if groups > 1 and "compact" in format:
        with pytest.raises(ValueError, match="takes one group"):
            kernels.plan_of(torch.ones(shape, dtype=torch.bool), format, slide=slide, groups=groups)
        return
    for density, last in itertools.product((0.0, 0.4), (False, True)):
        x = randn(*image)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        compare(format, rand(*shape) < density, x, slide, groups)


@pytest.mark.parametrize("format", ["state", "compact"])
def test_a_backward_within_autocast_keeps_its_precision(format: str) -> None:
    """As the library's does, which autocast does not know."""
    mask = rand(6, 5, 3, 3) < 0.4
    plan = kernels.plan_of(mask, format, slide=(1, 1, 1, 1, 1, 1))
    values, x = randn(plan.nnz), randn(2, 5, 8, 8)  # frozen values: dX alone
    grads = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        y = kernels.sparse_layer(leaf, values, None, plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y.backward(randn(*y.shape, seed=3))
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("wanted", ["dx", "dw", "both"])
@pytest.mark.parametrize("format", ["state", "compact"])
def test_images_stay_channels_last(format: str, wanted: str) -> None:
    """The library decides by what it is given; an image in another layout is copied before it and behind it."""
    mask = rand(6, 5, 3, 3) < 0.4
    mask[1] = mask[:, 2] = False
    for whole in (False, True):
        plan = kernels.plan_of(mask | whole, format, slide=(2, 1, 1, 0, 1, 2))
        x, bias = randn(2, 5, 9, 8), randn(6)
        dy = randn(*plan.layer.output(x.shape), seed=3)
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        x.requires_grad_(wanted != "dw")
        values = randn(plan.nnz).requires_grad_(wanted != "dx")
        with ChannelsLast(x.shape, dy.shape):
            y = kernels.sparse_layer(x, values, bias, plan)
            y.backward(dy)
        for image in (y, y if x.grad is None else x.grad):
            assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*KERNELS, TILED, ("block:16x16", "block:32x16", "state")])
def test_formats_of_kernels(format, dtype: torch.dtype) -> None:
    """Whatever the mask: unstructured ones fill their blocks up with zeros."""
    for density in (0.0, 0.03, 1.0):
        mask = (rand(50, 70) < density).to(DEVICE)
        compare(format, mask, randn(20, 70).to(DEVICE, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CONVS)
def test_block_convolutions(case: str) -> None:
    shape, slide, groups, image = CONVS[case]
    mask, x = (rand(*shape) < 0.4).to(DEVICE), randn(*image).to(DEVICE)
    if groups > 1:
        with pytest.raises(ValueError, match="straddle groups"):
            kernels.plan_of(mask, "block:16x16", slide=slide, groups=groups)
        return
    compare("block:16x16", mask, x, slide, groups)


@pytest.mark.parametrize("format", CPU)
def test_lower_precision_and_more_dimensions(format: str) -> None:
    mask = rand(20, 30) < 0.3
    compare(format, mask, randn(2, 3, 30))
    bias = randn(20, seed=2).bfloat16()
    for name, mine, expected in results(format, mask, randn(50, 30).bfloat16()):
        if name == "y":  # a library's product is rounded before the bias is added
            twice = 2.0**-8 * (expected.exact - bias).abs()
            expected = expected._replace(sure=expected.sure + twice)
        require(name, mine, expected)
    plan = kernels.plan_of(mask, format, dtype=torch.bfloat16)
    values, x = randn(plan.nnz).requires_grad_(), randn(9, 30).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.sparse_layer(x, values, None, plan)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == values.grad.dtype == torch.float32


@pytest.mark.parametrize("format", [*CPU, MIXED])
def test_gradients_of_gradients_and_operators(format) -> None:
    for shape, slide, groups, image in (LINEAR, CONVS["stride, dilation"]):
        mask = rand(*shape) < 0.3
        plan = kernels.plan_of(mask, format, dtype=torch.float64, slide=slide, groups=groups)
        x = randn(*image, dtype=torch.float64).requires_grad_()
        values = randn(plan.nnz, dtype=torch.float64).requires_grad_()
        bias = randn(shape[0], dtype=torch.float64).requires_grad_()

        def layer(*inputs: Tensor, plan=plan) -> Tensor:
            return kernels.sparse_layer(*inputs, plan)

        with torch.random.fork_rng(devices=[]):  # these checks draw, and so does opcheck
            assert torch.autograd.gradcheck(layer, (x, values, bias))
            assert torch.autograd.gradgradcheck(layer, (x, values, bias))
        flat = plan.flat()

        def operator(*inputs: Tensor, flat=flat) -> Tensor:
            return sparse_layers._forward(*inputs, *flat)

        with torch.random.fork_rng(devices=[]):
            assert torch.autograd.gradcheck(operator, (x, values, bias))
        y = sparse_layers._forward(x, values, bias, *flat).detach().requires_grad_()
        for product, inputs in (
            (sparse_layers._forward, (x, values, bias)),
            (sparse_layers._dx, (y, values, list(x.shape))),
            (sparse_layers._dw, (y, x, values)),
        ):
            # Scratch holds its numbers before it is looked at: the schema says nothing of it.
            product(*inputs, *flat)
            torch.library.opcheck(product, (*inputs, *flat))


def test_a_plan_survives_its_own_schema() -> None:
    mask = rand(6, 5, 3, 3) < 0.5
    plan = kernels.plan_of(mask, MIXED, slide=(1, 1, 1, 1, 1, 1))
    again = kernels.Plan.of(*plan.flat())
    assert again.layer == plan.layer and again.formats == plan.formats and again.nnz == plan.nnz
    for mine, theirs in zip(again.storages, plan.storages, strict=True):
        assert list(mine.numbers) == list(theirs.numbers)
        assert all(a is b for a, b in zip(mine.tensors, theirs.tensors, strict=True))


def test_feature_major_results_feed_the_next_layer_without_a_copy() -> None:
    plan = kernels.plan_of(rand(40, 30) < 0.3, "csr")
    y = kernels.sparse_layer(randn(16, 30), randn(plan.nnz), None, plan)
    assert y.shape == (16, 40) and y.T.is_contiguous() and y.relu().T.is_contiguous()


def test_the_dense_weight_of_state_never_holds_anything_else() -> None:
    mask = rand(30, 40) < 0.2
    plan = kernels.plan_of(mask, "state")
    weight = plan.storages[0].tensors[1]
    for seed in range(3):
        values, x = randn(plan.nnz, seed=seed).requires_grad_(), randn(8, 40).requires_grad_()
        y = kernels.sparse_layer(x, values, None, plan)
        kernels.sparse_layer(x, values.detach() * 3, None, plan)  # another use before the backward
        y.sum().backward()
        assert torch.equal(weight, dense(values.detach(), mask))
        exact = torch.ones(8, 30) @ dense(values.detach(), mask)
        torch.testing.assert_close(x.grad, exact)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("nope", "expected state, csr"),
        ("block", "sides as block:64x64"),
        *((f"block:64x64{end}", "/1 or /2 behind") for end in ("/0", "/3", "/", "/1/2", "/01")),
        ("state:3", "expected state"),
        (("csr", "csr"), "one, or three"),
    ],
)
def test_unknown_formats(format, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.plan_of(torch.ones(4, 4, dtype=torch.bool), format)


def test_bad_input_is_told_before_anything_runs() -> None:
    mask = rand(6, 5) < 0.5
    plan = kernels.plan_of(mask, "csr")
    values, x = randn(plan.nnz), randn(3, 5)
    with pytest.raises(TypeError, match="bool"):
        kernels.plan_of(mask.float())
    with pytest.raises(ValueError, match=r"\(n, k\)"):
        kernels.plan_of(mask[0])
    with pytest.raises(ValueError, match="six integers"):
        kernels.plan_of(rand(6, 5, 3, 3) < 0.5)
    for bad, message in (
        ((x, values[1:], None), "belongs to one mask"),
        ((x[:, 1:], values, None), "k = 5"),
        ((x, values, randn(5)), r"expected \(6,\)"),
        ((x, values.to("meta"), None), "on cpu as the plan is"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.sparse_layer(*bad, plan)
    conv = kernels.plan_of(rand(6, 5, 3, 3) < 0.5, slide=(1, 1, 0, 0, 1, 1))
    with pytest.raises(ValueError, match="filter fits"):
        kernels.sparse_layer(randn(1, 5, 2, 2), randn(conv.nnz), None, conv)


@pytest.mark.parametrize(
    ("slide", "groups"),
    [((0, 1, 1, 1, 1, 1), 1), ((1, 1, -1, 0, 1, 1), 1), ((1, 1, 1, 1, 0, 1), 1)]
    + [((1, 1, 1, 1, 1, 1), groups) for groups in (4, 0, -1)],
)
@pytest.mark.parametrize("format", ["state", "csr", "block:16x16"])
def test_convolutions_that_cannot_be(format: str, slide: tuple[int, ...], groups: int) -> None:
    with pytest.raises(ValueError, match=r"^(slide|groups): expected"):
        kernels.plan_of(rand(6, 5, 3, 3) < 0.5, format, slide=slide, groups=groups)


def test_a_linear_layer_has_one_group() -> None:
    with pytest.raises(ValueError, match="groups: expected"):
        kernels.plan_of(rand(6, 5) < 0.5, groups=2)


@pytest.mark.parametrize("format", ["state", "csr", "compact", "block:16x16"])
def test_one_vector_and_dtypes_that_no_product_takes(format: str) -> None:
    device = DEVICE if ":" in format else "cpu"
    mask = (rand(30, 40) < 0.3).to(device)
    plan = kernels.plan_of(mask, format)
    values, bias, x = (t.to(device) for t in (randn(plan.nnz), randn(30), randn(40, seed=2)))
    y = kernels.sparse_layer(x, values, bias, plan)
    dy = torch.ones_like(y)
    require("y", y, products(layer, x, dense(values, mask), bias, dy)[0])
    with pytest.raises(ValueError, match="floating dtype"):
        kernels.sparse_layer(
            torch.ones(3, 40, dtype=torch.int64, device=device), values, bias, plan
        )
    if ":" in format:
        with pytest.raises(ValueError, match="expected activations in fp32"):
            kernels.sparse_layer(x.double(), values.double(), bias.double(), plan)


def test_no_inputs_leave_the_bias() -> None:
    plan = kernels.plan_of(torch.zeros(4, 0, dtype=torch.bool))
    y = kernels.sparse_layer(torch.zeros(3, 0), torch.zeros(0), torch.ones(4), plan)
    assert torch.equal(y, torch.ones(3, 4))


@pytest.mark.parametrize("format", ["state", "csr", "compact", "block:16x16"])
def test_a_plan_made_in_inference_mode_trains(format: str) -> None:
    device = DEVICE if ":" in format or format == "state" else "cpu"
    mask, x = (rand(30, 40) < 0.3).to(device), randn(3, 40).to(device)
    with torch.inference_mode():
        plan = kernels.plan_of(mask, format)
        kernels.sparse_layer(x, randn(plan.nnz).to(device), None, plan)
    values = randn(plan.nnz).to(device).requires_grad_()
    kernels.sparse_layer(x, values, None, plan).sum().backward()
    assert values.grad is not None


def test_nan_reaches_what_depends_on_it_and_nothing_else() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = True
    for format in CPU:
        plan = kernels.plan_of(mask, format)
        y = kernels.sparse_layer(torch.ones(2, 4), torch.tensor([torch.nan, 1.0]), None, plan)
        assert y[:, 0].isnan().all() and torch.equal(y[:, 1], torch.ones(2))


def test_csr_transposes_many_values_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = rand(30, 40) < 0.3
    few = kernels.plan_of(mask, "csr")
    monkeypatch.setattr(csr, "_SCATTERED", 1)
    many = kernels.plan_of(mask, "csr")
    assert many.storages[0].tensors[-1].dtype != few.storages[0].tensors[-1].dtype
    x, values = randn(7, 40).requires_grad_(), randn(few.nnz)
    gradients = [
        torch.autograd.grad(kernels.sparse_layer(x, values, None, plan).square().sum(), x)[0]
        for plan in (few, many)
    ]
    assert torch.equal(*gradients)
