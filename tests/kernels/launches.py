"""What reaches Triton's driver, as JSON: run by `test_launching` without the interpreter, and without a GPU."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._library.triton import get_triton_kernels_for_op
from triton import knobs

from bench import host
from sparsecore.kernels.launching import Launch

launched: list[tuple[str, tuple]] = []


@triton.jit
def _add_kernel(out_ptr, a_ptr, b_ptr, c_ptr, n, one, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(a_ptr + at, mask=at < n)
    if b_ptr is not None:
        total += tl.load(b_ptr + at, mask=at < n)
    if c_ptr is not None:
        total *= tl.load(c_ptr + at, mask=at < n)
    tl.store(out_ptr + at, total * one, mask=at < n)


class Noting(host._Launcher):
    """Arguments as a driver takes them: addresses for tensors, and the binary that would run."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *args: Any) -> None:
        plain = (a.data_ptr() if isinstance(a, Tensor) else a for a in args[9:])
        launched.append((self.name, (*args[:3], id(args[5]), *plain)))


def notes(run: Callable[[], Any]) -> list[tuple[str, tuple]]:
    launched.clear()
    run()
    return list(launched)


def as_triton_launches() -> dict[str, Any]:
    """Of kinds of arguments: whether later launches are Triton's, and whether they go around it."""
    space = torch.zeros(4096, dtype=torch.uint8)
    memory = space[-space.data_ptr() % 16 :]

    def at(offset: int, dtype: torch.dtype) -> Tensor:
        return memory[offset : offset + 400].view(dtype)

    single, half = torch.float32, torch.float16
    kinds = {
        "aligned": (at(0, single), at(512, single), at(1024, single), None),
        "half": (at(0, half), at(512, half), at(1024, half), None),
        "mixed": (at(0, half), at(512, single), at(1024, half), None),
        "another none": (at(0, single), at(512, single), None, at(1024, single)),
        "two": (at(0, single), at(512, single), None, None),
        "misaligned": (at(0, single), at(516, single), at(1024, single), None),
        "aligned again": (at(1024, single), at(0, single), at(512, single), None),
    }
    launch = Launch(_add_kernel, (1,), (96, 1), {"BLOCK": 128}, {"num_warps": 2})
    found, direct, through = {}, [], Launch.launch

    def noted(self: Launch, tensors: Any) -> Any:
        direct.append(False)
        return through(self, tensors)

    def compare(tensors: tuple) -> tuple[bool, bool]:
        wanted = notes(partial(_add_kernel[(1, 1, 1)], *tensors, 96, 1, BLOCK=128, num_warps=2))
        direct.clear()
        return notes(partial(launch, *tensors)) == wanted, not direct

    Launch.launch = noted
    for _ in range(2):
        found |= {name: compare(tensors) for name, tensors in kinds.items()}
    knobs.runtime.launch_enter_hook.add(lambda metadata: None)
    return found | {"hooked": compare(kinds["aligned"])}


def launches_of_a_step(format: str, steps: int) -> list[str]:
    """Names of what the last of several steps of a layer launches."""
    layer = host.layer_of(format, False)
    x = torch.zeros(8, 128, requires_grad=True)
    for _ in range(steps):
        found = notes(partial(host.training_step, layer, [x, *layer.parameters()]))
    return sorted(name for name, _ in found)


def graphs_of_a_step(format: str, conv: bool, batches: list[int]) -> list[list[str]]:
    """What torch.compile makes of a layer: kernels and operators that are not torch's own, a graph each."""
    found: list[list[str]] = []

    def noting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        names = []
        for node in graph.graph.nodes:
            if "kernel_idx" in node.kwargs:
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                names.append(kernel.fn.fn.__name__)
            elif isinstance(node.target, torch._ops.OpOverload) and "aten" not in str(node.target):
                names.append(str(node.target))
        found.append(names)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    layer = host.layer_of(format, conv)
    backend = aot_autograd(fw_compiler=noting, bw_compiler=noting)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=len(batches) > 1)
    for batch in batches:
        x = torch.zeros((batch, 128, 4, 4) if conv else (batch, 128), requires_grad=True)
        host.training_step(compiled, [x, *layer.parameters()])
    return found


if __name__ == "__main__":
    host._Driver.launcher_cls = Noting
    host.launch_nothing()
    plans = {name: launches_of_a_step(name, 2) for name in host.PLANS}
    graphs = {
        f"{format} {'conv' if conv else 'linear'}": graphs_of_a_step(format, conv, [8])
        for format in ("block:64x64", "block:64x64/2")
        for conv in (False, True)
    }
    graphs["open"] = graphs_of_a_step("block:64x64", False, [8, 24, 40])
    known = {
        kernel.fn.__name__
        for name in ("block_layer", "block_layer_dx", "block_layer_dw")
        for kernel in get_triton_kernels_for_op(f"sparsecore::{name}")
    }
    print(
        json.dumps(
            {
                "kinds": as_triton_launches(),
                "plans": plans,
                "graphs": graphs,
                "known": sorted(known),
            }
        )
    )
