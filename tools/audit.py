"""Look at every page of a built book in a browser, and count what a reader would stumble over.

    python tools/audit.py _build/cpu/_build/html --output _build/audit

Pages are opened from the disk in headless Chromium, in both themes, at the widths of a laptop and
a phone. Counted are tables, formulas and lines of code that stick out of the page (a phone may
scroll them where a shade at the edge says so), pages that scroll sideways, errors of scripts and of
MathJax, formulas left untypeset, pictures without caption or words, tables of a cell without a
caption or with one that only repeats the heading, citations that do not show their source where the
pointer rests, and pages that weigh more than 2 MB as a server sends them. The report is JSON with
the text of each finding; a contact sheet per theme and width shows the top of every page. Exit
status 1 on any finding.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import websocket
from PIL import Image, ImageDraw
from tqdm import tqdm

WIDTHS = {"laptop": (1300, 900), "phone": (390, 844)}
THEMES = ("light", "dark")
HEAVY = 2_000_000  # bytes of a page with all that it loads, into an empty cache
SENT_AS_IS = {".png", ".jpg", ".woff", ".woff2", ".gif"}  # a server compresses the rest

# Runs in the page; returns {kind: [text of each finding]}.
LOOK = r"""
(() => {
  const content = document.querySelector("article.bd-article") || document.body;
  const found = {};
  const say = (kind, element) => (found[kind] ||= []).push(
    (element.textContent || element.alt || "").trim().replace(/\s+/g, " ").slice(0, 90));
  const phone = innerWidth < 600;
  const seen = (e) => e.getClientRects().length > 0 && !e.closest("details:not([open])");
  const edge = content.getBoundingClientRect().right + 2;
  // the box that scrolls a thing sideways, if any; a phone may have one with a shade at its edge
  const scroller = (e) => { for (; e && e !== content; e = e.parentElement)
    if (/auto|scroll/.test(getComputedStyle(e).overflowX)) return e; };
  const cued = (e) => getComputedStyle(e).backgroundImage.includes("gradient");
  const out = (e) => {
    const box = scroller(e);
    if (!box) return e.getBoundingClientRect().right > edge;
    return box.scrollWidth > box.clientWidth + 1 && !(phone && cued(box));
  };
  content.querySelectorAll("table").forEach((t) => {
    if (!seen(t)) return;
    if (out(t)) say("table", t);
    const cell = t.closest(".cell_output, .cell, .pst-scrollable-table-container") || t;
    const outer = t.closest(".cell") || cell;
    const next = outer.nextElementSibling;
    const titled = t.querySelector("caption") || t.closest("figure, details")
      || (next && next.matches("p") && next.querySelector("em"));
    if (t.closest(".cell_output") && !titled) say("table without caption", t);
    const words = (e) =>
      e?.textContent.toLowerCase().replace(/^\s*(table [\d.]+|live:)|#\s*$/g, "").trim();
    const heading = words(t.closest("section")?.querySelector("h1, h2, h3, h4, h5"));
    if (t.caption && words(t.caption) === heading) say("caption repeats the heading", t);
  });
  content.querySelectorAll("mjx-container").forEach((m) => {
    if (seen(m) && !m.closest("table") && out(m)) say("formula", m.closest("p, div") || m);
  });
  content.querySelectorAll("pre").forEach((p) => { if (seen(p) && out(p)) say("code", p); });
  content.querySelectorAll("mjx-merror, [data-mjx-error]").forEach((m) => say("formula error", m));
  content.querySelectorAll("span.math, div.math").forEach((m) => {
    if (seen(m) && !m.querySelector("mjx-container")) say("formula not set", m); });
  content.querySelectorAll("img").forEach((i) => {
    if (!seen(i)) return;
    const titled = i.closest("figure")?.querySelector("figcaption")
      || i.closest(".answer")?.querySelector("p");
    if (!titled || (i.alt || "").length < 10) say("picture without caption", i);
  });
  content.querySelectorAll("a[href*='references.html#']").forEach((a) => {
    if (!a.title) say("citation without its source", a); });
  if (document.documentElement.scrollWidth > innerWidth + 1)
    say("page scrolls sideways", document.querySelector("h1"));
  return JSON.stringify(found);
})()
"""
READY = "window.MathJax?.startup?.promise ? MathJax.startup.promise.then(() => 1) : 1"
SETTLED = "new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(() => go(1))))"


class Browser:
    """One Chromium and one tab, spoken to over its debugging socket."""

    def __init__(self) -> None:
        name = next(
            (n for n in ("chromium", "chromium-browser", "google-chrome") if shutil.which(n)), ""
        )
        if not name:
            raise SystemExit("audit: no chromium on the PATH")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += [f"--remote-debugging-port={port}", f"--user-data-dir={self.profile.name}"]
        self.process = subprocess.Popen(
            [name, *flags, "--remote-allow-origins=*", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.socket = websocket.create_connection(self._address(port), timeout=120)
        self.number = 0
        self.errors: list[str] = []
        self.loaded: set[str] = set()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _address(self, port: int) -> str:
        for _ in range(200):
            try:
                with urlopen(f"http://127.0.0.1:{port}/json") as answer:
                    tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
                return str(tabs[0]["webSocketDebuggerUrl"])
            except (OSError, IndexError):
                time.sleep(0.1)
        raise SystemExit("audit: chromium did not start")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; what scripts complain of on the way is kept."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            self._listen(message)
            if message.get("id") == self.number:
                return dict(message.get("result", {}))

    def _listen(self, message: dict[str, Any]) -> None:
        said = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(
                details.get("exception", {}).get("description", details["text"])[:160]
            )
        elif message.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(f"{said['entry']['text']} {said['entry'].get('url', '')}"[:160])
        elif message.get("method") == "Network.requestWillBeSent":
            self.loaded.add(said["request"]["url"])

    def open(self, address: str) -> None:
        """Load a page and wait until its formulas are set."""
        self.errors, self.loaded = [], set()
        self.call("Page.navigate", url=address)
        for _ in range(300):
            if self.run("document.readyState") == "complete":
                break
            time.sleep(0.05)
        self.run(READY)

    def weight(self) -> int:
        """Bytes that a server would send for what the page loaded from the disk."""
        total = 0
        for address in {a.partition("#")[0] for a in self.loaded if a.startswith("file:")}:
            file = Path(unquote(urlsplit(address).path))
            if file.is_file():
                data = file.read_bytes()
                total += len(data if file.suffix in SENT_AS_IS else gzip.compress(data, 6))
        return total

    def run(self, script: str) -> Any:
        """Value of an expression in the page."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        return self.call("Runtime.evaluate", **asked).get("result", {}).get("value")

    def picture(self) -> Image.Image:
        """What is on the screen."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()


def look(browser: Browser, page: Path) -> dict[str, tuple[dict[str, Any], Image.Image]]:
    """Findings on a page and a picture of its top, for every width and theme; loaded once."""
    seen: dict[str, tuple[dict[str, Any], Image.Image]] = {}
    for width, (wide, high) in WIDTHS.items():
        size = {"width": wide, "height": high, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        if not seen:
            browser.open(page.as_uri())
        browser.run(SETTLED)
        for theme in THEMES:
            browser.run(f"document.documentElement.dataset.theme = '{theme}'")
            found = json.loads(browser.run(LOOK) or "{}")
            if browser.errors:
                found["script error"] = list(browser.errors)
            found["height"] = browser.run("document.documentElement.scrollHeight")
            found["bytes"] = browser.weight()
            if found["bytes"] > HEAVY:
                found["page too heavy"] = [f"{found['bytes'] / 1e6:.1f} MB"]
            seen[f"{width}-{theme}"] = (found, browser.picture())
    return seen


def sheet(tops: list[Image.Image], names: list[str], path: Path, wide: int = 300) -> None:
    """All pictures in rows of six, each over its name."""
    small = [top.resize((wide, wide * top.height // top.width)) for top in tops]
    step = max(s.height for s in small) + 16
    whole = Image.new("RGB", (6 * (wide + 8), -(-len(small) // 6) * step), "white")
    pen = ImageDraw.Draw(whole)
    for k, (picture, name) in enumerate(zip(small, names, strict=True)):
        x, y = (k % 6) * (wide + 8), (k // 6) * step
        whole.paste(picture, (x, y + 13))
        pen.text((x, y), name, fill="black")
    whole.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("html", type=Path, help="folder of the built book")
    parser.add_argument("--output", type=Path, default=Path("_build/audit"))
    parser.add_argument("--pages", default="", help="only pages whose path contains this")
    asked = parser.parse_args()
    root = asked.html.resolve()
    pages = [p for p in sorted((root / "book").rglob("*.html")) if asked.pages in str(p)]
    asked.output.mkdir(parents=True, exist_ok=True)
    names = [p.relative_to(root / "book").with_suffix("").as_posix() for p in pages]
    browser = Browser()
    try:
        every = tqdm(zip(names, pages, strict=True), total=len(pages), disable=None)
        seen = {name: look(browser, page) for name, page in every}
    finally:
        browser.close()
    report, total = {}, 0
    for view in next(iter(seen.values())):
        report[view] = {name: seen[name][view][0] for name in names}
        sheet([seen[name][view][1] for name in names], names, asked.output / f"{view}.png")
        counts = Counter(dict.fromkeys(("table", "formula", "code", "script error"), 0))
        for page in report[view].values():
            counts.update({k: len(v) for k, v in page.items() if isinstance(v, list)})
        total += counts.total()
        print(f"{view}:", ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    heaviest = max(names, key=lambda name: seen[name]["laptop-light"][0]["bytes"])
    print(f"heaviest: {heaviest}, {seen[heaviest]['laptop-light'][0]['bytes'] / 1e6:.2f} MB")
    (asked.output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
