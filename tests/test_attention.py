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
from helpers import Fixed, equal, rand, randn, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore import kernels
from sparsecore.attention import Projection, projections
from sparsecore.convert import plain_state
from sparsecore.gates import HardConcrete
from sparsecore.nn import weight_key

E, HEADS = 12, 3  # an odd number of heads with an even size each, and nothing a power of two
CALLS = ("self", "memory", "apart", "one sentence", "one sentence and its memory")
SIZES = {"memory": [(E, E), (7, 7)], "apart": [(E, E), (7, E), (E, 5), (7, 5)]}


def attention(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    """A plain one whose biases are not zero."""
    layer = seeded(lambda: nn.MultiheadAttention(E, options.pop("heads", HEADS), **options), seed)
    assert isinstance(layer, nn.MultiheadAttention)
    if layer.in_proj_bias is not None:
        layer.in_proj_bias.data.copy_(randn(3 * E, seed=seed + 1))
        layer.out_proj.bias.data.copy_(randn(E, seed=seed + 2))
    return layer


def inputs(call: str, layer: nn.MultiheadAttention, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value of 4 and 5 tokens in a batch of 2, or of none."""

    def tokens(count: int, size: int, seed: int) -> Tensor:
        shape = (2, count, size) if layer.batch_first else (count, 2, size)
        shape = (count, size) if call.startswith("one") else shape
        return randn(*shape, seed=seed, dtype=dtype).requires_grad_()

    query = tokens(4, E, 1)
    if call in ("self", "one sentence"):
        return query, query, query
    key = tokens(5, layer.kdim, 2)
    return query, key, tokens(5, layer.vdim, 3) if call == "apart" else key


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
            exact = run(sc.SparseMultiheadAttention.from_dense(wide), tuple(moved[x] for x in given), how)  # fmt: skip
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
    with pytest.raises(TypeError, match="make the attention dense"):
        sc.densify_(layer.k_proj)


# --- Masks and plans --------------------------------------------------------------------------------


def masked(layer: nn.Module, share: float = 0.4) -> nn.Module:
    """Sparse with a random mask everywhere."""
    layer = sc.sparsify_(layer)
    for i, part in enumerate(sc.sparse_layers(layer).values()):
        part.set_mask_(rand(*part.weight_shape, seed=i) < share)
    return layer


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


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0} | options
    layer = seeded(lambda: nn.TransformerEncoderLayer(E, 2, 20, **options))
    assert isinstance(layer, nn.TransformerEncoderLayer)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("plan", ["mask", "state", "csr"])
def test_the_fused_encoder_sees_pruned_weights(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        operator = getattr(torch, name)

        def watched(*args: Any, name: str = name, operator: Any = operator) -> Any:
            fused.append(name)
            return operator(*args)

        monkeypatch.setattr(torch, name, watched)
    model = sc.plan_(masked(encoder()), plan)
    plain, x = sc.densify_(copy.deepcopy(model)), randn(3, 6, E)
    hidden = torch.arange(6) >= torch.tensor([6, 4, 1])[:, None]
    for padding in (None, hidden):
        expected = plain.train()(x, src_key_padding_mask=padding)  # layer by layer
        found = model.train()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found, expected)
        assert not fused
        with torch.no_grad():
            found = model.eval()(x, src_key_padding_mask=padding)
        assert fused == ["_transformer_encoder_layer_fwd"] * 2
        seen = torch.ones(3, 6, dtype=torch.bool) if padding is None else ~hidden
        torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)
        fused.clear()
    nested = torch.nested.nested_tensor([x[0], x[1, :4]])
    own, theirs = (m.layers[0].self_attn.eval() for m in (model, plain))
    with torch.no_grad():
        found = own(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0.0)
        expected = theirs(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0.0)
    torch.testing.assert_close(found, expected)
    assert fused == ["_native_multi_head_attention"] * 2
    with pytest.raises(
        AssertionError, match="does not support NestedTensor outside of its fast path"
    ):
        own.train()(nested, nested, nested)


@pytest.mark.parametrize("plan", ["state", "csr", "compact", "block:16x16", "auto"])
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
    layer = masked(attention(batch_first=True))
    given = inputs(call, layer, torch.float32)
    planned = sc.plan_(copy.deepcopy(layer), plan, cache=tmp_path / "plans")
    how = {"need_weights": False}
    y = layer(*given, **how)[0]
    found = planned(*given, **how)[0]
    torch.testing.assert_close(found, y)
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
    torch.testing.assert_close(grads[1], grads[0][parts[0].pattern.mask], rtol=1e-4, atol=1e-5)
    for twin in (copy.deepcopy(planned), pickle.loads(pickle.dumps(planned))):
        assert twin.in_proj.attention is twin and planned.in_proj.attention is planned
        assert torch.equal(twin(*given, **how)[0], found)
    planned.double()  # another dtype prepares its own parts
    wide = tuple(x.double() for x in dict.fromkeys(given))
    wide = wide * 3 if call == "self" else (*wide, wide[-1])[:3]
    if plan not in ("block:16x16", "auto"):  # blocks are not multiplied in fp64
        torch.testing.assert_close(planned(*wide, **how)[0].float(), y)


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


def test_gates_draw_one_mask_for_all_parts() -> None:
    layer = attention(batch_first=True)
    sparse = sc.sparsify_(copy.deepcopy(layer))
    gates = sc.Gated(torch.Size((3 * E, E)), HardConcrete(), density=0.5, seed=3)
    sc.sparse_layers(sparse)["in_proj"].pattern = gates
    drawn = sparse.in_proj_weight.detach()
    assert not torch.equal(drawn, layer.in_proj_weight) and bool((drawn == 0).any())
    with torch.no_grad():
        layer.in_proj_weight.copy_(drawn)
    for call in ("self", "memory", "apart"):
        given, found = inputs(call, layer, torch.float32), []
        for gates.impl in ("auto", "materialise", "fused"):
            y = sparse(*given, need_weights=False)[0]
            torch.testing.assert_close(y, layer(*given, need_weights=False)[0])
            found.append(torch.autograd.grad(y.square().sum(), gates.logits)[0])
        for grad in found[1:]:
            torch.testing.assert_close(grad, found[0], rtol=1e-4, atol=1e-5)


# --- Whole models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(E, E), (7, 5)])
def test_states_travel_both_ways(sizes: tuple[int, int]) -> None:
    plain = attention(kdim=sizes[0], vdim=sizes[1], add_bias_kv=True)
    sparse = sc.sparsify_(copy.deepcopy(plain))
    assert equal(sparse.state_dict(), plain.state_dict())
    assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in plain.named_parameters()]
    masked(sparse)
    state = {k: v.clone() for k, v in sparse.state_dict().items()}
    parts = ["in_proj"] if sizes == (E, E) else ["q_proj", "k_proj", "v_proj"]
    assert set(state) - set(plain.state_dict()) == {
        f"{n}.pattern.mask" for n in (*parts, "out_proj")
    }
    given = inputs("apart", plain, torch.float32)
    expected = sparse(*given)[0]
    for plan in ("mask", "state", "csr"):
        other = sc.plan_(
            masked(attention(9, kdim=sizes[0], vdim=sizes[1], add_bias_kv=True), 0.7), plan
        )
        other.load_state_dict(state)
        assert equal(other.state_dict(), state)  # topology travels, and no file depends on a plan
        torch.testing.assert_close(other(*given)[0], expected)
        other.load_state_dict(plain.state_dict())  # under its own mask
        assert equal(other.state_dict(), sparse.state_dict() | other.state_dict())
        for name, layer in sc.sparse_layers(other).items():
            weight = plain.state_dict()[weight_key(name, state)]
            assert torch.equal(layer.weight, weight.where(layer.pattern.mask, 0))
        with pytest.raises(RuntimeError, match=r"size mismatch for .*_proj_weight"):
            other.load_state_dict(state | {f"{parts[0]}_weight": torch.zeros(3, 3)})
    dense = sc.densify_(sparse)
    assert type(dense) is nn.MultiheadAttention and type(dense.out_proj) is type(plain.out_proj)
    plain.load_state_dict(dense.state_dict())
    assert torch.equal(plain(*given)[0], expected)


def test_filters_see_projections_as_linear_layers() -> None:
    def names(filter_fn: Any, model: nn.Module | None = None) -> list[str]:
        return list(sc.sparse_layers(sc.sparsify_(model or encoder(1), filter_fn)))

    both = ["layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj"]
    mlp = ["layers.0.linear1", "layers.0.linear2"]
    assert names("*.self_attn.*") == both
    assert names(nn.Linear) == names(sc.is_prunable) == both + mlp
    assert names(lambda name, m: type(m) is nn.Linear and m.weight.shape == (3 * E, E)) == both[:1]
    assert names(["*.linear1", "*.out_proj"]) == [both[1], mlp[0]]
    with pytest.raises(
        ValueError, match=r"the model's .* are layers.0.self_attn.in_proj, .*out_proj"
    ):
        names("*.attention")
    model, x = encoder(1), randn(2, 3, E)
    expected = model(x)
    assert names("*.linear1", model) == mlp[:1]
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert names("*.out_proj", model) == [both[1], mlp[0]]
    attention = model.layers[0].self_attn
    assert list(projections(attention)) == ["in_proj"]
    assert isinstance(attention.in_proj_weight, nn.Parameter)
    torch.testing.assert_close(model(x), expected)
    assert names("*.in_proj", model) == [*both, mlp[0]] and model.layers[0].self_attn is attention
    assert isinstance(attention.in_proj, Projection)
    torch.testing.assert_close(model(x), expected)
    shared = nn.ModuleDict({"a": attention, "b": attention})
    assert sc.sparsify_(shared)["a"] is shared["b"] and sc.densify_(shared)["a"] is shared["b"]


class Sentences(nn.Module):
    """Two tokens' ways to attend, a mean and a head, for samples of 12 features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(E, 2, 8, batch_first=True, dropout=0.1)
        self.decoder = nn.TransformerDecoderLayer(E, 2, 8, batch_first=True, dropout=0.1)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(x[:, :2], self.encoder(x)).mean(1))


BATCHES = Fixed(randn(12, 4, E), torch.arange(12) % 3)
SEARCHES = {
    "gates": sc.ConcreteSearch(epochs=2),
    "joint": sc.JointSearch(epochs=2),
    "synflow": sc.Iterative(sc.scores.synflow, rounds=2),
    "grasp": sc.OneShot(sc.scores.grasp),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_ticket_of_a_transformer_counts_attention_and_trains(name: str, tmp_path: Path) -> None:
    model = sc.sparsify_(seeded(Sentences))
    plain = seeded(Sentences)
    ticket = SEARCHES[name](model, BATCHES, sparsity=0.7)
    matrices = sum(p.numel() for p in plain.parameters() if p.ndim == 2)
    assert sum(mask.numel() for mask in ticket.masks.values()) == matrices
    assert set(ticket.weights) == set(plain.state_dict())
    ticket.save(tmp_path / "ticket")
    loaded = sc.Ticket.load(tmp_path / "ticket")
    assert loaded.hash == ticket.hash
    (x, y), found = BATCHES.batch, []
    for plan in ("mask", "state"):
        loaded.apply_(model, plan=plan).eval()
        optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
        for layer, mask in loaded.masks.items():
            assert not sc.sparse_layers(model)[layer].weight[~mask].any()
        plain.eval().load_state_dict(sc.densify_(copy.deepcopy(model)).state_dict())
        found.append(model(x))
        torch.testing.assert_close(plain(x), found[-1])
    torch.testing.assert_close(*found)


def test_searches_side_by_side_find_what_each_finds_alone() -> None:
    """In evaluation mode, where PyTorch would take a fused operator without gradients."""
    model, search = sc.sparsify_(seeded(Sentences)), sc.ConcreteSearch(epochs=1)
    many = search.many(model, BATCHES, sparsities=[0.5, 0.8], seeds=[0, 0])
    assert many[1].hash == search(model, BATCHES, sparsity=0.8).hash
    assert torch.backends.mha.get_fastpath_enabled()


def test_rounds_and_optima_name_their_weights() -> None:
    state = {"a.in_proj_weight": 1, "w.weight": 2, "w_weight": 3, "weight": 4}
    assert [state[weight_key(n, state)] for n in ("a.in_proj", "w", "")] == [1, 2, 4]
    model = masked(seeded(Sentences))
    optimum = {key: w.detach().clone() for key, w in plain_state(model).items()}
    penalty = sc.regions.Repellent([optimum], 1.0)
    assert penalty(model).item() == pytest.approx(1.0, abs=1e-5)  # it is where that optimum is


def test_vision_transformers_keep_dense_only_what_is_no_matrix() -> None:
    import torchvision

    vit = seeded(
        lambda: torchvision.models.VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3
        )
    )  # fmt: skip
    swin = seeded(
        lambda: torchvision.models.SwinTransformer(
            [4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3, stochastic_depth_prob=0.0
        )
    )
    x = randn(2, 3, 16, 16)
    for model, dense in (
        (vit, {"class_token", "pos_embedding"}),
        (swin, {"relative_position_bias_table"}),
    ):
        expected = model(x)
        masked(model, 1.1)  # nothing is pruned yet
        torch.testing.assert_close(model(x), expected)
        pruned = {id(layer.raw_weight) for layer in sc.sparse_layers(model).values()}
        left = [n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in pruned]
        assert {n.rpartition(".")[2] for n in left} == dense
    for layer in sc.sparse_layers(vit).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.3)
    small = sc.compact(vit, x)  # attention stays whole there, and what it computes
    torch.testing.assert_close(small.model(x), vit(x))
    name = "encoder.layers.encoder_layer_0.self_attention.in_proj"
    assert small.layers[name].weights == (3 * 8 * 8,) * 2
    small.restore_(vit)
