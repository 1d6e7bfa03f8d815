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
FILES = [p for d in ("kernels", "models", "sparsecore") for p in sorted((ROOT / d).rglob("*.py"))]


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import; level counts a relative import's dots."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
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
                # Kernels are leaves: an operation's file uses the shared ones, never another's.
                if folder == "kernels" and path.name != "__init__.py":
                    assert top in ("reference", "philox", "gate_math", "units"), module
        else:
            # Only the public names of kernels: `from . import kernels` or `.kernels`, nothing inside.
            assert not module.startswith("kernels."), module


def test_files_stay_of_a_readable_length() -> None:
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long
