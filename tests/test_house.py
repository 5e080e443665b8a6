"""The house itself: pins that agree, sources that name no machine, layers that hold.

Every check is a function that takes text or a folder, and is shown a planted fault beside the real files.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import grsd

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]*)==(?P<version>[0-9][0-9a-z.]*)")
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(?P<range>[<>=!~].*)?")
EXTRAS = ("hub", "published", "optimizers", "book", "test")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition(".post")[0]))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, object]:
    return dict(tomllib.loads(read("pyproject.toml"))["project"])


# --- Pins ------------------------------------------------------------------------------------------------


def locked(text: str) -> dict[str, str]:
    """Pins of a lock; anything but a comment or an exact pin is a fault."""
    pins: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = PIN.fullmatch(line)
        if match is None:
            raise ValueError(f"not an exact pin: {line!r}")
        if match["name"] in pins:
            raise ValueError(f"pinned twice: {match['name']}")
        if re.fullmatch(r"torch.*|triton|nvidia-.*|cuda-.*", match["name"]):
            raise ValueError(f"torch and what it brings stay out of the lock: {line!r}")
        pins[match["name"]] = match["version"]
    return pins


def disagreements(requirements: list[str], pins: dict[str, str]) -> list[str]:
    """Requirements that the lock does not meet. torch is not in the lock and is left out."""
    faults = []
    for requirement in requirements:
        match = REQUIREMENT.fullmatch(requirement.split(";")[0].strip())
        assert match is not None, requirement
        name = canonical(match["name"])
        if name == "torch":
            continue
        if name not in pins:
            faults.append(f"{name} is not pinned")
            continue
        if not within(pins[name], match["range"] or ""):
            faults.append(f"{name}=={pins[name]} is outside {match['range']}")
    return faults


def within(version: str, bounds: str) -> bool:
    """Whether a version meets ">=a,<b"; other operators are not used in this project."""
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        match = re.fullmatch(r"(>=|<)(.+)", bound)
        assert match is not None, f"write {bound!r} as a range of >= and <"
        operator, limit = match.groups()
        width = max(len(release(version)), len(release(limit)))
        found, edge = (release(v) + (0,) * (width - len(release(v))) for v in (version, limit))
        if not (found >= edge if operator == ">=" else found < edge):
            return False
    return True


def makefile_torch(text: str) -> str:
    (pin,) = re.findall(r"^TORCH \?= (torch==[0-9.]+)$", text, flags=re.MULTILINE)
    return str(pin)


def conda_steps(text: str) -> list[str]:
    """The pip steps of environment.yml; a conda package other than python and pip is a fault."""
    *conda, last = yaml.safe_load(text)["dependencies"]
    names = [re.split(r"[=<>]", str(item))[0] for item in conda]
    if names != ["python", "pip"] or set(last) != {"pip"}:
        raise ValueError(f"expected python, pip and pip's steps, found {names} and {last}")
    return [str(step) for step in last["pip"]]


def test_the_lock_meets_every_requirement_of_every_extra() -> None:
    described = project()
    requirements = list(described["dependencies"])  # type: ignore[call-overload]
    extras = described["optional-dependencies"]
    assert set(extras) == set(EXTRAS)  # type: ignore[call-overload]
    for extra in EXTRAS:
        requirements += extras[extra]  # type: ignore[index]
    assert disagreements(requirements, locked(read("requirements.txt"))) == []


@pytest.mark.parametrize(
    ("requirement", "fault"),
    [
        ("numpy>=99", "outside >=99"),
        ("sphinx<7", "outside <7"),
        ("numpy>=1,<2", "outside"),
        ("no-such-package", "not pinned"),
    ],
)
def test_a_planted_disagreement_is_found(requirement: str, fault: str) -> None:
    (found,) = disagreements([requirement], locked(read("requirements.txt")))
    assert fault in found


@pytest.mark.parametrize(
    "line",
    [
        "numpy>=2",
        "numpy",
        "--index" + "-url somewhere",
        "--extra-index" + "-url x",
        "-r other.txt",
        "-e .",
        "numpy @ https://example.invalid/numpy.whl",
        "numpy==2.0 --hash=sha256:00",
        "torch==2.13.0",
        "torch==2.13.0+cpu",
        "nvidia-cublas==13.0",
        "triton==3.0",
        "click==1.0\nclick==1.0",
    ],
)
def test_a_planted_line_in_the_lock_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line.splitlines()[-1].split("==")[0])):
        locked(f"attrs==26.1.0\n{line}\n")


def test_torch_is_a_range_in_pyproject_and_one_pin_in_makefile_and_environment() -> None:
    (torch,) = (line for line in project()["dependencies"] if line.startswith("torch"))  # type: ignore[attr-defined]
    bounds = torch.removeprefix("torch")
    assert bounds.startswith(">=") and "==" not in bounds
    pin = makefile_torch(read("Makefile"))
    assert within(pin.removeprefix("torch=="), bounds)
    assert conda_steps(read("environment.yml")) == [pin, "-r requirements.txt", "-e ."]


def test_a_planted_conda_package_is_refused() -> None:
    text = read("environment.yml")
    with pytest.raises(ValueError, match="numpy"):
        conda_steps(text.replace("  - pip\n", "  - pip\n  - numpy\n", 1))
    assert conda_steps(text.replace("2.13.0", "2.14.0"))[0] != makefile_torch(read("Makefile"))


def test_python_is_the_same_floor_everywhere() -> None:
    floor = str(project()["requires-python"]).removeprefix(">=")
    assert f"python={floor}" in read("environment.yml")
    assert f"sys.version_info < ({floor.replace('.', ', ')})" in read("Makefile")
    assert f"sys.version_info < ({floor.replace('.', ', ')})" in read("grsd/__init__.py")


def test_the_environment_check_asks_for_what_pyproject_asks_for() -> None:
    wanted = {}
    for line in project()["dependencies"]:  # type: ignore[attr-defined]
        match = REQUIREMENT.fullmatch(line)
        assert match is not None and match["range"]
        wanted[canonical(match["name"])] = match["range"].split(",")[0].removeprefix(">=")
    assert {canonical(name): floor for name, floor in grsd.REQUIRED.items()} == wanted
    assert project()["version"] == grsd.__version__
    assert f"version: {grsd.__version__}\n" in read("CITATION.cff")


def test_the_environment_check_reports_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grsd.check_environment() == []
    assert "every required package is present" in capsys.readouterr().out
    monkeypatch.setitem(grsd.REQUIRED, "numpy", "99.1")
    monkeypatch.setitem(grsd.REQUIRED, "no-such-package", "1.0")
    assert grsd.check_environment() == ["numpy>=99.1", "no-such-package>=1.0"]
    out = capsys.readouterr().out
    assert "older than needed" in out and "no-such-package is missing" in out
    assert grsd.check_environment(verbose=False) and capsys.readouterr().out == ""


# --- What the sources may not hold -------------------------------------------------------------------------

# Spelt in parts, so that this file does not match itself.
MACHINE = re.compile(
    "(?<![\\w.}/~])/(?:"
    + "|".join(("home", "Users", "root", "tmp", "work", "opt", "mnt"))
    + ")/[\\w.-]+"
)
INDEX = re.compile(
    "|".join(
        (
            "py" + "pi" + r"\.org",
            "files" + r"\.python" + "hosted" + r"\.org",
            "download\\.py" + r"torch\.org",
            "/sim" + "ple/",
            "anaconda" + r"\.org",
        )
    )
)
INDEX_OPTION = re.compile("--(?:extra-)?index" + "-url|--find" + "-links|--trusted" + "-host")
LARGEST = 2_000_000  # bytes
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib"}


def faults_of(name: str, content: bytes) -> list[str]:
    """What a tracked file holds that it may not."""
    found = []
    if len(content) > LARGEST:
        found.append(f"{name} has {len(content)} bytes")
    if Path(name).suffix in PICKLES:
        found.append(f"{name} may hold a pickle")
    if Path(name).suffix == ".ipynb":
        found.append(f"{name} is a notebook; chapters are Markdown")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return found
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in (
            ("machine path", MACHINE),
            ("package index", INDEX),
            ("index option", INDEX_OPTION),
        ):
            if match := pattern.search(line):
                found.append(f"{name}:{number}: {what} {match.group()!r}")
    return found


def tracked() -> list[str]:
    listing = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_an_index_or_is_too_large() -> None:
    names = [name for name in tracked() if name != "tests/test_house.py"]
    assert len(names) > 20
    assert [fault for name in names for fault in faults_of(name, (ROOT / name).read_bytes())] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.py", b"DATA = '/" + b"home/someone/data'"),
        ("a.md", b"see (/" + b"work/main/x)"),
        ("a.txt", b"--extra-index" + b"-url x"),
        ("a.yml", b"url: https://py" + b"pi" + b".org/x"),
        ("Makefile", b"pip install --find" + b"-links wheels"),
        ("w.pt", b""),
        ("a.ipynb", b"{}"),
        ("big.json", b"1" * (LARGEST + 1)),
    ],
)
def test_a_planted_fault_in_a_file_is_found(name: str, content: bytes) -> None:
    assert faults_of(name, content) != []


@pytest.mark.parametrize(
    "text",
    [
        "$(CURDIR)/.venv/bin/python",
        "#!/usr/bin/env bash",
        "~/.cache/grsd",
        "2> /dev/null",
        "https://arxiv.org/abs/2512.10427",
        "path/to/model",
    ],
)
def test_ordinary_text_passes(text: str) -> None:
    assert faults_of("a.txt", text.encode()) == []


# --- Layers ------------------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the layer contract on the package in `folder`."""
    script = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", script, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "grsd", folder / "grsd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


ORDER = (
    "cli chapter experiments lab renorm mup dynamics spectrum "
    "claims figures statistics pieces results checks dependencies scale"
)


def test_the_contract_names_every_module_and_keeps_the_order(copy: Path) -> None:
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c.get("containers") == ["grsd"])
    assert [word for layer in layers for word in re.findall(r"\w+", layer)] == ORDER.split()
    package = (ROOT / "grsd").iterdir()
    present = {p.stem for p in package if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert present - {"__init__", "__main__"} == set(ORDER.split())
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("grsd/scale.py", "from grsd import results"),
        ("grsd/results.py", "from grsd import claims"),
        ("grsd/figures.py", "import grsd.spectrum"),
        ("grsd/spectrum/__init__.py", "import grsd.lab"),
        ("grsd/spectrum/__init__.py", "import transformers"),
        ("grsd/claims.py", "import nbformat"),
        ("grsd/lab/__init__.py", "import grsd.experiments"),
        ("grsd/statistics.py", "import grsd.spectrum"),
        ("grsd/spectrum/programs/program.py", "import grsd.spectrum.operator.base"),
        ("grsd/spectrum/operator/base.py", "import grsd.spectrum.measure"),
        ("grsd/spectrum/shells.py", "import grsd.spectrum.lanczos"),
        ("grsd/renorm/diagnostics/blocks.py", "import grsd.renorm.theorems.depth"),
        ("grsd/lab/nets/models.py", "import grsd.lab.data.corpora"),
    ],
)
def test_a_planted_import_breaks_the_contract(copy: Path, module: str, line: str) -> None:
    path = copy / module
    before = path.read_text(encoding="utf-8")
    path.write_text(before + f"\n{line}\n", encoding="utf-8")
    try:
        done = lint_imports(copy)
    finally:
        path.write_text(before, encoding="utf-8")
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def circle(folder: Path) -> list[str]:
    """Modules of the package in `folder` that import each other in a circle; imports in functions count."""
    script = (
        "import sys; sys.path.insert(0, '.')\nimport grimp, graphlib\n"
        "graph = grimp.build_graph('grsd', cache_dir=None, exclude_type_checking_imports=True)\n"
        "imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}\n"
        "try: graphlib.TopologicalSorter(imports).prepare()\n"
        "except graphlib.CycleError as error: print(*error.args[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_no_modules_import_each_other_in_a_circle(copy: Path) -> None:
    assert circle(copy) == []
    path = copy / "grsd/spectrum/shells.py"
    before = path.read_text(encoding="utf-8")
    path.write_text(before + "\ndef late():\n    import grsd.spectrum.measure\n", encoding="utf-8")
    try:
        assert {"grsd.spectrum.shells", "grsd.spectrum.measure"} <= set(circle(copy))
    finally:
        path.write_text(before, encoding="utf-8")


NOTEBOOK = (
    "IPython",
    "ipykernel",
    "jupyter",
    "jupyter_book",
    "jupytext",
    "myst_nb",
    "myst_parser",
    "nbformat",
    "sphinx",
)
BLOCKED = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOTEBOOK!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
"""


def without_notebooks(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_package_imports_where_no_notebook_library_is_installed() -> None:
    done = without_notebooks(
        "import grsd, grsd.scale, grsd.results, grsd.claims, grsd.figures, grsd.spectrum, grsd.lab\n"
        "assert grsd.claims.load()\n"
        f"assert not set({NOTEBOOK!r}) & {{name.partition('.')[0] for name in sys.modules}}\n"
    )
    assert done.returncode == 0, done.stderr
    planted = without_notebooks("import nbformat")
    assert planted.returncode != 0 and "refused: nbformat" in planted.stderr


def test_importing_the_top_module_is_light() -> None:
    code = "import sys, grsd; print(sorted({'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- Style that no linter knows ------------------------------------------------------------------------------

SCREEN = 32  # lines of a body


def bare(source: str) -> list[str]:
    """Functions longer than a screen with fewer than two comments on lines of their own."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            start = first.end_lineno if ast.get_docstring(node) is not None else node.lineno
            body = lines[start : node.end_lineno]
            if len(body) >= SCREEN and sum(line.strip().startswith("#") for line in body) < 2:
                found.append(node.name)
    return found


def test_a_long_function_has_a_comment_at_its_steps() -> None:
    paths = sorted((ROOT / "grsd").rglob("*.py"))
    assert len(paths) > 80
    assert {str(path): bare(path.read_text(encoding="utf-8")) for path in paths} == {
        str(path): [] for path in paths
    }
    body = "    x = 1\n" * SCREEN
    assert bare(f"def f():\n{body}") == ["f"]
    assert bare(f"def f():\n    # one\n{body}    # two\n    x = 1\n") == []


def test_no_file_of_the_package_is_longer_than_four_hundred_lines() -> None:
    lengths = {p: len(p.read_text("utf-8").splitlines()) for p in (ROOT / "grsd").rglob("*.py")}
    assert {path.name: n for path, n in lengths.items() if n > 400} == {}


def test_the_hooks_before_a_commit_are_the_linters_of_make_lint() -> None:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), flags=re.MULTILINE)
    linters = {line.strip().removesuffix(" .") for line in recipe.splitlines()}
    (hooks,) = (repo["hooks"] for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"])
    entries = {hook["entry"].removeprefix(".venv/bin/") for hook in hooks}
    assert linters <= entries


# --- The two commands --------------------------------------------------------------------------------------


def dry_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_book_makes_what_it_needs_in_order(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "grsd").mkdir()
    shutil.copy(ROOT / "grsd" / "scale.py", tmp_path / "grsd")
    done = dry_run(tmp_path, "-n", "book")
    assert done.returncode == 0, done.stderr
    steps = [
        "-m venv",
        'pip install --quiet "torch==',
        "-r requirements.txt",
        "--no-deps --editable .",
        "jupyter-book build",
    ]
    places = [done.stdout.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), done.stdout
    assert "-W -n --keep-going" in done.stdout and "--path-output _build/cpu " in done.stdout
    assert "--path-output _build/gpu " in dry_run(tmp_path, "-n", "book", "SCALE=gpu").stdout


@pytest.mark.parametrize(
    ("script", "message"),
    [("exit 1", "is too old; grsd needs Python 3.11"), (None, "no old-python on the PATH")],
)
def test_make_refuses_an_unfit_python_in_plain_words(
    script: str | None, message: str, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    python = "old-python"
    if script is not None:
        old = tmp_path / "old-python"
        old.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\n{script}\n'
        )
        old.chmod(0o755)
        python = str(old)
    done = dry_run(tmp_path, "env", f"PYTHON={python}")
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_runs_the_two_commands() -> None:
    text = read(".ci/run")
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert re.search(r"^make test\b.*\n(?:.*\n)*?make book\b", text, flags=re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
