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
# What each family of kernels may import besides itself and what lies openly in kernels/.
FAMILIES: dict[str, set[str]] = {
    "gates": set(),
    "blocks": {"gates"},
    "gated": {"gates", "blocks"},
    "sparse": {"blocks"},
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
                assert level <= len(path.relative_to(ROOT).parts) - 1, "imports from above itself"
        else:
            # Only the public names of kernels: `from . import kernels` or `.kernels`, nothing inside.
            assert not module.startswith("kernels."), module


def test_one_file_knows_whether_there_is_triton() -> None:
    direct = [p for p in FILES if any(m.split(".")[0] == "triton" for _, m in imports(p))]
    assert [str(p.relative_to(ROOT)) for p in direct] == ["kernels/dsl.py"]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_families_of_kernels_stand_on_what_they_share(path: Path) -> None:
    """Files openly in kernels/ know no family; a family knows those below it."""
    *family, _ = path.relative_to(ROOT / "kernels").parts
    if family == [] and path.stem == "__init__":  # the public names of all
        return
    allowed = FAMILIES[family[0]] | {family[0]} if family else set()
    for level, module in imports(path):
        if level == len(family) + 1:
            assert module.split(".")[0] not in FAMILIES.keys() - allowed, module


def test_every_family_of_kernels_is_ranked() -> None:
    assert {p.name for p in (ROOT / "kernels").iterdir() if (p / "__init__.py").exists()} == set(
        FAMILIES
    )


def test_files_stay_of_a_readable_length() -> None:
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long
