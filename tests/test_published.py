"""What leaves the checkout: chapters that run on Colab, floors that were run, editions that stay."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import jupytext
import pytest

from grsd import REQUIRED, chapter, claims, results

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(
    path
    for path in (ROOT / "book").rglob("*.md")
    if re.search("^kernelspec:", path.read_text(), re.M)
)
# modules whose distribution has another name
NAMED = {"IPython": "ipython", "sklearn": "scikit-learn", "yaml": "pyyaml"}


@cache
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("colab", ROOT / "tools/colab.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def colab() -> dict[str, str]:
    return dict(tool().versions((ROOT / "tools/colab-packages.txt").read_text()))


def code(path: Path) -> str:
    cells = jupytext.read(path).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def start_call(source: str) -> dict[str, object]:
    """The keywords of a chapter's `start(…)`."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    one = next(c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "start")
    return {str(k.arg): ast.literal_eval(k.value) for k in one.keywords}


def missing(source: str, listed: dict[str, str]) -> set[str]:
    """Modules that code imports and that neither Colab (`google.colab` is itself), its first cell nor Python has."""
    tree = list(ast.walk(ast.parse(source)))
    names = [alias.name for n in tree if isinstance(n, ast.Import) for alias in n.names]
    names += [str(n.module) for n in tree if isinstance(n, ast.ImportFrom) and not n.level]
    tops = (
        {name.partition(".")[0] for name in names}
        - {"grsd", "google"}
        - set(sys.stdlib_module_names)
    )
    installed = set(start_call(source).get("needs", ()))  # type: ignore[call-overload]
    return {top for top in tops - installed if NAMED.get(top, top).lower() not in listed}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_imports_what_colab_has_or_its_first_cell_installs(path: Path) -> None:
    assert missing(code(path), colab()) == set()


def test_a_missing_import_is_seen() -> None:
    listed = {"numpy": "2", "scikit-learn": "1"}
    source = "start('a/b', needs=('own',))\nimport own, os, numpy.linalg\nfrom sklearn import x\n"
    assert missing(source, listed) == set()
    assert missing(source + "def f():\n    from other.part import y\n", listed) == {"other"}
    assert missing("start('a/b')\nimport own", listed) == {"own"}


def test_what_colab_lacks_is_pinned_as_the_lock_has_it() -> None:
    lock = set((ROOT / "requirements.txt").read_text().split())
    for module, wanted in chapter.PINNED.items():
        assert wanted in lock, f"{module}: {wanted} is not in requirements.txt"
        assert tool().canonical(wanted.partition("==")[0]) not in colab()


def test_the_list_says_its_date_and_has_what_the_package_requires() -> None:
    text = (ROOT / "tools/colab-packages.txt").read_text()
    assert re.search(r"on \d{4}-\d\d-\d\d, by its own published list", text)
    for name, floor in REQUIRED.items():
        have = tuple(int(x) for x in re.findall(r"\d+", colab()[tool().canonical(name)])[:3])
        assert have >= tuple(int(x) for x in floor.split(".")), f"Colab's {name} is below {floor}"


def test_every_floor_was_run() -> None:
    run = tool().versions((ROOT / "tools/floors.txt").read_text())
    for name, floor in REQUIRED.items():
        version = run[tool().canonical(name)].partition("+")[0]
        assert version == floor + ".0" * (version.count(".") - floor.count(".")), name


# --- Links ----------------------------------------------------------------------------------------


def test_a_link_that_code_writes_leads_to_the_published_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = [claim.id for claim in claims.load() if claim.chapter][:40]
    monkeypatch.delenv("GRSD_SITE", raising=False)
    assert len(tool().dead_links(claims.bullets(*some))) >= 40
    assert claims.link("mup/norms") == "[norms](../mup/norms.md)"
    monkeypatch.setenv("GRSD_SITE", "https://someone.github.io/fork/")
    assert tool().dead_links(claims.bullets(*some)) == []
    assert (
        claims.link("mup/norms", "x") == "[x](https://someone.github.io/fork/book/mup/norms.html)"
    )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_cell_writes_a_link_by_hand(path: Path) -> None:
    assert not re.findall(r"\]\([^)]*\.md\b", code(path)), (
        "claims.link(chapter) is right in both places"
    )


def test_a_dead_link_is_found() -> None:
    text = (
        "[a](b.md) ![c](d.png) [e](https://f.org) [g](#h) $[x](y)$ `[k](l)` ![m](attachment:n.png)"
    )
    assert tool().dead_links(text) == ["b.md", "d.png"]


# --- The GPU ---------------------------------------------------------------------------------------


def asks(source: str) -> bool:
    """Whether code calls `device()` of grsd.chapter or grsd.scale."""
    calls = [n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return any(getattr(f, "id", getattr(f, "attr", "")) == "device" for f in calls)


LARGE = [
    "mup/coordinate-checks", "mup/transfer",
    "renorm/residual-nets", "renorm/conditions", "renorm/architectures",
]  # fmt: skip


def test_chapters_with_large_work_ask_for_the_device_and_say_so() -> None:
    says, asked = set(), set()
    for path in CHAPTERS:
        name, source = path.relative_to(ROOT / "book").with_suffix("").as_posix(), code(path)
        says |= {name} if start_call(source).get("gpu") else set()
        asked |= {name} if asks(source) else set()
    assert says == asked
    assert set(LARGE) <= asked, sorted(set(LARGE) - asked)


def test_a_question_for_the_device_is_seen() -> None:
    assert asks("x = torch.ones(3).to(device())") and asks("run(device=scale.device())")
    assert not asks("x.to(device)\nprint(model.device)")


# --- The first line --------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chapter.figures, "style", lambda: None)
    monkeypatch.setenv("GRSD_DEVICE", "meta")
    monkeypatch.setenv("GRSD_SCALE", "cpu")


@pytest.mark.usefixtures("quiet")
def test_the_first_line_says_where_and_how_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "packaged_dir", lambda: tmp_path)
    monkeypatch.setattr(results, "revision", lambda: "a" * 40)
    chapter.start("a/b", gpu=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("device meta, scale cpu")
    made = results.provenance(["make", "colab"], {})
    results.save(
        results.Result(chapter.TIMES, {"seconds": {"a/b": 61.0, "a/c": 5.0}}, made), tmp_path
    )
    chapter.start("a/b")
    line = capsys.readouterr().out
    assert "cpu (float64 theory" in line and "about 2 minutes on" in line
    chapter.start("a/c")
    assert "about 1 minute on" in capsys.readouterr().out
    monkeypatch.setenv("GRSD_SCALE", "gpu")
    chapter.start("a/b")
    assert capsys.readouterr().out.strip().endswith("scale gpu"), "another scale takes another time"


@pytest.mark.usefixtures("quiet")
def test_long_work_says_how_far_it_is_but_not_into_the_pages_of_a_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(chapter, "monotonic", lambda: clock[0])
    for scale, site, heard in (("cpu", "", 0), ("gpu", "", 2), ("cpu", "https://a.github.io/b", 2)):
        monkeypatch.setenv("GRSD_SCALE", scale)
        monkeypatch.setenv("GRSD_SITE", site)
        show = chapter.progress("training")
        for step in range(1, 51):  # one second a step
            clock[0] += 1
            show(step, 50, 0.5)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == heard
        assert lines[:1] == ["training: 20 of 50, loss 0.500"] * bool(heard)


@pytest.mark.usefixtures("quiet")
def test_a_failed_install_shows_the_reason_of_pip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(chapter.PINNED, "json", "json==0")  # is there: nothing is asked of pip
    monkeypatch.setitem(chapter.PINNED, "absent_module", "./no-such-folder/absent")
    chapter.start("a/b", needs=("json",))
    assert "installed" not in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"pip could not install.*no-such-folder"):
        chapter.start("a/b", needs=("absent_module",))


# --- Editions --------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def published(tmp_path: Path, page: str, *edition: str) -> list[str]:
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    for old in site.iterdir():
        old.unlink()
    (site / page).write_text(page)
    remote = tmp_path / "remote.git"
    if not remote.exists():
        subprocess.run(["git", "init", "--quiet", "--bare", str(remote)], check=True)
    command = ["bash", str(ROOT / "tools/publish.sh"), str(site), str(remote), "a message"]
    subprocess.run([*command, *edition], check=True, capture_output=True)
    assert git(remote, "rev-list", "--count", "gh-pages").strip() == "1"
    return sorted(git(remote, "ls-tree", "-r", "--name-only", "gh-pages").split())


def test_an_edition_stays_and_an_old_page_goes(tmp_path: Path) -> None:
    assert published(tmp_path, "one.html") == [".nojekyll", "one.html"]
    assert published(tmp_path, "one.html", "v1.0") == [".nojekyll", "one.html", "v1.0/one.html"]
    assert published(tmp_path, "two.html") == [".nojekyll", "two.html", "v1.0/one.html"]
    assert published(tmp_path, "x.html", "v1.0") == [".nojekyll", "two.html", "v1.0/x.html"]
    with pytest.raises(subprocess.CalledProcessError):
        published(tmp_path, "x.html", "../v1")
