"""How a kernel is compiled ahead of time, so that its registers and instructions can be counted without a GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class StaticCase(NamedTuple):
    """A kernel at the types and tile sizes that a launcher would choose."""

    name: str
    config: str
    function: Any  # a triton.jit function
    signature: dict[str, str]  # each argument's type, or "constexpr"
    constexprs: dict[str, Any]
    attributes: dict[tuple[int, ...], list]  # pointers are 16-byte aligned
    options: dict[str, Any]  # num_warps, num_stages
    gates: int | None = None  # that a thread handles in one turn of its loop


def static_case(
    function: Any,
    config: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    gates: int | None = None,
) -> StaticCase:
    """`types`: of arguments other than constants, in any order; pointers are taken to be aligned."""
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    name = function.__name__.strip("_").removesuffix("_kernel")
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return StaticCase(
        name, config, function, signature, dict(constants), attributes, options, gates
    )
