"""Running statistics that are measured anew, against a direct computation."""

import copy

import pytest
import torch
from helpers import Blobs, Fixed, equal, mlp, normed
from torch import nn

from sparsecore.batchnorm import recompute_statistics_


def test_statistics_against_a_direct_computation() -> None:
    model = normed().train()
    with torch.no_grad():
        batches = [x for x, _ in Blobs().epoch(0)][:3]
        first = [model[0](x) for x in batches]  # without dropout
        second = []
        for h in first:
            mean, var = h.mean(0), h.var(0, unbiased=False)
            second.append(model[4](((h - mean) / (var + 1e-5).sqrt()).relu()))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    assert recompute_statistics_(model, Blobs(), limit=3) is model
    for norm, hidden in ((model[2], first), (model[5], second)):
        mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
        var = torch.stack([h.var(0) for h in hidden]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        assert int(norm.num_batches_tracked) == 3
    assert (model[2].momentum, model[5].momentum) == (0.1, None)
    assert [m.training for m in model.modules()] == modes


def test_measuring_statistics_again_changes_nothing_and_weights_stay() -> None:
    model = normed()
    weights = copy.deepcopy(dict(model.named_parameters()))
    once = copy.deepcopy(recompute_statistics_(model, Blobs()).state_dict())
    assert equal(once, recompute_statistics_(model, Blobs()).state_dict())
    assert equal(weights, dict(model.named_parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_statistics_that_cannot_be_measured() -> None:
    model = normed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected at least one batch.*limit=0"):
        recompute_statistics_(model, Blobs(), limit=0)
    assert equal(before, model.state_dict())
    recompute_statistics_(mlp(), Blobs(), limit=0)  # nothing to measure
    untracked = nn.Sequential(nn.BatchNorm1d(12, track_running_stats=False))
    recompute_statistics_(untracked, Blobs(), limit=0)
    with pytest.raises(ValueError, match="shapes cannot be multiplied"):
        recompute_statistics_(model, Fixed(torch.zeros(4, 3), torch.zeros(4)))
    assert model.training and model[2].momentum == 0.1  # put back after an error too


def test_statistics_that_are_no_numbers_are_refused() -> None:
    model, data = normed(), Blobs()
    data.x[3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="finite statistics, got others; check the data"):
        recompute_statistics_(model, data)
    assert equal(before, model.state_dict())
