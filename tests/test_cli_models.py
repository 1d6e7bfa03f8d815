"""Any of torchvision's models under any method: a ticket, or one line that says how to mend it."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sparsecore.cli import main
from sparsecore.data import Batches, Dataset
from sparsecore.tickets import Ticket

# Every method, as short as it can be.
METHODS = (
    "cts", "joint:epochs=1", "ltr:rate=0.5", "imp:rate=0.5", "lr-rewind:rate=0.5", "continuous", "gradual:updates=1",
    "gmp:updates=1", "set:epochs=2", "rigl:interval=1", "edge-popup:epochs=1", "strong:epochs=1", "snip",
    "iterative-snip:rounds=2", "grasp", "synflow:rounds=2", "magnitude", "erk", "uniform", "random",
)  # fmt: skip
SIZES = (16, 64)
SMALL = ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small")
# Of every family; weights of hundreds of millions say nothing more and take minutes.
MODELS = (
    *SMALL, "squeezenet1_0", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "mobilenet_v2",
    "mobilenet_v3_large", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "googlenet", "inception_v3",
    "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_v2_s", "regnet_x_400mf", "regnet_x_800mf",
    "regnet_x_1_6gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "resnet18", "resnet34", "resnet50",
    "resnet101", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "densenet169", "maxvit_t", "swin_t", "swin_s",
    "swin_v2_t", "convnext_tiny", "alexnet", "vit_b_16",
)  # fmt: skip


def cases() -> list[Any]:
    """So many methods of each model at each size as SPARSECORE_FUZZ says: one by default; all 20 take hours."""
    count = int(os.environ.get("SPARSECORE_FUZZ", "1"))
    found = []
    for model in MODELS:
        methods = random.Random(model).sample(METHODS, len(METHODS))
        for i, size in enumerate(SIZES):
            chosen = (methods[i::2] + methods[1 - i :: 2])[:count]
            marks = [] if model in SMALL else pytest.mark.slow
            found += [pytest.param(model, size, method, marks=marks) for method in chosen]
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in "ab":
        (root / label).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


@pytest.mark.parametrize(("model", "size", "method"), cases())
def test_a_ticket_that_trains_or_one_line(
    model: str, size: int, method: str, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if request.node.get_closest_marker("slow") and request.config.option.markexpr != "slow":
        pytest.skip("minutes for all families of models: pytest -m slow")
    out = tmp_path / "t.safetensors"
    code = main([
        "search", "--model", f"torchvision:{model}", "--data", f"folder:{pictures}", "--method", method,
        "--image-size", str(size), "--rewind-epochs", "0", "--epochs", "1", "--search-epochs", "1",
        "--search-batch", "4", "--recipe", "batch=4", "--recipe", "lr=1e-3", "--sparsity", "0.5", "--engine", "eager",
        "--out", str(out),
    ])  # fmt: skip
    if code == 0:
        assert Ticket.load(out).sparsity == pytest.approx(0.5, abs=0.01)
        code = main(["train", str(out), "--data", f"folder:{pictures}", "--engine", "eager"])
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if not line.startswith("warning: ")]
    if code == 0:
        assert told == []
    else:
        assert code == 2 and len(told) == 1 and told[0].startswith("error: "), told
        # On images of a few pixels some scores and losses overflow, and some models are differentiated but once.
        mends = (
            "--image-size",
            "synflow: ",
            "scores hold NaN",
            "take another --method",
            "not finite",
            "the loss is",
        )
        assert any(what in told[0] for what in mends), told
    assert not [*tmp_path.glob("*.dense")] and not [*tmp_path.glob("*.part")]


def run(*options: str) -> int:
    common = [
        "--rewind-epochs",
        "0",
        "--epochs",
        "1",
        "--sparsity",
        "0.5",
        "--out",
        "t.safetensors",
    ]
    return main(["search", "--engine", "eager", *common, *options])


def test_a_model_that_cannot_be_differentiated_twice(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = ["--model", "torchvision:mobilenet_v3_small", "--data", f"folder:{pictures}"]
    assert run(*model, "--method", "grasp") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "take another --method" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "take a smaller batch"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "a smaller batch",
        ),
    ],
)
def test_too_little_memory_is_one_line(
    error: RuntimeError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sparsecore.cli.rewind_point", fails)
    assert run("--data", "digits") == 2
    assert said in capsys.readouterr().err
    error.args = ("a bug",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="a bug"):
            run("--data", "digits")


@pytest.mark.parametrize(
    ("globs", "layers"),
    [
        (["1", "3"], ["1", "3"]),
        (["!5"], ["1", "3"]),
        (["*", "!3", "!5"], ["1"]),
        (["[13]"], ["1", "3"]),
    ],
    ids=" ".join,
)
def test_layers_by_several_globs(
    globs: list[str], layers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [part for glob in globs for part in ("--layers", glob)]
    assert run("--data", "digits", "--method", "magnitude", *options) == 0
    ticket = Ticket.load(tmp_path / "t.safetensors")
    assert sorted(ticket.masks) == layers
    stored = ticket.meta["setup"]["sparse_layers"]
    assert stored == (globs[0] if len(globs) == 1 else globs)
    assert main(["train", "t.safetensors", "--epochs", "1", "--save", "w.safetensors"]) == 0
    # What was trained is where another search may begin; its tickets start there, and need the file no more.
    assert run("--data", "digits", "--method", "magnitude", "--weights", "w.safetensors") == 0
    start = load_file("w.safetensors")
    found = Ticket.load(tmp_path / "t.safetensors").weights
    assert all(torch.equal(found[name], value) for name, value in start.items())
    Path("w.safetensors").unlink()
    assert main(["train", "t.safetensors", "--epochs", "1", "--sanity", "reinit"]) == 0


def test_layers_and_weights_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, said in (
        (["--layers", "1", "--layers", "7"], "no layer matches '7'; the model's are 1, 3, 5"),
        (["--layers", "!7"], "no layer matches '!7'"),
        (["--layers", "!*"], "no layer matches"),
        (["--weights", "w.pt"], "expected a file or DEFAULT, found nothing there"),
        (["--weights", "DEFAULT"], "lenet-300-100 is not"),
        (["--drop-last", "--recipe", "batch=2000", "--rewind-epochs", "1"], "drop last: expected a batch of at most"),
    ):  # fmt: skip
        assert run("--data", "digits", "--method", "magnitude", *options) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not [*tmp_path.iterdir()]


def test_a_last_smaller_batch_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[tuple[str, int]] = []
    init = Batches.__init__

    def noted(self: Batches, dataset: Dataset, split: str, *sizes: int, **options: Any) -> None:
        init(self, dataset, split, *sizes, **options)
        made.append((split, len(self)))

    monkeypatch.setattr(Batches, "__init__", noted)
    options = ["--data", "digits", "--method", "magnitude", "--rewind-epochs", "1"]
    options += ["--recipe", "batch=1000", "--search-batch", "512"]  # of 1,438 and 359
    for more, counts in (([], [2, 3]), (["--drop-last"], [1, 2])):
        made.clear()
        assert run(*options, *more) == 0
        assert [n for split, n in made if split == "train"] == counts
        assert {n for split, n in made if split == "test"} == {1}  # all are evaluated
    assert Ticket.load(tmp_path / "t.safetensors").meta["setup"]["drop_last"] is True
    made.clear()
    assert main(["train", "t.safetensors", "--epochs", "1"]) == 0
    assert ("train", 1) in made  # beside an example for its plan


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("sparsecore 0.1.0, torch " + torch.__version__) and "triton" in said


def test_shells_complete_commands() -> None:
    shell = {
        "_SPARSECORE_COMPLETE": "complete_bash",
        "COMP_WORDS": "sparsecore se",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['sparsecore']; from sparsecore.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | shell, check=False
    )  # fmt: skip
    assert done.stdout.split() == ["search"], done
