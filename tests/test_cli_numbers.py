"""Numbers, names and options that cannot be meant are one line, before any training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from command_line import DIGITS, one_error

import sparsecore as sc
from sparsecore import experiment
from sparsecore.cli import main
from sparsecore.experiment import Setup
from sparsecore.fields import pairs
from sparsecore.recipe import Recipe

OUT = ["--out", "t"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "[0.5, NaN]", "9" * 30])
@pytest.mark.parametrize(
    "option", ["--recipe=lr", "--model-option=width", "--method=cts:lr", "--method=joint:pace"]
)
def test_numbers_that_are_none(option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*DIGITS, f"{option}={value}"]) == 2
    assert "finite number" in one_error(capsys) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rewind-epochs", "inf"], "rewind epochs: expected at least 0 and at most 1,000,000"),
        (["--epochs", "inf"], "train epochs: expected at least 0"),
        (["--epochs", "1e9"], "train epochs: expected at least 0"),
        (["--tau", "inf"], "tau: expected a finite number"),
        (["--search-lr", "inf"], "search lr: expected a finite number"),
        (["--gain-lr", "nan"], "gain lr: expected a finite number"),
        (["--search-batch", str(2**31)], "search batch: expected 1 to"),
        (["--search-epochs", "0"], "search epochs: expected at least 1"),
        (["--search-epochs", "2000000"], "search epochs: expected at most 1,000,000"),
        (["--method", "joint:pace=1e300"], "search epochs: expected at most 1,000,000"),
        (["--seed", str(2**63)], "less than or equal to"),
        (["--control", "fixed=inf"], "control fixed: expected a number it takes"),
        (["--method", "strong:gate=concrete=nan"], "gate concrete: expected a number it takes"),
        (["--image-size", "0"], "image size: expected 1 to 16,384 pixels"),
        (["--image-size", "9"], "whose images are of 8 x 8"),
        (["--layers", ""], "no layer matches ''"),
        (["--recipe", "optimizer=sgd", "--recipe", "nesterov=true", "--recipe", "momentum=0"], "recipe nesterov"),
        (["--granularity", "2:4", "--sparsity", "0.3"], "allows at most"),
        (["--sparsity", "0"], "0 < sparsity < 1"),
        (["--model-option", "=1"], "KEY=VALUE"),
        *((["--model-option", f"{name}=1"], "expected options that it takes, width") for name in
          ("shape", "classes", "seed", "name", "model", "options", "speed")),
        (["--model", "vit-small", "--model-option", "dim=0"], "expected options that it takes, patch"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_told_before_any_training(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(experiment, "train", trained)
    assert main([*DIGITS, "--method", "cts", *options]) == 2
    assert said in one_error(capsys) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("option", ["num_classes", "weights", "name", "progress"])
def test_what_torchvision_is_told_by_others(option: str) -> None:
    with pytest.raises(ValueError, match=rf"torchvision:resnet18 expected no {option}, "):
        Setup("torchvision:resnet18", "digits", Recipe(), {option: 1})


@pytest.mark.parametrize(("option", "value"), [
    ("dim", 0), ("dim", -1), ("dim", True), ("dim", 1.5), ("heads", 0), ("patch", 0), ("hidden", 0), ("depth", -1),
])  # fmt: skip
def test_sizes_of_a_vision_transformer(option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"vit {option}: expected a whole number of at least"):
        sc.models.vit_small((3, 8, 8), 2, **options)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), 1e9, True, "abc"])
@pytest.mark.parametrize("build", [sc.models.lenet_300_100, sc.models.conv_4, sc.models.vgg_16_bn])
def test_widths(build: Any, width: Any) -> None:
    with pytest.raises(ValueError, match="width: expected a positive factor"):
        build((3, 16, 16), 2, width=width)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_norm", "warmup_epochs"])
def test_recipes_are_finite(name: str) -> None:
    with pytest.raises(ValueError, match=f"recipe {name}: expected"):
        dataclasses.replace(Recipe(), **{name: float("inf")})


def test_values_of_a_command_line() -> None:
    texts = ["a=1", "b=true", "c=x=y", "d=[0.5, 0.7]", "e=null", "f=-9223372036854775808"]
    assert pairs(texts, "it") == {
        "a": 1,
        "b": True,
        "c": "x=y",
        "d": [0.5, 0.7],
        "e": None,
        "f": -(2**63),
    }
