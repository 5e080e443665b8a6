"""Draw the house from its code: book/_assets/architecture.svg and parts of ARCHITECTURE.md.

    python tools/architecture.py            # writes both; a test compares them with the code

The tree and its sentences are the modules and the first sentences of their docstrings; who imports
whom is read from the imports, the rules from the contracts of pyproject.toml, and the road of the
data from the annotations of the functions that a number passes.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
import typing
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = Path("book/_assets/architecture.svg")
PAGE = Path("ARCHITECTURE.md")

# What a number passes from text to page: (module, class or function, method). Each step's result is
# the next one's argument, which `road` checks.
STEPS = (
    ("grsd.lab.data.corpora", "open_corpus", ""),
    ("grsd.lab.data.corpora", "Corpus", "batches"),
    ("grsd.spectrum.operator.ntk", "NTK", "__init__"),
    ("grsd.spectrum.lanczos", "lanczos", ""),
    ("grsd.spectrum.measure", "Tridiagonal", "measure"),
    ("grsd.spectrum.measure", "SpectralMeasure", "shells"),
)
ENDS = ("text", "figure, claim")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package under `root`, by dotted name, in the order of the tree."""
    paths = sorted((root / "grsd").rglob("*.py"), key=lambda p: (p.parent, p.name))
    names = {p.relative_to(root).with_suffix("").as_posix().replace("/", "."): p for p in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def sentence(path: Path) -> str:
    """First sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=[.?!])\s", text, maxsplit=1)[0]


def layers(root: Path) -> list[list[str]]:
    """Rooms and single modules from top to bottom, as the layer contract has them."""
    (contract,) = (c for c in contracts(root) if c.get("containers") == ["grsd"])
    return [re.findall(r"\w+", layer) for layer in contract["layers"]]


def contracts(root: Path) -> list[dict[str, typing.Any]]:
    """Import contracts of pyproject.toml, in order."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text)["tool"]["importlinter"]["contracts"])


def uses(root: Path) -> dict[str, list[str]]:
    """Room → the rooms and single modules whose code it imports, in the order of the layers."""
    order = [name for layer in layers(root) for name in layer]
    found: dict[str, set[str]] = {name: set() for name in order}
    for name, path in modules(root).items():
        room = name.split(".")[1] if "." in name else ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom):
                # dots in front count from the package that holds the module
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                above = package[: len(package) + 1 - node.level] if node.level else []
                parts = above + (node.module.split(".") if node.module else [])
                if parts[:1] == ["grsd"]:
                    targets = parts[1:2] or [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                dotted = [alias.name.split(".") for alias in node.names]
                targets = [parts[1] for parts in dotted if parts[0] == "grsd" and len(parts) > 1]
            if room in found:
                found[room] |= {t for t in targets if t in found and t != room}
    return {name: [other for other in order if other in found[name]] for name in order}


def road() -> list[str]:
    """Names of what a number passes; RuntimeError when a step's result does not fit the next."""
    stations: list[str] = []
    for module, owner, method in STEPS:
        holder = getattr(importlib.import_module(module), owner)
        step = getattr(holder, method) if method else holder
        hints = typing.get_type_hints(step)
        result = owner if method == "__init__" else _name(hints["return"])
        taken = {_name(kind) for name, kind in hints.items() if name != "return"}
        before = stations[-1] if stations else ""
        # a method takes its own object, lanczos any operator, a network a batch of tensors
        fits = {owner, *taken} | ({"NTK"} if "Operator" in taken else set())
        fits |= {"batch"} if method == "__init__" else set()
        if before and before not in fits:
            raise RuntimeError(f"{module}.{owner}.{method} takes {sorted(fits)}, not {before}")
        stations.append("batch" if method == "batches" else result)
    return stations


def _name(kind: typing.Any) -> str:
    return str(getattr(kind, "__name__", kind))


# --- ARCHITECTURE.md ---


def tree(root: Path) -> str:
    """The package as an indented list with a sentence for each module."""
    lines = []
    for name, path in modules(root).items():
        depth, label = name.count("."), name.rpartition(".")[2]
        if label != "__main__":
            mark = f"**{label}/**" if path.name == "__init__.py" else f"`{label}`"
            lines.append(f"{'  ' * depth}- {mark} {sentence(path)}".rstrip())
    return "\n".join(lines)


def rules(root: Path) -> str:
    """What never imports what, one line a contract."""
    lines = []
    for contract in contracts(root):
        kind, inside = contract["type"], " and ".join(contract.get("containers", ()))
        if kind == "layers":
            order = " → ".join(re.sub(r"[()]", "", layer) for layer in contract["layers"])
            rule = f"in `{inside}` only along {order}"
        elif kind == "independence":
            rule = " and ".join(f"`{name}`" for name in contract["modules"]) + " not at all"
        else:
            sources = ", ".join(f"`{name}`" for name in contract["source_modules"])
            rule = f"{sources} never: " + ", ".join(f"`{n}`" for n in contract["forbidden_modules"])
        lines.append(f"- *{contract['name']}*: {rule}")
    return "\n".join(lines)


def table(root: Path) -> str:
    """Which room uses which, from the imports."""
    lines = ["| room | uses |", "|---|---|"]
    for name, others in uses(root).items():
        lines.append(f"| `{name}` | {', '.join(f'`{other}`' for other in others) or '–'} |")
    return "\n".join(lines)


def page(root: Path, text: str) -> str:
    """`text` with every block between ``<!-- made: NAME -->`` and ``<!-- end -->`` made anew."""
    made = {"tree": tree, "rules": rules, "uses": table}

    def block(match: re.Match[str]) -> str:
        return f"<!-- made: {match[1]} -->\n\n{made[match[1]](root)}\n\n<!-- end -->"

    return re.sub(r"<!-- made: (\w+) -->.*?<!-- end -->", block, text, flags=re.S)


# --- The picture ---

WIDTH, MARGIN, LINE, GAP = 1180, 20, 17, 14  # pixels
TONES = ("#f3e9dc", "#e8eef7", "#e6f2ec", "#f7ecf2", "#eef0e2", "#e9e6f4", "#f0f0f0")


def rooms(root: Path, room: str) -> Iterator[tuple[str, list[str]]]:
    """Sub-rooms of a room with their modules; "" for the modules that lie in the room itself."""
    groups: dict[str, list[str]] = {"": []}
    for name, path in modules(root).items():
        parts = name.split(".")
        if parts[1:2] == [room] and path.name != "__init__.py":
            groups.setdefault(parts[2] if len(parts) > 3 else "", []).append(parts[-1])
    return ((sub, names) for sub, names in groups.items() if names)


def picture(root: Path) -> str:
    """The layers as bands, rooms as boxes with what they import, the road of the data below."""
    out: list[str] = []
    used, place = uses(root), dict[str, tuple[float, float, float]]()
    y = 58.0
    for level, layer in enumerate(layers(root)):
        packages = [name for name in layer if (root / "grsd" / name).is_dir()]
        if not packages:
            continue
        boxes = {name: _lines(root, name, used[name], len(packages)) for name in packages}
        height = max(len(lines) for lines in boxes.values()) * LINE + 34
        width = (WIDTH - 2 * MARGIN - GAP * (len(packages) - 1)) / len(packages)
        for column, (name, lines) in enumerate(boxes.items()):
            x = MARGIN + column * (width + GAP)
            place[name] = (x, y, width)
            out += _box(x, y, width, height, TONES[level % len(TONES)], name, lines)
            if len(packages) == 1:
                words = sentence(root / "grsd" / name / "__init__.py").replace("`", "")
                out.append(_text(x + width - 12, y + 21, words, "", "end", 12, "#555555"))
        y += height + GAP
    # The single modules that every room stands on share one band.
    single = [n for layer in layers(root) for n in layer if not (root / "grsd" / n).is_dir()]
    out += _box(
        MARGIN, y, WIDTH - 2 * MARGIN, 56, TONES[-1], "what every room uses", ["  ".join(single)]
    )
    y += 56 + 40
    out.append(_text(MARGIN, y, "the road of the data", "bold"))
    y += 14
    stations = [ENDS[0], *road(), ENDS[1]]
    step = (WIDTH - 2 * MARGIN) / len(stations)
    for index, name in enumerate(stations):
        x = MARGIN + index * step
        out.append(_rect(x, y, step - 26, 34, "#ffffff"))
        out.append(_text(x + (step - 26) / 2, y + 21, name, "", "middle", 12))
        if index < len(stations) - 1:
            arrow = f"M{x + step - 25:.0f} {y + 17:.0f} h20"
            out.append(f'<path d="{arrow}" stroke="#333" marker-end="url(#tip)"/>')
        if index < len(STEPS):
            _, owner, method = STEPS[index]
            verb = owner if method in ("", "__init__") else f".{method}"
            out.append(_text(x + step - 15, y + 50, f"{verb}()", "", "middle", 11, "#555555"))
    y += 50 + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" '
        f'width="{WIDTH}" height="{y:.0f}" '
        'font-family="Helvetica, Arial, sans-serif">\n'
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L6 3 L0 6 z" fill="#333"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{y:.0f}" fill="#ffffff"/>'
    )
    title = _text(MARGIN, 34, "grsd: a room imports only from rooms below it", "bold", size=18)
    return "\n".join([head, title, *out, "</svg>"]) + "\n"


def _lines(root: Path, room: str, used: list[str], columns: int) -> list[str]:
    """What a room's box says: sub-rooms with their modules, and which rooms it imports."""
    limit = 150 // columns
    lines: list[str] = []
    for sub, names in rooms(root, room):
        words, line = names[:], f"{sub}/ " if sub else ""
        while words:
            word = words.pop(0)
            if len(line) + len(word) > limit:
                lines.append(line.rstrip())
                line = "    "
            line += word + "  "
        lines.append(line.rstrip())
    return [*lines, "imports " + ", ".join(used)] if used else lines


def _box(
    x: float, y: float, width: float, height: float, tone: str, title: str, lines: list[str]
) -> list[str]:
    drawn = [_rect(x, y, width, height, tone), _text(x + 12, y + 21, title, "bold")]
    for row, line in enumerate(lines):
        colour = "#555555" if line.startswith("imports ") else "#111111"
        drawn.append(_text(x + 12, y + 41 + LINE * row, line, colour=colour))
    return drawn


def _rect(x: float, y: float, width: float, height: float, tone: str) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="6" '
        f'fill="{tone}" stroke="#888"/>'
    )


def _text(
    x: float,
    y: float,
    words: str,
    weight: str = "",
    anchor: str = "start",
    size: int = 13,
    colour: str = "#111111",
) -> str:
    bold = ' font-weight="bold"' if weight else ""
    kept = escape(words).replace("  ", "\u00a0 ")
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{colour}"{bold}>{kept}</text>'


def main() -> None:
    sys.path.insert(0, str(ROOT))
    (ROOT / PICTURE).write_text(picture(ROOT), encoding="utf-8")
    path = ROOT / PAGE
    path.write_text(page(ROOT, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
