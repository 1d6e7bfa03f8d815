"""Who may import whom: kernels and models are leaves on torch, sparsecore stands on them, nobody on tests or bench."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "kernels": {"torch", "triton", "numpy", "jaxtyping"},
    "models": {"torch"},
}
# What kernels share: no operation of their own.
SHARED = {
    "device",
    "reference",
    "philox",
    "gate_math",
    "units",
    "segments",
    "segment_math",
    "static",
    "conv_tiles",
    "formats",
    "moves",
}
COMPOSITIONS = {
    "__init__",
    "gates",
    "gate_operator",
    "gate_bank",
    "gated_layers",
    "sparse_layers",
    "epilogue",
}
FILES = [p for d in ("kernels", "models", "sparsecore") for p in sorted((ROOT / d).rglob("*.py"))]


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import; level counts a relative import's dots."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for level, module in imports(path):
        top = module.split(".")[0]
        assert top not in ("bench", "tests")
        if level == 0:  # never as top-level names
            assert top not in ALLOWED, module
        if folder in ALLOWED:
            if level == 0:
                assert top in ALLOWED[folder] | set(sys.stdlib_module_names), (level, module)
            else:
                assert level == 1, f"{folder} imports from above itself"
                # An operation (one file, or several of one first name) uses what is shared below it,
                # never another operation; only what composes operations may name them.
                if folder == "kernels" and path.stem not in COMPOSITIONS:
                    family = path.stem.split("_")[0]
                    assert top in SHARED or top.split("_")[0] == family, module
        else:
            # Only the public names of kernels: `from . import kernels` or `.kernels`, nothing inside.
            assert not module.startswith("kernels."), module


def test_files_stay_of_a_readable_length() -> None:
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long
