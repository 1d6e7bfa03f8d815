"""nn.MultiheadAttention made sparse: the same numbers under every option, and pruned weights never matter."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attentions import HEADS, E, attention, inputs, masked
from helpers import DEVICE, rand, randn, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore import kernels
from sparsecore.gates import HardConcrete
from sparsecore.layer import weight_key

CALLS = ("self", "memory", "apart", "one sentence", "one sentence and its memory")
SIZES = {"memory": [(E, E), (7, 7)], "apart": [(E, E), (7, E), (E, 5), (7, 5)]}


def masks(call: str, attn: str | None, padding: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Masks that leave every query something to see."""
    batch, keys = (1 if call.startswith("one") else 2), 4 if call in ("self", "one sentence") else 5
    found: dict[str, Any] = {}
    if attn == "causal":
        later = torch.ones(4, keys, dtype=torch.bool).triu(1)
        found = {"attn_mask": later, "is_causal": True}
    elif attn is not None:
        shape = (4, keys) if attn.endswith("2") else (batch * HEADS, 4, keys)
        hidden = rand(*shape, seed=5) < 0.4
        hidden[..., 0] = False
        found = {"attn_mask": hidden if attn[0] == "b" else randn(*shape, seed=6, dtype=dtype)}
    if padding is not None:
        shape = (keys,) if call.startswith("one") else (batch, keys)
        hidden = rand(*shape, seed=7) < 0.4
        hidden[..., 0] = False
        found["key_padding_mask"] = hidden if padding == "b" else randn(*shape, dtype=dtype)
    return found


def options() -> Iterator[dict[str, Any]]:
    """All that a constructor takes, one combination after another."""
    names = ("batch_first", "bias", "add_bias_kv", "add_zero_attn")
    return itertools.cycle(
        dict(zip(names, bits, strict=True)) for bits in itertools.product((True, False), repeat=4)
    )


def run(layer: nn.Module, given: tuple[Tensor, ...], how: dict[str, Any]) -> list[Tensor]:
    """Outputs, weights, and the gradients of inputs and parameters."""
    y, weights = layer(*given, **how)
    leaves = [*dict.fromkeys(given), *layer.parameters()]
    grads = torch.autograd.grad(y, leaves, randn(*y.shape, dtype=y.dtype), allow_unused=True)
    return [t for t in (y, weights, *grads) if t is not None]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_equals_multihead_attention_under_every_option(call: str, dtype: torch.dtype) -> None:
    attn = (None, "b2", "f2", "b3", "f3", "causal")
    built = options()
    for mask, padding, sizes in itertools.product(
        attn, (None, "b", "f"), SIZES.get(call, [(E, E)])
    ):
        for need, average in ((False, True), (True, True), (True, False)):
            made = next(built) | {"kdim": sizes[0], "vdim": sizes[1]}
            plain = attention(**made).to(dtype)
            sparse = sc.SparseMultiheadAttention.from_dense(plain)
            assert [id(p) for p in sparse.parameters()] == [id(p) for p in plain.parameters()]
            how = {"need_weights": need, "average_attn_weights": average}
            how |= masks(call, mask, padding, dtype)
            given = inputs(call, plain, dtype)
            with warnings.catch_warnings():  # masks of two kinds are deprecated, and taken
                warnings.simplefilter("ignore")
                theirs = run(plain, given, how)
            ours = run(sparse, given, how)
            what = f"{made} {how}"
            assert [t.shape for t in ours] == [t.shape for t in theirs], what
            if dtype == torch.float64:
                # Sums of at most 3 * E products, twice in a row, and a softmax between.
                for a, b in zip(ours, theirs, strict=True):
                    assert (a - b).abs().max() <= 1e-13 * (1 + b.abs().max()), what
                continue
            wide = copy.deepcopy(plain).double()
            floats = [k for k, v in how.items() if isinstance(v, Tensor) and v.is_floating_point()]
            how |= {k: how[k].double() for k in floats}
            moved = {x: x.detach().double().requires_grad_() for x in dict.fromkeys(given)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exact = run(wide, tuple(moved[x] for x in given), how)
            for a, b, e in zip(ours, theirs, exact, strict=True):
                allowed = 2 * (b - e).abs().max() + 1e-6 * (1 + e.abs().max())
                assert (a - e).abs().max() <= allowed, what


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_multihead_attention_draws(need_weights: bool) -> None:
    plain = attention(dropout=0.4, batch_first=True)
    sparse, x = sc.SparseMultiheadAttention.from_dense(plain), randn(2, 5, E)
    found = []
    for layer in (plain, sparse):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            found.append(layer(x, x, x, need_weights=need_weights)[0])
    torch.testing.assert_close(*found)
    assert torch.equal(sparse.eval()(x, x, x)[0], plain.eval()(x, x, x)[0])


def test_refusals_say_what_was_expected() -> None:
    layer = seeded(lambda: sc.SparseMultiheadAttention(E, HEADS, kdim=7, batch_first=True))
    x, y = randn(2, 4, E), randn(2, 5, 7)
    z = randn(2, 5, E)
    layer(x, y, z)
    wrong = [(x, x, z), (x, y, z[:, 1:]), (x[0], y, z), (x[:1], y, z), (x[None], y[None], z[None])]
    for given in wrong:
        with pytest.raises(ValueError, match=r"expected query, key and value \[B, T, 12\], .* 7\]"):
            layer(*given)
    with pytest.raises(
        ValueError, match=r"attn_mask: expected shape \(4, 5\) or \(6, 4, 5\), got \(5, 4\)"
    ):
        layer(x, y, z, attn_mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(2, 5\), got \(5,\)"):
        layer(x, y, z, key_padding_mask=torch.zeros(5))
    with pytest.raises(
        TypeError, match=r"attn_mask: expected a bool or floating-point mask, got torch.int64"
    ):
        layer(x, y, z, attn_mask=torch.zeros(4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected attn_mask beside it"):
        layer(x, y, z, is_causal=True)
    with pytest.raises(TypeError, match="expected MultiheadAttention, got Linear"):
        sc.SparseMultiheadAttention.from_dense(layer.out_proj.to_dense())
    with pytest.raises(TypeError, match="make that dense"):
        sc.densify_(layer.k_proj)


# --- Masks and plans --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(E, E), (7, 5)])
def test_a_pruned_weight_never_matters(sizes: tuple[int, int]) -> None:
    plain = attention(kdim=sizes[0], vdim=sizes[1], batch_first=True)
    sparse = masked(copy.deepcopy(plain))
    layers = sc.sparse_layers(sparse)
    state = plain.state_dict()
    for name, layer in layers.items():
        mask = layer.pattern.mask
        state[weight_key(name, state)].mul_(mask)
        layer.raw_weight.data[~mask] = 1e30  # as if an optimiser had moved it
    for call in ("self", "memory", "apart") if sizes == (E, E) else ("apart",):
        given = inputs(call, plain, torch.float32)
        for training, need in itertools.product((True, False), repeat=2):
            y = sparse.train(training)(*given, need_weights=need)[0]
            torch.testing.assert_close(y, plain.train(training)(*given, need_weights=need)[0])
            grads = torch.autograd.grad(y.sum(), [layer.raw_weight for layer in layers.values()])
            for grad, layer in zip(grads, layers.values(), strict=True):
                assert not grad[~layer.pattern.mask].any()
    for name in layers:
        torch.testing.assert_close(
            sparse.get_submodule(name).weight if name == "out_proj" else getattr(sparse, f"{name}_weight"),
            state[weight_key(name, state)],
        )  # fmt: skip


BLOCK = pytest.param("block:16x16", marks=pytest.mark.gpu)


@pytest.mark.parametrize("plan", ["state", "csr", "compact", "auto", BLOCK])
@pytest.mark.parametrize("call", ["self", "memory", "apart"])
def test_plans_compute_alike_also_with_inputs_apart(
    plan: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    multiply = kernels.sparse_layer

    def watched(x: Tensor, values: Tensor, bias: Tensor | None, plan: kernels.Plan) -> Tensor:
        used.append((plan.formats, plan.layer.shape))
        return multiply(x, values, bias, plan)

    monkeypatch.setattr(kernels, "sparse_layer", watched)
    blocks = plan.startswith("block")
    layer = masked(attention(batch_first=True)).to(DEVICE if blocks else "cpu")
    given, how = inputs(call, layer, torch.float32), {"need_weights": False}
    planned = sc.plan_(copy.deepcopy(layer), plan, cache=tmp_path / "plans")
    y, found = layer(*given, **how)[0], planned(*given, **how)[0]
    close = {"rtol": 1e-3, "atol": 1e-4}  # a GPU's kernels and cuBLAS sum in other orders
    torch.testing.assert_close(found, y, **close)
    rows = {"self": [3 * E], "memory": [E, 2 * E], "apart": [E] * 3}[call]
    assert [shape for _, shape in used] == [*((n, E) for n in rows), (E, E)]
    chosen = {row.name: row.choice.formats for row in sc.report(planned)}
    assert [formats for formats, _ in used] == [
        *[chosen["in_proj"]] * len(rows),
        chosen["out_proj"],
    ]
    assert plan == "auto" or set(used[0][0]) == {plan}  # nothing falls back
    parts = [sc.sparse_layers(m)["in_proj"] for m in (layer, planned)]
    weights = [m.raw_weight for m in parts]
    grads = torch.autograd.grad([y.square().sum(), found.square().sum()], weights)
    torch.testing.assert_close(grads[1], grads[0][parts[0].pattern.mask], **close)
    for twin in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        assert twin.in_proj.whole is twin and planned.in_proj.whole is planned
        torch.testing.assert_close(twin(*given, **how)[0], found)
    if not blocks:  # their kernels know no fp64
        wide = {x: x.detach().double() for x in dict.fromkeys(given)}
        exact = copy.deepcopy(layer).double()
        found = planned.double()(*(wide[x] for x in given), **how)[0]
        torch.testing.assert_close(found, exact(*(wide[x] for x in given), **how)[0])


@pytest.mark.parametrize(
    ("plan", "call", "used"),
    [("mask", "memory", True), ("state", "self", False), ("state", "memory", False), ("csr", "memory", True)],
)  # fmt: skip
def test_compiles_without_graph_breaks(plan: str, call: str, used: bool) -> None:
    torch._dynamo.reset()
    layer = sc.plan_(masked(attention(batch_first=True)), plan)
    given, hidden = inputs(call, layer, torch.float32), torch.zeros(2, 4 if call == "self" else 5)
    expected = copy.deepcopy(layer)(*given, key_padding_mask=hidden)
    if used:  # else its parts are not prepared
        layer(*given)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = compiled(*given, key_padding_mask=hidden)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    found[0].sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.gpu
def test_gates_draw_one_mask_for_all_parts() -> None:
    layer = attention(batch_first=True).to(DEVICE)
    sparse = sc.sparsify_(copy.deepcopy(layer))
    shape = torch.Size((3 * E, E))
    gates = sc.Gated(shape, HardConcrete(), density=0.5, seed=3, device=DEVICE)
    sc.sparse_layers(sparse)["in_proj"].pattern = gates
    drawn = sparse.in_proj_weight.detach()
    assert not torch.equal(drawn, layer.in_proj_weight) and bool((drawn == 0).any())
    with torch.no_grad():
        layer.in_proj_weight.copy_(drawn)
    for call in ("self", "memory", "apart"):
        given, found = inputs(call, layer, torch.float32), []
        for gates.impl in ("auto", "materialise", "fused"):
            y = sparse(*given, need_weights=False)[0]
            expected = layer(*given, need_weights=False)[0]
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            found.append(torch.autograd.grad(y.square().sum(), gates.logits)[0])
        for grad in found[1:]:
            torch.testing.assert_close(grad, found[0], rtol=1e-4, atol=1e-4)
