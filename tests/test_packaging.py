"""The wheel holds what it should, installs cleanly and never takes the names kernels and models."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("kernels", "models")
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")


def test_links_and_package_map_agree() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {name.removeprefix("sparsecore."): d for name, d in config["package-dir"].items()}
    assert mapped == {name: name for name in LINKS}
    for name in LINKS:
        link = ROOT / "sparsecore" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name
    on_disk = {"sparsecore"}
    for top, folder in (("sparsecore", "sparsecore"), *((f"sparsecore.{n}", n) for n in LINKS)):
        inner = (p.parent.relative_to(ROOT / folder).parts for p in (ROOT / folder).rglob("*.py"))
        on_disk |= {
            ".".join((top, *parts)) for parts in inner if parts[:1] not in [(n,) for n in LINKS]
        }
    assert set(config["packages"]) == on_disk


def test_triton_is_asked_for_where_it_has_wheels_alone() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (triton,) = (Requirement(line) for line in needs if line.startswith("triton"))
    assert triton.marker is not None
    places = [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64")]
    found = [
        triton.marker.evaluate({"platform_system": system, "platform_machine": machine})
        for system, machine in places
    ]
    assert found == [True, True, False, False]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_every_python_has_one_pin_of_each_package(python: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    names = [
        pin.name
        for pin in pins
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert sorted(names) == sorted({pin.name for pin in pins})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation nothing is fetched: the test extra brings build and setuptools.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"sparsecore"}
    for name in (
        "kernels/philox.py",
        "models/lenet.py",
        "search/concrete.py",
        "cli.py",
        "py.typed",
    ):
        assert f"sparsecore/{name}" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_installs_and_imports_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    # The new environment gets the wheel alone; torch and the rest are seen on a path behind it.
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--quiet",
            wheel,
        ],
        check=True,
    )
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = next(p for p in sys.path if p.endswith("site-packages"))
    check = (
        "import sys\n"
        f"sys.path.append({here!r})\n"
        "import sparsecore\n"
        f"assert sparsecore.__file__.startswith({site!r}), sparsecore.__file__\n"
        "from sparsecore import kernels, models\n"
        f"assert kernels.__file__.startswith({site!r}) and models.__file__.startswith({site!r})\n"
        "import importlib.util as u\n"
        "assert u.find_spec('models') is None\n"
        "import torch\n"
        "layer = sparsecore.SparseLinear(4, 3)\n"
        "layer.set_mask_(torch.ones(3, 4) > 0)\n"
        "assert layer(torch.ones(2, 4)).shape == (2, 3)\n"
    )
    subprocess.run([python, "-c", check], check=True, cwd=tmp_path)
    shown = subprocess.run(
        [
            python,
            "-c",
            f"import sys; sys.path.append({here!r}); from sparsecore.cli import main; main(['--help'])",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert "compare" in shown and (place / "bin" / "sparsecore").exists()
