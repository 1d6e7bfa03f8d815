"""Methods on ResNet-20 and CIFAR-10, cell by cell: hours on a GPU, in slices."""

import sys

from .stages import Command, Commands, Setting, Stage

# pace=56 is a twelfth of ltr's epochs, as 4.5 is where a training has 12.
METHODS = ("joint", "joint:pace=56", "cts", "ltr", "ltr+reinit", "snip")
SPARSITIES, SEEDS = ("0.9", "0.98", "0.99262"), 3
SETUP = (
    "--data", "cifar10", "--model", "resnet-20", "--model-option", "shortcut=3x3",
    "--model-option", "bn_init=uniform", "--rewind-epochs", "9", "--epochs", "151",
)  # fmt: skip
QUICK_METHODS, QUICK_SPARSITIES, QUICK_SEEDS = ("magnitude", "random"), ("0.9",), 1
QUICK_SETUP = ("--data", "digits", "--model", "lenet-300-100", "--rewind-epochs", "0", "--epochs", "1")  # fmt: skip


def stages(setting: Setting) -> list[Stage]:
    if setting.quick:
        methods, sparsities, seeds = QUICK_METHODS, QUICK_SPARSITIES, QUICK_SEEDS
        setup = QUICK_SETUP
    else:
        methods, sparsities, seeds, setup = METHODS, SPARSITIES, SEEDS, SETUP
    amp = ("--recipe", "amp=bf16") if setting.device != "cpu" else ()
    argv = (
        sys.executable, "-m", "sparsecore", "compare", *setup, *setting.data_options, *amp,
        "--device", setting.device, "--methods", ",".join(methods), "--sparsities", ",".join(sparsities),
        "--seeds", str(seeds), "--out", str(setting.runs),
    )  # fmt: skip
    cells = seeds * (1 + len(methods) * len(sparsities))  # 1: dense

    def told() -> str:
        path = setting.runs / "results.csv"
        done = path.read_bytes().count(b"\n") - 1 if path.exists() else 0
        return f"{done} of {cells} cells are in {path}, {cells - done} are left"

    work = [Command("compare", argv)]
    return [Commands("comparison", 1.0, float("inf"), told, work=work)]
