"""Methods by name, fields from texts, and what a comparison makes of them."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from scipy import stats

import sparsecore as sc
from sparsecore.control import FixedPenalty, GradBalance
from sparsecore.data import DataError, ImageFiles, Split, corrupted
from sparsecore.experiment import Setup
from sparsecore.fields import control_of, gate_of, pairs, replaced
from sparsecore.gates import Bernoulli, Concrete, Gaussian
from sparsecore.methods import METHODS
from sparsecore.recipes import recipe_for
from sparsecore.sanity import CHECKS, verdict
from sparsecore.search import ConcreteSearch, JointSearch, StrongSearch


def setup(**options) -> Setup:
    return Setup("lenet-300-100", "digits", recipe_for("lenet-300-100"), **options)


def test_every_method_is_a_search_with_one_line_about_it() -> None:
    for name, method in METHODS.items():
        assert callable(setup().search(name, seed=3)) and method.says and "\n" not in method.says


def test_a_methods_own_fields_come_with_its_name() -> None:
    found = setup(search_epochs=3).search(
        "joint:ramp=0.25:start_density=0.9:gate=bernoulli", seed=2
    )
    assert isinstance(found, JointSearch)
    assert (found.epochs, found.ramp, found.start_density, found.seed) == (3, 0.25, 0.9, 2)
    assert found.gate == Bernoulli()
    assert found.recipe.lr == pytest.approx(
        1.2e-3 * 512 / 128
    )  # the batch is four times training's
    found = setup().search("strong:control=fixed=0.5:gate=gaussian=0.25", seed=0)
    assert isinstance(found, StrongSearch)
    assert setup().search("edge-popup:weights=scaled", seed=0).weights == "scaled"
    assert setup().search("synflow:rounds=3", seed=0).rounds == 3
    assert found.control == FixedPenalty(0.5) and found.gate == Gaussian(0.25)
    assert setup(control="fixed").search("strong", seed=0).control == FixedPenalty()


def test_what_the_setup_leaves_open_is_the_methods_own() -> None:
    assert setup().search("cts", seed=0) == ConcreteSearch()
    assert setup(tau=0.5).search("cts", seed=0).gate == Concrete(0.5)
    assert setup(tau=0.5).search("strong", seed=0).gate == Gaussian()
    assert setup(tau=0.5).search("joint", seed=0).gate == Concrete(0.5)
    for unsaid in (setup(), setup(tau=0.5)):
        assert unsaid.search("joint:gate=null", seed=0).gate is None
    assert setup(control="lagrangian", gain_lr=0.0).search("joint", seed=0).gain_lr == 0


def test_methods_that_start_from_untrained_weights_keep_the_end_of_the_schedule() -> None:
    own = setup(rewind_epochs=2, train_epochs=12).start_of("strong")
    assert (own.rewind_epochs, own.train_epochs, own.total_epochs) == (0, 14, 14)
    assert setup().start_of("cts") == setup()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("luck", "method: expected one of cts, joint"),
        ("joint:speed=9", "joint field: expected one of .*start_density"),
        ("joint:ramp", "method joint: expected KEY=VALUE, got 'ramp'"),
        ("joint:ramp=soon", "joint ramp: expected float"),
        ("joint:ramp=3", "ramp: expected 0 <= ramp <= 1, got 3"),
        ("joint:gate=door", "gate: expected one of concrete"),
        ("strong:control=fixed=much", "control fixed: expected a number it takes, got 'much'"),
        ("joint:recipe=1", "joint field"),
    ],
)
def test_bad_methods_are_told(method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setup().search(method, seed=0)


def test_fields_keep_their_types() -> None:
    @dataclass(frozen=True)
    class Value:
        count: int = 1
        share: float = 0.5
        name: str | None = None
        flag: bool = False
        cuts: tuple[float, ...] = ()

    texts = ["count=3", "share=1", "name=a", "flag=true", "cuts=[0.5,0.7]"]
    assert replaced(Value(), pairs(texts, "x"), "x") == Value(3, 1, "a", True, (0.5, 0.7))
    assert replaced(Value(name="b"), pairs(["name=null"], "x"), "x").name is None
    for bad in ("count=1.5", "count=true", "share=a", "flag=1", "cuts=0.5", "name=3"):
        with pytest.raises(ValueError, match=f"x {bad.partition('=')[0]}: expected"):
            replaced(Value(), pairs([bad], "x"), "x")
    assert control_of("band=5") == GradBalance(band=5)
    assert setup().search("joint", 0).control == control_of("band")
    assert control_of("gradbalance") == GradBalance() and gate_of("concrete=1") == Concrete(1.0)


def test_a_verdict_is_the_paired_t_test() -> None:
    ticket, control = {0: 90.0, 1: 91.0, 2: 89.5, 7: 50.0}, {0: 88.0, 1: 90.5, 2: 87.0}
    found = verdict("shuffle", ticket, control)
    right = stats.ttest_rel([90, 91, 89.5], [88, 90.5, 87], alternative="greater")
    assert found.p == pytest.approx(right.pvalue) and found.seeds == 3
    assert found.loss == pytest.approx(5 / 3) and not found.passed
    control = {0: 88.0, 1: 88.9, 2: 87.6}
    assert verdict("reinit", ticket, control).passed
    assert verdict("reinit", ticket, control).text == CHECKS["reinit"]
    assert not verdict("reinit", control, ticket).passed  # worse than its control: no pass
    one = verdict("invert", {0: 90.0}, {0: 10.0})
    assert math.isnan(one.p) and not one.passed and "one seed" in one.text
    with pytest.raises(ValueError, match="none in common"):
        verdict("invert", {0: 90.0}, {1: 10.0})


def test_corrupted_data_have_the_same_pixels_and_labels_and_nothing_to_learn() -> None:
    data = sc.load("digits")
    broken = corrupted(data, seed=1)
    assert torch.equal(broken.test.images, data.test.images)
    before, after = data.train.images.flatten(1), broken.train.images.flatten(1)
    assert torch.equal(before.sort(1).values, after.sort(1).values)
    assert not torch.equal(before, after)
    assert torch.equal(broken.train.labels.bincount(), data.train.labels.bincount())
    agree = (broken.train.labels == data.train.labels).double().mean().item()
    assert agree == pytest.approx(0.1, abs=0.03)
    assert torch.equal(corrupted(data, seed=1).train.images, broken.train.images)
    assert not torch.equal(corrupted(data, seed=2).train.images, broken.train.images)


def test_data_that_is_not_in_memory_cannot_be_corrupted() -> None:
    data = sc.load("digits")
    files = replace(data, train=Split(ImageFiles([], 8), data.train.labels))
    with pytest.raises(DataError, match="images in memory"):
        corrupted(files, 0)
