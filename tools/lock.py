"""Write requirements.txt: exact versions of all that the project's extras need, without torch.

Run by `make lock`, in the project's environment, after torch is installed. pip resolves afresh,
with torch held at the version given; torch itself and the accelerator libraries that it brings are
left out, because which build of them is right depends on the machine.

    python tools/lock.py "torch==2.13.0"
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "hub,published,optimizers,book,test"
LEFT_OUT = re.compile(r"torch|triton|nvidia-.*|cuda-.*|grsd")

HEAD = """\
# Exact versions for every extra of pyproject.toml, without torch: install that first (see Makefile).
# Made by `make lock`; do not edit.
"""


def canonical(name: str) -> str:
    """Package name as the registries compare it: lower case, "-", "_" and "." as one "-"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(torch: str) -> dict[str, str]:
    """Names and versions that a fresh resolve of the project with its extras installs."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
        ]
        subprocess.run([*command, "--report", str(report), f"{ROOT}[{EXTRAS}]", torch], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))
    entries = (item["metadata"] for item in found["install"])
    return {canonical(entry["name"]): entry["version"] for entry in entries}


def main() -> None:
    """Resolve and write the lock."""
    if len(sys.argv) != 2 or not re.fullmatch(r"torch==[0-9.]+", sys.argv[1]):
        raise SystemExit(f"usage: python tools/lock.py torch==X.Y.Z (got {sys.argv[1:]})")
    versions = resolve(sys.argv[1])
    pins = [
        f"{name}=={version}"
        for name, version in sorted(versions.items())
        if not LEFT_OUT.fullmatch(name)
    ]
    (ROOT / "requirements.txt").write_text(HEAD + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"requirements.txt: {len(pins)} packages")


if __name__ == "__main__":
    main()
