"""How a kernel is compiled ahead of time, so that its registers and instructions can be counted without a GPU."""

from collections.abc import Mapping, Set
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


def product_case(
    function: Any,
    family: str,
    config: str,
    options: tuple[dict[str, Any], dict[str, int]],
    types: Mapping[str, str],
    even: Set[str],
) -> StaticCase:
    """A product's kernel with the (constants, compiler options) of its launcher.

    Pointers are bf16 and numbers int32 where `types` says nothing; `even` numbers are multiples of 16, as a
    launch would see them.
    """
    constants, compiler = options
    signature, attributes = {}, {}
    for i, arg in enumerate(function.arg_names):
        pointer = arg.endswith("_ptr")
        signature[arg] = types.get(arg, "*bf16" if pointer else "i32")
        if arg in constants:
            signature[arg] = "constexpr"
        elif pointer or arg in even:
            attributes[(i,)] = [["tt.divisibility", 16]]
    name = f"{family}_" + function.__name__.strip("_").removesuffix("_kernel")
    return StaticCase(name, config, function, signature, constants, attributes, compiler)
