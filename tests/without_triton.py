"""What has to work on macOS and Windows, without Triton; `test_platforms` runs it in a process of its own."""

import contextlib
import io
import json
import os
import sys
import warnings
from importlib.abc import MetaPathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# What Windows and macOS do not have, or one of them.
ABSENT = {"triton", "fcntl", "grp", "pwd", "resource", "termios"}


class Absent(MetaPathFinder):
    """Finds nothing of it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
for name in ABSENT:
    sys.modules.pop(name, None)
os.environ.setdefault("USERNAME", "user")  # as Windows has it
tests = Path(__file__).resolve().parent
sys.path[:0] = [str(tests), str(tests / "search"), str(tests.parent)]

import torch  # noqa: E402
from helpers import Blobs, convolutional, mlp, rand, randn  # noqa: E402
from test_contract import SEARCHES  # noqa: E402
from torch import nn  # noqa: E402

import sparsecore as sc  # noqa: E402
from sparsecore import cli  # noqa: E402
from sparsecore.kernels.gates.flat import sample_flat_kernel  # noqa: E402
from sparsecore.scores import magnitude, snip  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore", sc.SparsityWarning)


def refusal(call) -> str:
    try:
        call()
    except (ValueError, ModuleNotFoundError) as error:
        return str(error)
    raise AssertionError("expected to be refused")


def test_formats() -> None:
    for make, x in ((mlp, randn(8, 12)), (convolutional, randn(8, 12))):
        dense = make()
        reference = None
        for plan in ("mask", "state", "csr", "compact", "auto"):
            model = sc.sparsify_(make())
            for name, layer in sc.sparse_layers(model).items():
                layer.set_mask_(rand(*dense.get_parameter(f"{name}.weight").shape) < 0.5)
            sc.plan_(model, plan, x)
            y = model(x)
            y.sum().backward()
            reference = y.detach() if reference is None else reference
            torch.testing.assert_close(y, reference)
            told = refusal(lambda model=model: sc.plan_(model, "block:16x16"))
            assert "needs Triton" in told and "\n" not in told, told


def test_kernels_say_what_is_missing() -> None:
    kernel: Any = sample_flat_kernel
    assert "needs Triton" in refusal(lambda: kernel[(1,)]())


def test_operators_have_something_to_run_on_any_device() -> None:
    names = [op for op in torch._C._dispatch_get_all_op_names() if op.startswith("sparsecore::")]
    assert len(names) > 10
    for name in names:
        for place in ("CPU", "CUDA", "MPS"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, place), name


def test_gated_layers() -> None:
    for impl in ("auto", "materialise"):
        layer = sc.SparseLinear(16, 16)
        layer.pattern = sc.Gated(
            layer.raw_weight.shape, sc.gates.Concrete(), impl=impl, density=0.3
        )
        layer(randn(4, 16)).sum().backward()


def test_searches_and_tickets(folder: Path) -> None:
    searches = {
        **SEARCHES,
        "magnitude": sc.OneShot(magnitude),
        "snip": sc.OneShot(snip),
        "rewinding": sc.Rewinding(sc.Recipe(lr=0.05), 1, rate=0.5),
        "blocks": sc.ConcreteSearch(epochs=4, granularity=sc.granularity.Block(2, 2)),
        "channels": sc.JointSearch(epochs=4, granularity=sc.granularity.Channel()),
    }
    for name, search in searches.items():
        model = sc.sparsify_(mlp())
        ticket = search(model, Blobs(), sparsity=0.5)
        ticket.save(folder / f"{name}.safetensors")
        sc.Ticket.load(folder / f"{name}.safetensors").apply_(model)
        assert abs(ticket.sparsity - 0.5) < 0.05, (name, ticket.sparsity)


def test_compaction() -> None:
    model: Any = sc.sparsify_(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)))
    model[0].set_mask_((torch.arange(16) < 8)[:, None].expand(16, 12))
    nn.init.constant_(model[0].bias, -0.1)  # so that ReLU gives 0 of what is dead
    x = randn(4, 12)
    small = sc.compact(model, x)
    assert small.removed
    torch.testing.assert_close(small.model(x), model(x))


def test_command_line(folder: Path) -> None:
    file, out = str(folder / "T.safetensors"), str(folder / "out.json")
    setup = "--model lenet-300-100 --data digits --train-samples 200 --rewind-epochs 0 --epochs 1"
    commands = [
        f"search {setup} --method snip --sparsity 0.9 --out {file}",
        f"train {file} --epochs 1 --plan state --json {out}",
        f"plan {file} --batch 8",
        f"info {file}",
        f"compare {setup} --methods snip,magnitude --sparsities 0.9 --seeds 1 --out {folder / 'runs'}",
    ]
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([*command.split(), "--device", "cpu"]) == 0, command
    assert json.loads(Path(out).read_text())


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        os.environ["SPARSECORE_PLANS"] = f"{name}/plans.json"
        test_formats()
        test_kernels_say_what_is_missing()
        test_operators_have_something_to_run_on_any_device()
        test_gated_layers()
        test_searches_and_tickets(Path(name))
        test_compaction()
        test_command_line(Path(name))
    assert not ABSENT & sys.modules.keys()
