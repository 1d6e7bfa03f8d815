"""Lists of files and options that loops go over are bounded: a file of a few megabytes costs no minutes."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import DIGITS, one_error

from sparsecore import figures
from sparsecore.cli import main
from sparsecore.recipe import MOST_MILESTONES, Recipe
from sparsecore.recipes import check_options, recipe_for
from sparsecore.setups import Setup
from sparsecore.tickets import Ticket

SETUP = Setup("lenet-300-100", "digits", recipe_for("lenet-300-100"))
MANY = 100_001


@pytest.mark.parametrize(
    "made",
    [
        lambda: Recipe(milestones=(0.5,) * MANY),
        lambda: Recipe(milestones=(0.5,) * (MOST_MILESTONES + 1)),
        lambda: replace(SETUP, sparse_layers=("*",) * MANY),
        lambda: check_options("torchvision:densenet121", {"block_config": [1] * MANY}),
        lambda: check_options("torchvision:mobilenet_v2", {"inverted_residual_setting": [[1] * 4] * MANY}),
        lambda: figures.draw_layers(Path("p.png"), {"t": {str(i): 0.5 for i in range(MANY)}}),
        lambda: figures.draw_layers(Path("p.png"), {str(i): {"1": 0.5, "2": 0.5} for i in range(MANY)}),
        lambda: figures.draw_gates(Path("p.png"), {str(i): torch.zeros(1) for i in range(MANY)}),
    ],
)  # fmt: skip
def test_more_than_a_loop_is_for_is_refused(made: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"expected at most [0-9,]+ .*, got [0-9,]+") as error:
        made()
    assert len(str(error.value)) < 200


def test_the_most_of_them_are_taken() -> None:
    recipe = Recipe(milestones=(0.5,) * MOST_MILESTONES)
    assert recipe.lr_at(2, 3) == recipe.lr * recipe.gamma**MOST_MILESTONES
    assert len(replace(SETUP, sparse_layers=("*",) * 1_000).globs) == 1_000


def long(ticket: Ticket, what: str) -> Ticket:
    setup = ticket.meta["setup"]
    changed = {
        "milestones": {"setup": setup | {"recipe": setup["recipe"] | {"milestones": [0.5] * MANY}}},
        "globs": {"setup": setup | {"sparse_layers": ["*"] * MANY}},
        "values": {"setup": setup | {"model_options": {"width": [1] * MANY}}},
        "records": {"progress": [{"epoch": i} for i in range(MANY)]},
    }
    return replace(ticket, meta=ticket.meta | changed[what])


@pytest.mark.parametrize(
    ("what", "items"),
    [("milestones", "fractions"), ("globs", "globs"), ("values", "values"), ("records", "records of .* progress")],
)  # fmt: skip
def test_a_ticket_with_long_lists(
    what: str, items: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*DIGITS, "--method", "magnitude", "--rewind-epochs", "0"]) == 0
    long(Ticket.load("t"), what).save("t")
    capsys.readouterr()
    command = ["analyze", "progress", "t", "--out", "a"] if what == "records" else ["train", "t"]
    assert main(command) == 2
    assert re.search(f"expected at most [0-9,]+ {items}, got 100,001", one_error(capsys))
    assert {p.name for p in tmp_path.iterdir()} == {"t"}
