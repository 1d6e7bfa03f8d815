"""Transformers whose attention is sparse: states, filters, tickets, and PyTorch's fused evaluation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attentions import E, attention, inputs, masked
from helpers import Fixed, equal, rand, randn, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.attention import Projection, projections
from sparsecore.convert import batch_statistics, plain_state
from sparsecore.layer import weight_key


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
        # A plan is computed by the plan.
        assert fused == (["_transformer_encoder_layer_fwd"] * 2 if plan == "mask" else [])
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
    plain = model.layers[0].self_attn
    assert names("*.out_proj", model) == [both[1], mlp[0]]
    assert type(plain) is nn.MultiheadAttention and list(projections(plain)) == [
        "in_proj",
        "out_proj",
    ]
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


def test_the_fused_encoder_is_back_when_the_last_search_leaves() -> None:
    first, second = (batch_statistics(sc.sparsify_(seeded(Sentences))) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
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
