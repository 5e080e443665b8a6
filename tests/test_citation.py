"""The files that say how to cite: complete, and of one mind with the package and the book."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from grsd import __version__, claims

ROOT = Path(__file__).resolve().parents[1]
BIB = (ROOT / "book/references.bib").read_text(encoding="utf-8")


def cff() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")))


def loaded(name: str) -> Any:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def bibtex(record: dict[str, Any]) -> dict[str, str]:
    """The fields of the BibTeX entry that a reader of the file makes, as GitHub does."""
    names = [a.get("name") or f"{a['family-names']}, {a['given-names']}" for a in record["authors"]]
    fields = {"author": " and ".join(names), "title": record["title"]}
    fields["year"] = str(record.get("year") or record["date-released"].year)
    return fields | {"version": str(record.get("version", "")), "url": record.get("url", "")}


def test_a_citation_names_who_what_when_and_which_version() -> None:
    entry = bibtex(cff())
    assert all(entry[name] for name in ("author", "title", "year", "version"))
    assert isinstance(cff()["date-released"], date)


@pytest.mark.parametrize("paper", [p for p in claims.PAPERS if p != claims.OWN])
def test_every_paper_is_named_as_the_bibliography_names_it(paper: str) -> None:
    found = re.search(r"arXiv:([0-9.]+)", claims.PAPERS[paper])
    assert found
    record = next(r for r in cff()["references"] if r["identifiers"][0]["value"] == found.group())
    entry = re.search(rf"@misc\{{[^@]*eprint = \{{{found.group(1)}\}}", BIB)
    assert entry
    plain = re.sub(r"[{}$]", "", entry.group().replace(r"\mu", "μ"))
    assert bibtex(record)["author"] in plain and bibtex(record)["title"] in plain
    assert bibtex(record)["year"] in plain
    related = [r["identifier"] for r in loaded(".zenodo.json")["related_identifiers"]]
    assert found.group() in related
    assert record["url"] in loaded("codemeta.json")["referencePublication"]


def test_the_files_agree_on_version_licence_and_date() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    here, zenodo, codemeta = cff(), loaded(".zenodo.json"), loaded("codemeta.json")
    assert {project["version"], here["version"], zenodo["version"], codemeta["version"]} == {
        __version__
    }
    assert here["license"] == zenodo["license"] == project["license"]
    assert codemeta["license"].endswith(here["license"])
    assert codemeta["dateModified"] == here["date-released"].isoformat()
    assert here["title"] == zenodo["title"]
