"""Layers beside nn.Linear, nn.Conv2d and attention: masks, gates and state for each of them."""

import copy
import pickle

import pytest
import torch
from helpers import rand, randn, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import sparsecore as sc
from sparsecore.gates import Concrete, HardConcrete
from sparsecore.granularity import Channel
from sparsecore.layer import SparseLayer, plain_type
from sparsecore.patterns import Gated


class Scaled(nn.Linear):
    """A subclass with a forward of its own, which reads the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(2 * input, self.weight, self.bias)


class Named(nn.Linear):
    """A subclass without one."""


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), randn(2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), randn(2, 2, 4, 4, 4)),
    "transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), randn(2, 3, 9)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), randn(2, 4, 5, 5)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), randn(2, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=1), torch.arange(12).view(2, 6) % 9),
    "sparse embedding": (lambda: nn.Embedding(9, 4, sparse=True), torch.arange(12) % 9),
    "scaled": (lambda: Scaled(5, 4), randn(3, 5)),
    "named": (lambda: Named(5, 4), randn(3, 5)),
}


def layer_of(kind: str) -> tuple[SparseLayer, nn.Module, Tensor]:
    make, x = LAYERS[kind]
    plain = seeded(make)
    sparse = sc.sparsify_(copy.deepcopy(plain), lambda name, module: True)
    assert isinstance(sparse, SparseLayer) and isinstance(sparse, type(plain))
    assert torch.equal(sparse(x), plain(x)) and plain_type(type(sparse)) is type(plain)
    return sparse, plain, x


def by_hand(plain: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.functional_call(plain, {"weight": weight}, (x,))


@pytest.mark.parametrize("kind", LAYERS)
def test_masks(kind: str) -> None:
    sparse, plain, x = layer_of(kind)
    mask = rand(*sparse.weight_shape) < 0.5
    weight = plain.weight.detach().clone().requires_grad_()
    sparse.set_mask_(mask)
    expected = by_hand(plain, weight * mask, x)
    found = sparse(x)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    grad = sparse.weight.grad.to_dense()
    torch.testing.assert_close(grad, weight.grad.to_dense())
    assert not grad[~mask].any()
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    assert not sparse.weight[~mask].any()
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert type(twin) is type(sparse) and torch.equal(twin(x), sparse(x))
    dense = sc.densify_(copy.deepcopy(sparse))
    assert type(dense) is type(plain)
    torch.testing.assert_close(dense(x), sparse(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_gates(kind: str) -> None:
    sparse, plain, x = layer_of(kind)
    for gate, granularity in ((Concrete(), None), (HardConcrete(), Channel())):
        sparse.pattern = Gated(sparse.raw_weight.shape, gate, granularity, density=0.5)
        weight = sparse.pattern(sparse.raw_weight).detach()
        torch.testing.assert_close(sparse(x), by_hand(plain, weight, x))
        if "sparse" in kind:  # whose gradient would not be the gates'
            continue
        sparse(x).square().sum().backward()
        assert sparse.pattern.logits.grad.any()
        sc.advance_(sparse)
        assert not torch.equal(sparse.pattern(sparse.raw_weight), weight)


@pytest.mark.parametrize("kind", [k for k in LAYERS if "sparse" not in k])
def test_state(kind: str) -> None:
    sparse, _, x = layer_of(kind)
    mask = rand(*sparse.weight_shape) < 0.5
    sparse.set_mask_(mask)
    expected = sparse(x)
    if not sparse.multiplies:
        with pytest.raises(ValueError, match="no format multiplies for"):
            sc.plan_(sparse, "csr")
        reason = sc.report(sc.plan_(sparse, "auto", x))[0].choice.reason
        assert "no format multiplies for" in reason
    sc.plan_(sparse, "state")
    assert sparse.raw_weight.shape == (int(mask.sum()),)
    torch.testing.assert_close(sparse(x), expected)
    sparse(x).square().sum().backward()
    assert sparse.raw_weight.grad.shape == sparse.raw_weight.shape
    again, _, _ = layer_of(kind)
    again.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(again(x), expected)
    sc.remask_(sparse, {"": mask & (rand(*mask.shape, seed=3) < 0.5)})
    torch.testing.assert_close(sc.densify_(copy.deepcopy(sparse))(x), sparse(x))


def test_bilinear() -> None:
    plain = seeded(lambda: nn.Bilinear(4, 5, 3))
    a, b = randn(2, 4), randn(2, 5)
    sparse = sc.sparsify_(copy.deepcopy(plain))
    mask = rand(3, 4, 5) < 0.5
    sparse.set_mask_(mask)
    expected = F.bilinear(a, b, plain.weight * mask, plain.bias)
    torch.testing.assert_close(sparse(a, b), expected)
    torch.testing.assert_close(sc.plan_(sparse, "state")(a, b), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(kind: type[nn.RNNBase]) -> None:
    options = {"num_layers": 2, "batch_first": True, "bidirectional": True}
    options |= {"proj_size": 3} if kind is nn.LSTM else {}
    plain, x = seeded(lambda: nn.Sequential(kind(5, 7, **options))), randn(3, 4, 5)
    sparse = sc.sparsify_(copy.deepcopy(plain))
    assert torch.equal(sparse(x)[0], plain(x)[0])
    names = list(sc.sparse_layers(sparse))
    assert names[:2] == ["0.ih_l0", "0.hh_l0"] and len(names) == (12 if kind is nn.LSTM else 8)
    masks = {n: rand(*la.weight_shape) < 0.5 for n, la in sc.sparse_layers(sparse).items()}
    sc.Ticket(masks, plain.state_dict()).apply_(sparse)
    with torch.no_grad():
        for name, mask in masks.items():
            plain[0].get_parameter(f"weight_{name[2:]}").mul_(mask)
    torch.testing.assert_close(sparse(x)[0], plain(x)[0])
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sparse(x)[0].square().sum().backward()
        optimizer.step()
    assert sparse[0].weight_hh_l0 is sparse[0]._parameters["weight_hh_l0"]
    assert not sparse[0].weight_hh_l0[~masks["0.hh_l0"]].any()
    again = sc.sparsify_(seeded(lambda: nn.Sequential(kind(5, 7, **options)), 1))
    again.load_state_dict(sparse.state_dict())
    expected = sparse(x)[0]
    assert torch.equal(again(x)[0], expected) and torch.equal(copy.deepcopy(sparse)(x)[0], expected)
    sc.plan_(sparse, "state")
    torch.testing.assert_close(sparse(x)[0], expected)
    with pytest.raises(RuntimeError, match="raw_weight"):
        nn.init.zeros_(sparse[0].weight_hh_l0)
    again.load_state_dict(sparse.state_dict())
    dense = sc.densify_(sparse)
    assert type(dense[0]) is kind
    torch.testing.assert_close(dense(x)[0], expected)
    torch.testing.assert_close(dense.double()(x.double())[0].float(), expected)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind: type[nn.RNNCellBase]) -> None:
    plain, x = seeded(lambda: nn.ModuleList([kind(5, 7)])), randn(3, 5)  # pyright: ignore

    def run(model: nn.Module) -> Tensor:
        found = model[0](x)  # pyright: ignore[reportIndexIssue]
        return found[0] if isinstance(found, tuple) else found

    sparse = sc.sparsify_(copy.deepcopy(plain))
    assert torch.equal(run(sparse), run(plain))
    assert list(sc.sparse_layers(sparse)) == ["0.ih", "0.hh"]
    masks = {n: rand(*la.weight_shape) < 0.5 for n, la in sc.sparse_layers(sparse).items()}
    sc.Ticket(masks, plain.state_dict()).apply_(sparse)
    with torch.no_grad():
        plain[0].weight_ih.mul_(masks["0.ih"])
        plain[0].weight_hh.mul_(masks["0.hh"])
    torch.testing.assert_close(run(sparse), run(plain))
    assert sparse[0].weight_ih is sparse[0]._parameters["weight_ih"]
    run(sparse).square().sum().backward()
    assert not sparse[0].weight_ih.grad[~masks["0.ih"]].any()
    expected = run(sparse)
    sc.plan_(sparse, "state")
    torch.testing.assert_close(run(sparse), expected)
    with pytest.raises(RuntimeError, match="raw_weight"):
        nn.init.zeros_(sparse[0].weight_hh)
    for twin in (copy.deepcopy(sparse), sc.densify_(copy.deepcopy(sparse))):
        torch.testing.assert_close(run(twin), expected)


def test_the_default_takes_every_matrix_but_embeddings_and_forwards_of_ones_own() -> None:
    net = nn.ModuleDict({
        "lstm": seeded(lambda: nn.LSTM(3, 4)),
        "embedding": seeded(lambda: nn.Embedding(9, 4)),
        "conv": seeded(lambda: nn.Conv1d(3, 4, 2)),
        "scaled": seeded(lambda: Scaled(3, 4)),
        "named": seeded(lambda: Named(3, 4)),
        "norm": nn.LayerNorm(4),
    })  # fmt: skip
    sparse = sc.sparsify_(copy.deepcopy(net))
    assert list(sc.sparse_layers(sparse)) == ["lstm.ih_l0", "lstm.hh_l0", "conv", "named"]
    for what, names in (
        ([nn.Linear, "lstm.*"], ["lstm.ih_l0", "lstm.hh_l0", "scaled", "named"]),
        ((nn.Conv1d, nn.Embedding), ["embedding", "conv"]),
        (["!lstm.*", "!named"], ["conv"]),
        (["*", "!lstm.*"], ["embedding", "conv", "scaled", "named"]),
        ("!conv", ["lstm.ih_l0", "lstm.hh_l0", "named"]),
    ):
        assert list(sc.sparse_layers(sc.sparsify_(copy.deepcopy(net), what))) == names
    with pytest.raises(ValueError, match="no layer matches 'nope'"):
        sc.sparsify_(net, ["nope"])
    with pytest.raises(
        ValueError, match=r"expected a function or type or a text or .*, got a list of a int"
    ):
        sc.sparsify_(net, [3])


def test_an_embedding_that_renormalises_is_no_place_for_gates() -> None:
    sparse = sc.sparsify_(seeded(lambda: nn.Embedding(9, 4, max_norm=0.5)), lambda name, m: True)
    sparse.set_mask_(rand(9, 4) < 0.5)
    assert sparse(torch.arange(9)).norm(dim=1).max() < 0.51
    sparse.pattern = Gated(sparse.raw_weight.shape, Concrete(), density=0.5)
    with pytest.raises(ValueError, match="max_norm"):
        sparse(torch.arange(9))
