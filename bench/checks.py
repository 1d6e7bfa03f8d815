"""What a run must show beside numbers: killed runs go on, and memory is used as it should be.

`python -m bench.checks WHAT...`, WHAT of training, search, gates, step:PLAN; exit code 0 if all of it holds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from torch import nn

import sparsecore as sc
from sparsecore import checkpoints, cli
from sparsecore.tickets import Ticket

from .cases import StepCase
from .processes import end_with_parent
from .search_networks import synthetic
from .ticket_cases import random_mask

# On the CPU a run that was killed ends at the same numbers.  On a GPU gradients of convolutions are sums in any
# order, and training enlarges their rounding: losses agree within 5 %, accuracies within 2 points of 100,
# and nine in ten of the weights that two searches keep.
LOSS, ACCURACY, KEPT = 0.05, 2.0, 0.9


SPARSECORE = (sys.executable, "-m", "sparsecore")


def whole_run(*arguments: str) -> None:
    """An unbroken run of the command line, in this process."""
    if cli.main(list(arguments)):
        raise RuntimeError(f"expected it to end well: sparsecore {' '.join(arguments)}")


def started(command: list[str], began: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """A process that is in the middle of its work.  Errors: RuntimeError if it ended before or never began."""
    process, start = subprocess.Popen(command, preexec_fn=end_with_parent), monotonic()
    while not began():
        if process.poll() is not None or monotonic() - start > 120:
            process.kill()
            raise RuntimeError(f"expected to meet it in the middle: {' '.join(command)}")
        sleep(0.002)
    return process


def killed(command: list[str], began: Callable[[], bool]) -> None:
    """Runs a command until it has begun and kills it there.  Errors: RuntimeError if it ended before."""
    process = started(command, began)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"expected to kill it in the middle, it ended: {' '.join(command)}")


def require(what: str, found: Any, expected: Any, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance:
        raise AssertionError(
            f"{what} of the run that was killed: expected {expected} as without (to {tolerance:g}), got {found}"
        )


def _where(device: str) -> list[str]:
    """On a GPU steps are graphs, as those of longer runs are."""
    return ["--device", device, *([] if device == "cpu" else ["--engine", "graph"])]


def _setup(device: str, quick: bool) -> list[str]:
    model = "lenet-300-100" if quick else "resnet-20"
    return ["--data", "digits", "--model", model, "--rewind-epochs", "0", *_where(device)]


def training(folder: Path, device: str, quick: bool) -> None:
    """`sparsecore train`, once unbroken and once killed after an epoch."""
    ticket, epochs = folder / "T.safetensors", "4" if quick else "12"
    setup = [*_setup(device, quick), "--method", "random", "--sparsity", "0.9"]
    whole_run("search", *setup, "--out", str(ticket))

    def arguments(name: str) -> list[str]:
        paths = {"--json": "json", "--metrics": "jsonl", "--checkpoint": "checkpoint"}
        options = [text for o, end in paths.items() for text in (o, str(folder / f"{name}.{end}"))]
        return ["train", str(ticket), "--epochs", epochs, *_where(device), *options]

    whole_run(*arguments("whole"))
    command = [*SPARSECORE, *arguments("broken")]
    checkpoint, metrics = folder / "broken.checkpoint", folder / "broken.jsonl"
    killed(command, checkpoint.exists)
    before = [json.loads(line) for line in metrics.read_text().splitlines() if line[-1] == "}"]
    subprocess.run(command, check=True, preexec_fn=end_with_parent)
    whole, broken = (json.loads((folder / f"{n}.json").read_text()) for n in ("whole", "broken"))
    if not before or broken["epochs"][0] != before[0]:  # its seconds too
        raise AssertionError("the run that was killed began anew instead of at its checkpoint")
    gpu = device != "cpu"
    for mine, other in zip(broken["epochs"], whole["epochs"], strict=True):
        what = f"epoch {other['epoch']}: "
        require(what + "loss", mine["loss"], other["loss"], gpu * LOSS * other["loss"])
        require(what + "accuracy", mine["accuracy"], other["accuracy"], gpu * ACCURACY)


def search(folder: Path, device: str, quick: bool) -> None:
    """`sparsecore search`, once unbroken and once killed after an epoch."""
    epochs = "4" if quick else "12"
    options = ["--method", "cts", "--search-epochs", epochs, "--search-batch", "128"]

    def arguments(name: str) -> list[str]:
        return ["search", *_setup(device, quick), *options, "--out", str(folder / name)]

    whole_run(*arguments("whole"))
    command, part = [*SPARSECORE, *arguments("broken")], folder / "broken.part"
    killed(command, part.exists)
    before, epochs_before = part.stat(), _epochs(part)
    again = started(command, lambda: not os.path.samestat(part.stat(), before))
    if _epochs(part) <= epochs_before:
        again.kill()
        raise AssertionError("the search that was killed began anew instead of at its checkpoint")
    if again.wait():
        raise AssertionError("the search that was killed did not end when it was run again")
    whole, broken = (Ticket.load(folder / name) for name in ("whole", "broken"))
    require("sparsity", broken.sparsity, whole.sparsity, 0.0)
    both = sum(int((whole.masks[n] & mask).sum()) for n, mask in broken.masks.items())
    kept = sum(int(mask.sum()) for mask in whole.masks.values())
    require("kept weights", both, kept, (device != "cpu") * (1 - KEPT) * kept)


def _epochs(part: Path) -> int:
    return len(checkpoints.read(part)[1]["records"])


def _model(device: str) -> nn.Module:
    layers = (
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sc.sparsify_(nn.Sequential(*layers, nn.Linear(64, 10)).to(device))


def step(plan: str, device: str) -> None:
    """A training step of a small ticket under a plan."""
    if plan != "auto":  # which measures graphs, where nothing can be allocated so
        # Each tensor in an allocation of its own, so that a checker sees where it ends.
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    model = _model(device)
    for name, layer in sc.sparse_layers(model).items():
        if name != "5":
            layer.set_mask_(random_mask(tuple(layer.weight.shape), "block:16x16", 0.5).to(device))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, 4, 4, generator=generator).to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
        sc.plan_(model, plan, *([x] if plan == "auto" else []))
        loss = model(x).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    require("finite parameters", sum(int((~p.isfinite()).sum()) for p in model.parameters()), 0, 0)


def gates(device: str) -> None:
    """A small search by gates, two epochs; on a GPU as a graph."""
    batches = synthetic(StepCase("", (16, 4, 4), 32, 0), 96, torch.device(device))
    engine = "eager" if device == "cpu" else "graph"
    ticket = sc.ConcreteSearch(epochs=2, engine=engine)(_model(device), batches, sparsity=0.75)
    require("sparsity", ticket.sparsity, 0.75, 0.01)


def check(what: str, folder: Path, device: str, *, quick: bool) -> None:
    """One check by name.  Errors: what is wrong."""
    kind, _, plan = what.partition(":")
    if kind in ("training", "search"):
        folder /= kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (training if kind == "training" else search)(folder, device, quick)
        shutil.rmtree(folder)
    elif kind == "gates":
        gates(device)
    elif kind == "step":
        step(plan, device)
    else:
        raise ValueError(f"expected training, search, gates or step:PLAN, got {what}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checks", description=__doc__)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=Path("build"), help="of runs that are killed"
    )
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    for what in arguments.what:
        check(what, arguments.folder, arguments.device, quick=arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
