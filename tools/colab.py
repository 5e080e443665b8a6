"""Colab on this machine: its packages, the notebooks as they are published, and a run of each.

    python tools/colab.py list FILE 2026-08-19   a full list of Colab's -> tools/colab-packages.txt
    python tools/colab.py environment FOLDER     a virtual environment that has what Colab has
    python tools/colab.py notebooks FOLDER       the reader notebooks, without running the book
    python tools/colab.py run FOLDER WHEEL       each of them from its first cell, as Colab would

`make colab` runs the last three. `list` and `run` need the environment that the second one makes
(or Colab itself); `notebooks` needs that of the book. A notebook passes when no cell fails and
nothing is written to stderr, where warnings go.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "tools/colab-packages.txt"
LACKING = ("grsd", "pytorch-optimizer")  # removed before each notebook, whose first cell installs
ADDRESS = re.compile(
    r'"git\+https://[^"]+"'
)  # what the first cell of a published notebook installs
CELL = 1800  # seconds
HUB = ("book/pythia.ipynb",)  # needs the hub and a GPU; tests run its cells on a small hub
HEAD = """\
# What Colab (GPU runtime, Python 3.13) had on {date}, by its own published list: of some 700
# packages those that the chapters need, with what these need. Made by tools/colab.py; do not edit.
"""


def canonical(name: str) -> str:
    """Package name as the registries compare it: lower case, "-", "_" and "." as one "-"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(text: str) -> dict[str, str]:
    """Canonical name -> version of a list of lines name==version; other lines are left out."""
    lines = (line.strip().partition("==") for line in text.splitlines() if line[:1] != "#")
    return {canonical(name): version for name, _, version in lines if version}


def write_list(full: Path, date: str) -> None:
    """Keep of Colab's full list what is installed beside this interpreter."""
    theirs = versions(full.read_text(encoding="utf-8"))
    here = {canonical(found.metadata["Name"]) for found in metadata.distributions()}
    left_out = re.compile(r"pip|setuptools|triton|nvidia-.*|cuda-.*")  # which: the machine says
    kept = sorted(name for name in theirs.keys() & here if not left_out.fullmatch(name))
    lines = "".join(f"{name}=={theirs[name]}\n" for name in kept)
    PACKAGES.write_text(HEAD.format(date=date) + lines, encoding="utf-8")
    print(f"{PACKAGES.name}: {len(kept)} packages")


def make_environment(folder: Path) -> None:
    """A virtual environment with the versions of the list, and torch as near as pip has it."""
    listed = versions(PACKAGES.read_text(encoding="utf-8"))
    torch = listed.pop("torch").partition("+")[0]  # +cu128: a build for Colab's driver
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    with tempfile.TemporaryDirectory() as place:
        pins = Path(place) / "pins.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in listed.items()))
        exact = subprocess.run([*pip, f"torch=={torch}", "-r", str(pins)])
        if exact.returncode:
            print(f"no torch {torch} for this Python: the newest is taken instead")
            subprocess.run([*pip, "torch", "-r", str(pins)], check=True)
    tell = "import sys, torch; print('here: Python', sys.version[:6], 'torch', torch.__version__)"
    subprocess.run([str(folder / "bin/python"), "-c", tell], check=True)
    print(f"Colab: Python 3.13, torch {torch}")


def make_notebooks(folder: Path) -> None:
    """The reader notebooks as `make notebooks` publishes them; without outputs, so none is run."""
    from jupyter_book.sphinx import build_sphinx  # type: ignore[import-untyped]

    os.environ.setdefault("GRSD_REPOSITORY", "owner/grsd")
    os.environ["GRSD_EVIDENCE"] = str(folder / "evidence")
    status = build_sphinx(
        ROOT,
        folder / "jupyter",
        path_config=ROOT / "_config.yml",
        noconfig=True,
        builder="jupyter",
        confoverrides={
            "external_toc_path": str(ROOT / "_toc.yml"),
            "latex_individualpages": False,
            "nb_execution_mode": "off",
            "suppress_warnings": ["companion.evidence"],  # nothing was run
        },
        keep_going=True,
        quiet=True,
    )
    if status:
        raise SystemExit(f"the notebooks were not built: status {status}")


def dead_links(text: str) -> list[str]:
    """Targets of Markdown links that lead to a neighbouring file: Colab has none."""
    found: list[str] = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"\$[^$]*\$|`[^`]*`", "", text))
    return [target for target in found if not re.match(r"https?://|#|attachment:|data:", target)]


def faults(notebook: Any) -> list[str]:
    """Errors of the cells of a notebook that was run, what they wrote to stderr, and dead links."""
    found = []
    for number, cell in enumerate(notebook.cells):
        shown = [o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", [])]
        shown += [cell.source] if cell.cell_type == "markdown" else []
        found += [f"cell {number}: dead link {link}" for text in shown for link in dead_links(text)]
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"cell {number}: {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr" and output.text.strip():
                found.append(f"cell {number} warns: {output.text.strip()}")
    return found


def run_one(path: Path, wheel: Path) -> list[str]:
    """Run a notebook in an empty home without the packages that Colab lacks; return its faults."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    # as on a fresh machine: neither the package nor a cache
    pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *LACKING]
    subprocess.run(pip, check=True, capture_output=True)
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, found = ADDRESS.subn(json.dumps(str(wheel)), first.source)
    if found != 1:
        return ["its first cell does not install the package"]
    home = tempfile.mkdtemp()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GRSD_", "PYTHONPATH"))}
    environment |= {"HOME": home, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    client = NotebookClient(
        notebook, timeout=CELL, kernel_name="python3", resources={"metadata": {"path": home}}
    )
    try:
        client.execute(env=environment)
    except (CellTimeoutError, DeadKernelError) as error:
        return [*faults(notebook), f"{type(error).__name__}: {error}"]
    except CellExecutionError:
        pass  # the error is an output of its cell
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return faults(notebook)


def run_all(folder: Path, wheel: Path, output: Path | None, only: str = "") -> int:
    """Run every notebook below a folder, or those whose name holds `only`; how many have faults.

    The seconds of a run of all of them are stored, where the tree is committed.
    """
    sys.path.insert(0, str(ROOT))  # this checkout, which knows its revision
    from grsd import results

    edited = results.revision().endswith(results.CHANGED)
    if edited:
        print("this tree is edited: the times of this run will not be stored")
    seconds: dict[str, float] = {}
    bad = 0
    paths = [path for path in sorted(folder.rglob("*.ipynb")) if only in str(path)]
    skipped = [path for path in paths if path.relative_to(folder).as_posix() in HUB]
    paths = [path for path in paths if path not in skipped]
    for path in skipped:
        print(f"not run, it needs the hub: {path.stem}")
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix().removeprefix("book/")
        begun = time.perf_counter()
        said = run_one(path, wheel)
        seconds[name] = round(time.perf_counter() - begun, 1)
        bad += bool(said)
        print(f"{'FAILED' if said else 'passed'} {name} in {seconds[name]:.0f} s", flush=True)
        for line in said:
            print("    " + line.replace("\n", "\n    "), flush=True)
    print(f"{len(paths) - bad} of {len(paths)} notebooks passed without an error or a warning")
    if output is not None and not (bad or only or edited):
        made = results.provenance(["make", "colab"], {"packages": PACKAGES.name})
        results.save(results.Result(output.stem, {"seconds": seconds}, made), output.parent)
    return bad


def main() -> None:
    """Run the subcommand that was named."""
    match sys.argv[1:]:
        case ["list", full, date] if re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            write_list(Path(full), date)
        case ["environment", folder]:
            make_environment(Path(folder))
        case ["notebooks", folder]:
            make_notebooks(Path(folder).absolute())
        case ["run", folder, wheel, *rest] if len(rest) <= 2:
            output = Path(rest[0]) if rest else None
            raise SystemExit(run_all(Path(folder), Path(wheel).absolute(), output, *rest[1:]) and 1)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
