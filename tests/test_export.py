"""What others make of a sparse model: traces, scripts, graphs, or one line that names densify_."""

import copy
import warnings

import pytest
import torch
from helpers import rand, randn, seeded
from torch import nn

import sparsecore as sc


def model(plan: str) -> nn.Module:
    net = sc.sparsify_(seeded(lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)
    )))  # fmt: skip
    for layer in sc.sparse_layers(net).values():
        layer.set_mask_(rand(*layer.weight_shape) < 0.4)
    return sc.plan_(net, plan).eval()


X = randn(2, 1, 6, 6)
WAYS = {
    "trace": lambda net: torch.jit.trace(net, X),
    "script": torch.jit.script,
    "fx": torch.fx.symbolic_trace,
    "export": lambda net: torch.export.export(net, (X,)).module(),
}
REFUSED = {("mask", "script"), ("state", "script"), ("state", "fx"), ("csr", "script")}
REFUSED |= {("csr", "fx"), ("csr", "trace")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", ["mask", "state", "csr"])
def test_exports(plan: str, way: str) -> None:
    net = model(plan)
    before = [type(module) for module in net.modules()]
    if (plan, way) in REFUSED:
        with pytest.raises((TypeError, ValueError), match=r"densify_\(copy.deepcopy\(model\)\)"):
            WAYS[way](net)
    else:
        made = WAYS[way](net)
        torch.testing.assert_close(made(X), net(X))
        if way == "fx":  # of the parameters themselves
            with torch.no_grad():
                net[3].weight.mul_(2)
            torch.testing.assert_close(made(X), net(X))
    assert [type(module) for module in net.modules()] == before
    plain = sc.densify_(copy.deepcopy(net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(WAYS[way](plain)(X), net(X))
