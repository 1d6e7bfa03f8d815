"""What is left when dead units have gone: widths, constants, modes, names; and what cannot be compacted at all."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from exactness import assert_close, assert_exact, kept
from helpers import rand, randn, seeded
from torch import Tensor, nn

import sparsecore as sc
from sparsecore.compaction import compact
from sparsecore.gates import Concrete
from sparsecore.patterns import Gated


def silence_(layer: Any, bias: float) -> None:
    """Masks the first two outputs."""
    mask = torch.ones_like(layer.raw_weight, dtype=torch.bool)
    mask[:2] = False
    layer.set_mask_(mask)
    if layer.bias is not None:
        layer.bias.data[:2] = bias


def chain(*layers: nn.Module, dead: tuple[int, ...] = (0,), bias: float = 0.0) -> nn.Module:
    """A sequence in which the first two outputs of the given layers are masked, with this bias."""
    model: Any = sc.sparsify_(nn.Sequential(*layers).double())
    for i in dead:
        silence_(model[i], bias)
    return model


def with_masks(widths: tuple[int, ...], *masks: list[str], dtype: torch.dtype) -> nn.Module:
    """Linear layers with ReLUs between them; one string per output, an x where a weight is kept."""

    def build() -> nn.Module:
        pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])

    model = sc.sparsify_(seeded(build).to(dtype))
    for layer, mask in zip(sc.sparse_layers(model).values(), masks, strict=True):
        layer.set_mask_(torch.tensor([[c == "x" for c in row] for row in mask]))
        assert isinstance(layer.bias, Tensor)
        layer.bias.data.fill_(-0.1)
    return model


def test_removal_cascades_both_ways_and_nothing_else_goes() -> None:
    model = with_masks(
        (3, 4, 4, 2),
        ["xx.", "...", "..x", "x.x"],  # output 1 is constant
        ["x...", ".x..", "..x.", "...x"],  # so output 1 is; nobody reads output 2
        ["xx..", "xx.x"],
        dtype=torch.float64,
    )
    compacted = assert_exact(model, (3,))
    found = {name: (x.inputs, x.outputs, x.live) for name, x in compacted.layers.items()}
    assert found == {"0": ((3, 3), (2, 4), 4), "2": ((2, 4), (2, 4), 2), "4": ((2, 4), (2, 2), 3)}
    assert [len(p) for p in compacted.places["4.weight"]] == [2, 2]
    small: Any = compacted.model
    assert isinstance(small[2].pattern, sc.Masked) and small[2].in_features == 2
    assert str(compacted).splitlines()[0].split() == [
        "layer",
        "inputs",
        "outputs",
        "weights",
        "live",
    ]
    assert str(compacted).splitlines()[4].split() == ["all", "14", "of", "36", "9"]


def test_where_nothing_is_pruned_the_pattern_is_dense() -> None:
    model = with_masks((2, 3, 2), ["xx", "..", "xx"], ["..x", "xxx"], dtype=torch.float64)
    small: Any = assert_exact(model, (2,)).model
    assert isinstance(small[0].pattern, sc.Dense) and isinstance(small[2].pattern, sc.Masked)


def test_a_layer_keeps_one_unit() -> None:
    model = with_masks(
        (3, 4, 4, 2), ["xxx"] * 4, ["...."] * 4, ["xx..", "...."], dtype=torch.float64
    )
    compacted = assert_exact(model, (3,))
    assert compacted.layers["2"].inputs[0] == compacted.layers["2"].outputs[0] == 1
    assert "1 dead outputs stay: it is the only unit left of its layer" in str(compacted)


def test_constants_fold_into_a_new_bias() -> None:
    model: Any = seeded(
        lambda: chain(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3, bias=False), bias=0.7)
    )
    x = randn(4, 6, dtype=torch.float64)
    compacted = compact(model, x[:1], training=False)
    small: Any = compacted.model
    assert small[0].out_features == 3 and small[2].bias is not None and model[2].bias is None
    assert_close(small.eval()(x), model.eval()(x), "evaluation")
    with pytest.raises(ValueError, match=r"the biases of 2 hold constants.*training=True"):
        compacted.restore_(model)


def test_in_float32_as_models_are_used() -> None:
    model = sc.sparsify_(seeded(lambda: sc.models.lenet_300_100((1, 28, 28), 10)))
    for i, layer in enumerate(sc.sparse_layers(model).values()):
        layer.set_mask_(rand(*layer.raw_weight.shape, seed=i) < 0.01)
    x = randn(8, 1, 28, 28)
    compacted = compact(model, x[:1])
    expected = model(x)
    assert (compacted.model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert kept(compacted) < 0.2
    assert "dead inputs stay: the model's input keeps its size" in compacted.table()


def test_modes_and_frozen_parameters_stay() -> None:
    model = with_masks(
        (3, 4, 2), ["xxx", "...", "xxx", "xxx"], ["xx.x", "xxxx"], dtype=torch.float32
    )
    model[2].eval()  # pyright: ignore
    model[0].bias.requires_grad_(False)  # pyright: ignore
    small: Any = compact(model, torch.zeros(1, 3)).model
    assert small.training and small[0].training and not small[2].training
    assert not small[0].bias.requires_grad and small[0].raw_weight.requires_grad


def test_a_layer_by_itself_stays() -> None:
    model: Any = seeded(lambda: chain(nn.Linear(4, 3)))
    assert_exact(model[0], (4,))


class Steered(nn.Module):
    """Does something else for some inputs, or in training."""

    def __init__(self, by_value: bool) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.fc, self.by_value = nn.Linear(4, 4), by_value

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is not None:
            x = x * scale
        if self.by_value:
            return self.fc(x) if x.sum() > 0 else x
        return self.fc(x).relu() if self.training else self.fc(x)


def test_what_cannot_be_compacted_says_what_to_do() -> None:
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"no sparse layers: call sparsecore.sparsify_"):
        compact(nn.ReLU(), x)
    by_value = sc.sparsify_(seeded(lambda: nn.Sequential(Steered(True))))
    with pytest.raises(ValueError, match=r"(?s)cannot be traced in '0'.*torch.fx.wrap"):
        compact(by_value, x)
    by_mode = sc.sparsify_(seeded(lambda: Steered(False)))
    with pytest.raises(ValueError, match=r"other operations in training.*training=False"):
        compact(by_mode, x)
    assert compact(by_mode, x, training=False).layers["fc"].outputs == (4, 4)
    with pytest.raises(ValueError, match=r"does not run on the example, \(1, 5\)"):
        compact(by_mode, torch.zeros(1, 5), training=False)
    gated: Any = sc.sparsify_(seeded(lambda: nn.Sequential(nn.Linear(4, 4))))
    gated[0].pattern = Gated(gated[0].raw_weight.shape, Concrete(), density=0.5)
    with pytest.raises(ValueError, match=r"expected a decided mask, 0 is Gated.*ticket.apply_"):
        compact(gated, x)


def test_restoring_into_another_model_changes_nothing() -> None:
    rows, reads = ["xxx", "...", "xxx", "xxx"], ["xx.x", "xxxx"]
    model = with_masks((3, 4, 2), rows, reads, dtype=torch.float32)
    compacted = compact(model, torch.zeros(1, 3))
    other = with_masks((3, 5, 2), [*rows, "xxx"], ["xxxxx"] * 2, dtype=torch.float32)
    masked = with_masks((3, 4, 2), rows, ["xx..", "xxxx"], dtype=torch.float32)
    revived = with_masks(
        (3, 4, 2), ["xxx"] * 4, reads, dtype=torch.float32
    )  # where nothing is left
    for target, why in (
        (other, r"0\.bias, 0\.weight, 2\.weight"),
        (masked, "2 has another mask"),
        (revived, "0 has another mask"),
    ):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=why):
            compacted.restore_(target)
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


class Counting(nn.Linear):
    """Has a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_restoring_a_module_whose_name_is_pattern() -> None:
    model: Any = nn.Sequential()
    model.pattern, model.head = seeded(lambda: nn.Linear(3, 3)), seeded(lambda: Counting(3, 2))
    sc.sparsify_(model, "pattern")
    compacted = compact(model, torch.zeros(1, 3))
    small: Any = compacted.model
    small.pattern.bias.data.fill_(7.0)
    compacted.restore_(model)
    assert (model.pattern.bias == 7).all()
