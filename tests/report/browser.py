"""Headless Chromium as the tests use it: the page after its scripts ran, and what they wrote to the console."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed: the page was not opened")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    ancestors: tuple["Element", ...]

    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()


class _Elements(HTMLParser):
    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Element] = []
        self.found: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs}, tuple(self.open))
        self.found.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(Element(tag, {key: value or "" for key, value in attrs}, tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        for place in range(len(self.open) - 1, -1, -1):
            if self.open[place].tag == tag:
                del self.open[place:]
                break


def elements(text: str) -> list[Element]:
    """The page's elements in document order, each with its ancestors."""
    parser = _Elements()
    parser.feed(text)
    return parser.found


@dataclass
class Page:
    """What Chromium made of a file."""

    elements: list[Element]
    console: list[str]

    @property
    def root(self) -> dict[str, str]:
        """The attributes of <html>, where the page and a test's script leave their findings."""
        return self.elements[0].attributes

    def marks(self, group: str, **inside: str) -> list[Element]:
        """The elements in a <g class=group>, within an ancestor that has the given data attributes."""
        wanted = {f"data-{key}": value for key, value in inside.items()}
        return [
            element
            for element in self.elements
            if element.ancestors
            and element.ancestors[-1].tag == "g"
            and group in element.ancestors[-1].classes()
            and any(wanted.items() <= ancestor.attributes.items() for ancestor in element.ancestors)
        ]


# A window cannot be narrower than 500 pixels, so that the report stands in a frame of the wanted width; once its
# scripts have run it takes the place of the page around it, where --dump-dom finds it (what is imported runs no more).
FRAME = """<!doctype html><html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{report}"></iframe>
<script>
const frame = document.querySelector("iframe");
const inner = () => document.importNode(frame.contentDocument.documentElement, true);
const done = () => document.replaceChild(inner(), document.documentElement);
frame.addEventListener("load", () => setTimeout(done, 500));
</script></body></html>"""


def show(report: Path, *, width: int = 1280, height: int = 900, script: str = "", flags: tuple[str, ...] = ()) -> Page:
    """Open a report, run the test's own script at its end, and return what it became."""
    assert PROGRAM
    own = f'<script type="module">document.documentElement.dataset.width = innerWidth;{script}</script></body>'
    text = report.read_text(encoding="utf-8").replace("</body>", own)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        around = Path(folder) / "around.html"
        around.write_text(FRAME.format(width=width, height=height, report=escape(text)), encoding="utf-8")
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", f"--user-data-dir={folder}/profile", "--enable-logging=stderr",
            "--virtual-time-budget=3000", "--window-size=1400,1000", *flags,
        ]  # fmt: skip
        done = subprocess.run(
            [PROGRAM, *options, "--dump-dom", around.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
    return Page(elements(done.stdout), re.findall(r"CONSOLE.*", done.stderr))


# what the page must never do, at any width: figures wider than their box, or text under the edge of the window
MEASURE = """
const wide = [...document.querySelectorAll("body *")].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !node.closest(".scroll, pre, #legend, svg");
}).map((node) => node.className || node.tagName);
const drawn = [...document.querySelectorAll("[data-figure] svg")];
const clipped = drawn.filter((svg) => svg.clientWidth > svg.parentNode.clientWidth + 1);
document.documentElement.dataset.wide = wide.join(" ");
document.documentElement.dataset.clipped = clipped.length;
document.documentElement.dataset.hacked = window.wasHacked ? "yes" : "no";
"""


def assert_sound(page: Page) -> None:
    """Nothing complained, and what `MEASURE` looked for was not there."""
    assert page.console == []
    assert "data-errors" not in page.root, page.root["data-errors"]
    assert (page.root["data-overflow"], page.root["data-wide"], page.root["data-clipped"]) == ("0", "", "0")
