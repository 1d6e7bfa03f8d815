"""What a file says is taken as what it has to be, or refused in one line."""

import math
from typing import Annotated, Any, Literal

import pytest
import torch
from helpers import rand
from typing_extensions import NotRequired, TypedDict

from sparsecore import schema
from sparsecore.schema import Count, Fraction, Most, Number, Range, Shape, facts, tensor, tensors
from sparsecore.writing import FileError


class Line(TypedDict):
    index: Count
    share: Fraction
    note: NotRequired[str | None]


GOOD: list[tuple[Any, Any, Any]] = [
    (1, int, 1),
    (1, float, 1),
    (0.5, float, 0.5),
    (math.nan, Number, math.nan),
    (2, Number, 2),
    (True, bool, True),
    (None, float | None, None),
    ("a", Literal["a", "b"], "a"),
    ([1, 2], list[int], [1, 2]),
    ([1, 2.5], list[float], [1, 2.5]),
    ([1, 2], Annotated[list[int], Most(2)], [1, 2]),
    ([2, 3], Shape, [2, 3]),
    ([1, 2], tuple[int, ...], (1, 2)),
    ([[1, 0.5]], list[tuple[int, float]], [(1, 0.5)]),
    ({"a": 1}, dict[str, float], {"a": 1}),
    ({"index": 1, "share": 1, "more": []}, Line, {"index": 1, "share": 1}),
    ({"note": None, "index": 0, "share": 0.0}, Line, {"note": None, "index": 0, "share": 0.0}),
]
BAD: list[tuple[Any, Any]] = [
    (True, int),
    (1.0, int),
    ("1", int),
    (2**63, int),
    ([1, 2**63], list[int]),
    ([0.5, math.nan], list[float]),
    ([1, 2, 3], Annotated[list[int], Most(2)]),
    ([1, "a", 2], Annotated[list[int], Most(2)]),
    ([1] * 65, Shape),
    ([-1], Shape),
    (10**400, float),
    (math.nan, float),
    (math.inf, float),
    (-math.inf, Fraction),
    ("nan", Number),
    (1, bool),
    (0, None),
    (1, str),
    (1, Literal["a"]),
    (True, Literal[1]),
    ({}, list[int]),
    ([1, "a"], list[int]),
    ([1], tuple[int, int]),
    ([1, 2, 3], tuple[int, int]),
    ("ab", list[str]),
    ([], dict[str, int]),
    ({"a": None}, dict[str, int]),
    ([], Line),
    ({"index": 1}, Line),
    ({"index": -1, "share": 1}, Line),
    ({"index": 1, "share": 1.5}, Line),
    ({"index": 1, "share": 1, "note": 2}, Line),
    (-1, Annotated[int, Range(0, 5)]),
]


@pytest.mark.parametrize("case", range(len(GOOD)))
def test_facts_of_their_kind_are_taken(case: int) -> None:
    value, hint, expected = GOOD[case]
    found = facts(value, hint, "file")
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("case", range(len(BAD)))
def test_facts_of_another_kind_are_refused_in_a_short_line(case: int) -> None:
    value, hint = BAD[case]
    with pytest.raises(FileError, match=r"^file.*: expected .*, got ") as error:
        facts(value, hint, "file")
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


OWN = rand(3, 4)


@pytest.mark.parametrize(
    "found",
    [
        OWN.double(),
        OWN.half(),
        OWN.bool(),
        OWN.to(torch.complex64),
        OWN.view(torch.int32),
        OWN.T,
        OWN[:0],
        OWN[0, 0],
        OWN[None],
        OWN.new_zeros(1).expand(3, 5),
        OWN * math.nan,
        OWN / 0,
    ],
    ids=range(12),
)
def test_a_tensor_is_like_the_one_whose_place_it_takes(found: torch.Tensor) -> None:
    assert tensor(OWN.clone(), OWN, "x") is not OWN
    with pytest.raises(FileError, match=r"^x: expected "):
        tensor(found, OWN, "x")


def test_what_is_not_finite_may_take_the_place_of_what_is_not() -> None:
    own = torch.full((2, 2), -math.inf).triu(1)  # as a causal mask
    assert tensor(own.clone(), own, "mask") is not own
    with pytest.raises(FileError, match="finite"):
        tensor(own, torch.zeros(2, 2), "mask")


def test_names_are_those_of_the_run_and_sizes_are_not_negative() -> None:
    own = {"v/0": torch.zeros(2), "v.weight": torch.zeros(2), "bn.running_var": torch.ones(2)}
    good = {"v/0": rand(2), "v.weight": -rand(2), "bn.running_var": rand(2)}
    assert tensors(good, own, "file", ("v/",)).keys() == own.keys()
    for name in ("v/0", "bn.running_var"):
        with pytest.raises(FileError, match="from 0 on, got negative"):
            tensors(good | {name: -good[name] - 1}, own, "file", ("v/",))
    for wrong in ({"v/0": rand(2)}, good | {"more": rand(2)}):
        with pytest.raises(FileError, match="expected the 3 tensors of this run"):
            tensors(wrong, own, "file")


def test_casting_keeps_the_kind_of_number() -> None:
    own = torch.zeros(2, dtype=torch.float16)
    assert schema.castable(rand(2).double(), own, "x").dtype == torch.float16
    for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(FileError, match="expected float16"):
            schema.castable(wrong, own, "x")
    with pytest.raises(FileError, match="finite"):
        schema.castable(torch.full((2,), 1e30), own, "x")  # beyond half precision
