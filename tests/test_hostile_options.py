"""Options that no machine or layer can have: one line, quickly, before anything is allocated or written."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from command_line import DIGITS, images, one_error
from helpers import seeded

from sparsecore import experiment, memory, needs
from sparsecore.cli import main
from sparsecore.control import GradBalance
from sparsecore.data import load
from sparsecore.experiment import Setup
from sparsecore.fields import control_of, pairs
from sparsecore.granularity import parse_granularity
from sparsecore.interrupts import GOES_ON, Stop, end_quietly_while_importing
from sparsecore.memory import free_bytes
from sparsecore.outline import MOST_MODULES, bounded
from sparsecore.recipe import Recipe, rates
from sparsecore.recipes import build, outline_of
from sparsecore.search import Rewinding

GIB = 2**30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--granularity", "block:100000x100000"], "expected units within the layers"),
        (["--granularity", "vector:100000"], "expected units within the layers"),
        (["--granularity", "2:10000"], "expected units within the layers"),
        (["--granularity", "1:10000000000"], "expected 1 <= N < M <= 2,147,483,647"),
        (["--granularity", "block:" + "9" * 400 + "x1"], "granularity: expected weight, channel"),
        (["--granularity", "block:٣x٣"], "granularity: expected weight, channel"),
        (["--control", "fixed=-1"], "lambda of at least 0"),
        (["--control", "fixed=1e39"], "float32"),
        (["--control", "gradbalance=3"], "factor of 0.5 to 2"),
        (["--control", "band=500"], "percent, 0 (none) to 100"),
        (["--tau", "1e-300"], "float32"),
        (["--search-lr", "1e300"], "float32"),
        (["--recipe", "lr=1e39"], "float32"),
        (["--recipe", "epochs=1000001"], "recipe epochs: expected 1 to 1,000,000"),
        (["--recipe", "batch=2147483648"], "recipe batch: expected 1 to 2**31 - 1"),
        (["--recipe", "lr=0.1", "--recipe", "lr=0.2"], "recipe lr: expected one value, got 0.1 and 0.2"),
        (["--model-option", "width=0.1"], "model option width: expected one value"),
        (["--method", "joint:lr=1e-300"], "float32"),
        (["--method", "cts:epochs=1:epochs=2"], "expected one value"),
        (["--method", "synflow:rounds=1000000000"], "search rounds: expected at most 1,000,000"),
        (["--method", "gmp:updates=9223372036854775807"], "search updates: expected at most"),
        (["--method", "ltr:rate=1e-30"], "rate: expected at most 10,000 rounds"),
        (["--method", "cts:gate=null"], "gate of cts: expected a value"),
        (["--method", "cts:lr_drop=-1"], "lr_drop: expected a factor of 0 to 1"),
        (["--method", "strong:lr_drop_at=2"], "lr_drop_at: expected a fraction of 0 to 1"),
        (["--epochs", "999999", "--rewind-epochs", "2"], "rewind and train epochs"),
        (["--layers", "[" * 100_000], "layers: expected globs of at most 1,000"),
        (["--device", "cpu:7"], "device: expected auto, cpu"),
        (["--train-samples", "0"], "train samples: expected at least 1"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "",
)  # fmt: skip
def test_what_cannot_be_meant(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "train", _trained)
    start = perf_counter()
    assert main([*DIGITS, *options]) == 2
    assert said in one_error(capsys) and not [*tmp_path.iterdir()]
    assert perf_counter() - start < 5


def _trained(*_: Any, **__: Any) -> None:
    raise AssertionError("trained")


@pytest.mark.parametrize("option", ["--sparsities", "--methods"])
def test_lists_of_thousands(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    value = "0.5," if option == "--sparsities" else "random,"
    assert main(["compare", "--data", "digits", option, value * 100_000]) == 2
    assert "expected at most 1,000, got 100,000" in one_error(capsys)
    assert main(["compare", "--data", "digits", option, value * 900, "--seeds", "10000"]) == 2
    assert "expected at most 100,000 runs" in one_error(capsys)
    assert not [*tmp_path.iterdir()]


def test_ranges_that_have_a_meaning() -> None:
    for text in ("fixed=0", "fixed=0.5", "band=100", "band=3", "gradbalance=1.1", "lagrangian=1"):
        control_of(text)
    assert str(parse_granularity("block:100000x100000")) == "block:100000x100000"  # of some layer
    assert pairs(["lr=0.1"], "it") == {"lr": 0.1}
    assert Rewinding(Recipe(), 1, rate=0.2).count(0.99) == 21
    with pytest.raises(ValueError, match="slack"):
        GradBalance(slack=math.nan)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit-small", {"depth": 10**6}, f"at most {MOST_MODULES:,} modules"),
        ("torchvision:mobilenet_v2", {"inverted_residual_setting": [[1, 16, 10**6, 1]]}, "modules"),
        ("vit-small", {"hidden": 10**9}, "of memory that are free on cpu, got at least"),
        ("vit-small", {"hidden": 2**62}, "less than 2**63 bytes"),
        ("lenet-300-100", {"width": 1000}, "of memory that are free on cpu"),
        ("torchvision:resnet50", {"groups": 10**9 + 7}, "of memory that are free"),
        ("torchvision:resnet50", {"width_per_group": 10**9}, "less than 2**63 bytes"),
        ("torchvision:resnet18", {"zero_init_residual": []}, "expected true or false"),
        ("torchvision:resnet18", {"groups": -1}, "groups of torchvision:resnet18: expected at least 0"),
        ("torchvision:mobilenet_v2", {"width_mult": 0}, "expected at least 0.01"),
        ("torchvision:convnext_tiny", {"layer_scale": 1e300}, "float32"),
        ("torchvision:vit_b_16", {"num_layers": 3}, "num_layers, which it sets itself"),
        ("torchvision:resnet18", {"hidden": 3}, "hidden, which it does not know"),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_models_are_refused_before_they_are_built(
    name: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_of_machine", lambda: 64 * GIB)  # a large one, in all tests
    with pytest.raises(ValueError) as told:
        build(name, (3, 32, 32), 10, **options)
    assert said in str(told.value) and "\n" not in str(told.value), told.value


def test_too_large_is_what_is_free() -> None:
    """The same model is built where there is room; what is counted is what it has."""
    known = outline_of("lenet-300-100", (1, 8, 8), 10, {})
    model = build("lenet-300-100", (1, 8, 8), 10)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert known is not None and known.weights == known.parameters == size
    assert known.activations >= 4 * (64 + 300 + 100)  # what enters each layer
    with pytest.raises(ValueError, match="free on cpu"), bounded(modules=100, memory=size - 1):
        seeded(lambda: torch.nn.Linear(size, 1))


def test_the_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("digits")
    setup = Setup("conv-4", "digits", Recipe(batch=1024))
    check = (setup, data, torch.device("cpu"))
    needs.check_memory(*check, methods=["cts"])
    known = outline_of("conv-4", data.shape, 10, {})
    assert known is not None
    sgd = 3 * known.parameters + 1024 * known.activations  # weights, gradients, momentum
    for free, refused in ((sgd + 1, False), (sgd - 1, True)):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        if refused:
            with pytest.raises(ValueError, match=r"a step of training: .*--recipe batch="):
                needs.check_memory(*check)
        else:
            needs.check_memory(*check)
    small = Setup("conv-4", "digits", Recipe(batch=8))
    with pytest.raises(ValueError, match=r"a step of cts: .*--search-batch"):
        monkeypatch.setattr(memory, "free_bytes", lambda _: 512 * known.activations)
        needs.check_memory(small, data, torch.device("cpu"), methods=["cts"])


def test_images_larger_than_memory_are_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_of_machine", lambda: 64 * GIB)
    monkeypatch.setattr(experiment, "load", _trained)
    folder, out = images(tmp_path / "images", count=2), str(tmp_path / "t")
    for model in ("lenet-300-100", "resnet-20"):
        line = ["search", "--data", f"folder:{folder}", "--image-size", "16384", "--model", model]
        assert main([*line, "--out", out]) == 2
        assert "of memory that are free on cpu" in one_error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_free_memory_is_the_least_of_all_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = free_bytes()
    assert 0 < whole < 2**60
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    for folder, limit in ((tmp_path / "a", "1000"), (group, "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("700")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    found = memory._of_control_groups
    assert found(tmp_path, "0::/a/b\n") == 400  # of the group around
    assert found(tmp_path, "0::/nowhere\n1:cpu:/\n") > whole
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("5000")
    (old / "memory.usage_in_bytes").write_text("1000")
    assert found(tmp_path, "4:cpu,memory:/x\n") == 4000
    monkeypatch.setattr(memory, "_of_process", lambda: 5)
    assert free_bytes() == 5


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 2.5])
def test_rates_are_those_of_the_schedule(schedule: str, warmup: float) -> None:
    recipe = Recipe(lr=0.3, schedule=schedule, milestones=(0.3, 0.7), warmup_epochs=warmup)
    for total, stop, steps in ((7.0, 7.0, 13), (7.3, 4.1, 1), (0.5, 0.5, 5), (3.0, 0.0, 4)):
        wanted = [
            recipe.lr_at(e + (i + 0.5) / steps, total)
            for e in range(math.ceil(stop))
            for i in range(steps)
        ]
        assert rates(recipe, total, stop, steps).tolist() == wanted


def test_absurd_runs_begin_at_once_or_are_refused() -> None:
    start = perf_counter()
    assert len(rates(Recipe(), 10**6, 10**6, 12)) == 12 * 10**6
    assert perf_counter() - start < 5
    with pytest.raises(ValueError, match="at most 33,554,432 steps"):
        rates(Recipe(), 10**6, 10**6, 469)


def _interrupted(monkeypatch: pytest.MonkeyPatch, what: str, *line: str) -> int:
    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(what, stops)
        return main([*line])


def test_ctrl_c_says_what_the_same_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(what: str, *line: str) -> str:
        assert _interrupted(monkeypatch, what, *line) == 130
        [told] = capsys.readouterr().err.splitlines()
        return told

    search = [*DIGITS, "--epochs", "1", "--rewind-epochs", "1", "--method", "cts:epochs=1"]
    anew = f"interrupted; {GOES_ON}, from the beginning: nothing was kept yet"
    assert said("sparsecore.cli.rewind_point", *search) == anew
    Path("t.part").write_bytes(b"")
    assert said("sparsecore.cli.rewind_point", *search) == f"interrupted; {GOES_ON}"
    Path("t.part").unlink()
    assert main(search) == 0
    capsys.readouterr()
    assert "without --checkpoint" in said("sparsecore.cli.train_on", "train", "t")
    kept = ["train", "t", "--checkpoint", "c"]
    assert said("sparsecore.cli.train_on", *kept) == anew
    assert said("sparsecore.cli.layers_of", "info", "t").strip() == "interrupted"
    compare = ["compare", "--data", "digits", "--out", "o"]
    assert said("sparsecore.cli_compare.Comparison.run", *compare) == anew


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_raise_while_a_command_runs(
    signum: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signum)

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signum)
        sleep(5)

    monkeypatch.setattr("sparsecore.cli.rewind_point", killed)
    assert main([*DIGITS, "--method", "magnitude"]) == code
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{Stop(signum).word}; {GOES_ON}")
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_importing(signum: int, code: int, tmp_path: Path) -> None:
    """One that comes as the first of the slow modules is imported."""
    (tmp_path / "torch.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(signum)})\ntime.sleep(20)\n"
    )
    command = [sys.executable, "-m", "sparsecore", "search", "--data", "digits", "--out", "t"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parent.parent)])
    found = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (code, f"{Stop(signum).word}\n")


@pytest.mark.parametrize(
    ("argv", "original", "ours"),
    [
        (["/usr/bin/sparsecore", "info"], ["python", "/usr/bin/sparsecore", "info"], True),
        (["-m", "info"], ["python", "-m", "sparsecore", "info"], True),
        (["-m", "sparsecore"], ["python", "-m", "mine", "sparsecore"], False),
        (["mine.py", "sparsecore"], ["python", "mine.py", "sparsecore"], False),
        ([""], ["python"], False),
    ],
)
def test_signals_of_other_programs_are_theirs(
    argv: list[str], original: list[str], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    handlers: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda signum, _: handlers.append(signum))
    end_quietly_while_importing()
    assert handlers == ([signal.SIGINT, signal.SIGTERM] if ours else [])
