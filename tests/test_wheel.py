"""The wheel, installed where nothing is but what it declares: its commands run and its data files are there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ABSENT = (
    "sphinx",
    "jupyter_book",
    "IPython",
    "ipykernel",
    "pytest",
    "sklearn",
    "pytorch_optimizer",
)
PROFILE = """
import importlib.util, torch
from grsd import claims, results

from grsd.lab.nets.models import two_layer
from grsd.spectrum import NTK, LogShells, Outputs, lanczos

absent = {absent!r}
assert not [name for name in absent if importlib.util.find_spec(name)], "this environment is not empty"
x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
M = NTK(two_layer(1, 8, 1.0, seed=0), x, Outputs(torch.sin(3 * x)[:, 0]))
profile = lanczos(M, M.error, steps=12).measure().shells(LogShells.spanning(1e-9, 1e3, ratio=10.0))
exact = float((M.error ** 2).mean() / 2)
assert abs(profile.total - exact) < 1e-12 * exact, (profile.total, exact)
assert len(claims.load()) > 100 and len(results.available()) > 30
print("total", profile.total)
"""


def build(folder: Path) -> Path:
    """The wheel of a copy of this tree: setuptools leaves its own files beside what it builds from."""
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "grsd", source / "grsd", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    made = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", made], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def closure(names: list[str]) -> dict[str, metadata.Distribution]:
    """Distributions that are installed here and that the named ones need, with all that these need."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform, or this build of torch brings it itself
        wanted = [Requirement(line) for line in found[name].requires or ()]
        waiting += [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel and links to what its metadata declares, and to nothing else."""
    place = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    interpreter = place / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = place / "lib" / version / "site-packages"
    declared = metadata.PathDistribution(next(site.glob("grsd-*.dist-info"))).requires or ()
    wanted = [Requirement(line) for line in declared]
    needed = closure(
        [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    )
    for one in needed.values():
        for top in {path.parts[0] for path in one.files or () if path.parts[0] != ".."}:
            target = Path(str(one.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return interpreter


def run(python: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(python), "-I", *arguments], capture_output=True, text=True, cwd=python.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_data_file_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "grsd/data").rglob("*") if p.is_file()}
    assert len(data) > 40 and data <= names, sorted(data - names)
    assert "grsd/py.typed" in names


def test_its_command_finds_all_it_needs(python: Path) -> None:
    said = run(python, str(python.parent / "grsd"), "doctor")
    assert re.search(r"^required +all present$", said, re.M), said


def test_it_measures_a_net_where_no_notebook_library_is(python: Path) -> None:
    assert "total" in run(python, "-c", PROFILE.format(absent=ABSENT))


def test_an_undeclared_import_would_be_seen(python: Path) -> None:
    with pytest.raises(AssertionError, match="No module named 'pytest'"):
        run(python, "-c", "import pytest")
    assert sysconfig.get_path("purelib") != run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    )
