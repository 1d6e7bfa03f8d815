"""A constant lambda that is looked for: the bisection, the ticket it gives, a kill in between."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Blobs, mlp, trained_mlp
from hypothesis import given
from hypothesis import strategies as st

import sparsecore as sc
from sparsecore.control import FixedPenalty
from sparsecore.gates import Bernoulli
from sparsecore.search import (
    ConcreteSearch,
    ContinuousSparsification,
    JointSearch,
    Search,
    SearchError,
    StrongSearch,
)
from sparsecore.search.penalty import TRIES, next_weight
from sparsecore.training import Recipe, evaluate

SEARCHES = [
    StrongSearch(epochs=4, lr=0.2, control=FixedPenalty()),
    ConcreteSearch(epochs=4, gate=Bernoulli(), control=FixedPenalty()),
    JointSearch(epochs=4, control=FixedPenalty()),
    ContinuousSparsification(epochs=4, lr=0.1, control=FixedPenalty(), recipe=Recipe(lr=0.05)),
]


@given(centre=st.floats(0.01, 100), power=st.floats(0.5, 2), sparsity=st.floats(0.3, 0.98))
def test_bisection_ends_within_a_tenth_of_the_density(
    centre: float, power: float, sparsity: float
) -> None:
    tried: list[tuple[float, float]] = []
    while (weight := next_weight(tried, sparsity)) is not None:
        tried.append((weight, 1 - 1 / (1 + (weight / centre) ** power)))
    assert len(tried) <= TRIES and len({w for w, _ in tried}) == len(tried)
    wanted = centre * (sparsity / (1 - sparsity)) ** (1 / power)
    if 1e-2 < wanted < 1e2:
        assert 1 - tried[-1][1] == pytest.approx(1 - sparsity, rel=0.1)


def test_by_hand() -> None:
    assert next_weight([], 0.9) == 1
    assert next_weight([(1, 0.5)], 0.9) == 4
    assert next_weight([(1, 0.95)], 0.9) == 0.25
    assert next_weight([(1, 0.5), (4, 0.95)], 0.9) == 2
    assert next_weight([(1, 0.891)], 0.9) is None
    assert next_weight([(1, 0.5)] * 10, 0.9) is None


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_the_ticket_is_the_found_lambda_s(search: Search) -> None:
    model = trained_mlp(1)
    ticket = search(model, Blobs(), sparsity=0.8)
    tried = ticket.meta["penalties"]
    weight, natural = min(tried, key=lambda t: abs(t[1] - 0.8))
    assert natural == pytest.approx(0.8, abs=0.02) or len(tried) == TRIES
    assert natural == pytest.approx(0.8, abs=0.1)
    own = replace(search, control=FixedPenalty(weight))(model, Blobs(), sparsity=0.8)
    assert ticket.hash == own.hash and ticket.meta["natural_sparsity"] == natural
    assert ticket.meta["control"] == repr(FixedPenalty(weight))


@pytest.mark.parametrize("at", [1, 5, 9])
@pytest.mark.parametrize("search", SEARCHES[::3], ids=lambda s: type(s).__name__)
def test_killed_between_and_inside_searches_it_goes_on(
    search: Search, at: int, tmp_path: Path
) -> None:
    model, path, seen = trained_mlp(1), tmp_path / "checkpoint", 0
    expected = search(model, Blobs(), sparsity=0.8)

    def dying(net) -> float:
        nonlocal seen
        seen += 1
        if seen == at:
            raise KeyboardInterrupt
        return evaluate(net, Blobs())

    with pytest.raises(KeyboardInterrupt):
        search(model, Blobs(), sparsity=0.8, checkpoint=path, watch=dying)
    if at > 8:  # a search is behind it
        with pytest.raises(SearchError, match="belongs to another search"):
            search(model, Blobs(), sparsity=0.7, checkpoint=path)
    found = search(model, Blobs(), sparsity=0.8, checkpoint=path)
    assert found.hash == expected.hash and found.meta["penalties"] == expected.meta["penalties"]
    found.save(tmp_path / "ticket")
    assert [p.name for p in tmp_path.iterdir()] == ["ticket"]


def test_where_a_number_is_needed_it_is_asked_for() -> None:
    search = ConcreteSearch(epochs=1, control=FixedPenalty())
    with pytest.raises(ValueError, match=r"expected a number here, as in fixed=0\.5"):
        search.many(sc.sparsify_(mlp()), Blobs(), sparsities=[0.5, 0.8])


def test_a_constant_penalty_has_one_target_all_along() -> None:
    search = JointSearch(control=FixedPenalty(2.0))
    assert search.targets(0.1, 5) == [0.1] * 5
