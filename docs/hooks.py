"""mkdocs hooks: the pages that docs/generate.py wrote take their places, and each method its line in the navigation."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
GENERATED = DOCS / "generated"


def on_startup(command: str, dirty: bool) -> None:
    """Let --strict count warnings under --quiet as well, which would drop them before they are counted."""
    logger = logging.getLogger("mkdocs")
    logger.setLevel(min(logger.level, logging.WARNING))


def on_config(config: Any) -> Any:
    """Complete the navigation."""
    complete(config.nav, sorted(page.name for page in (GENERATED / "methods").glob("*.md")))
    return config


def complete(nav: list[dict[str, Any]], methods: list[str]) -> None:
    """Give each method's page its line, and put pages that the navigation does not name at the end of the guide.

    Args:
        nav: mkdocs.yml's, changed in place; its section Methods is empty.
        methods: file names of the generated pages.
    """
    if not methods:
        raise PluginError("docs/generated holds no pages: run python docs/generate.py first")
    sections = {name: pages for section in nav for name, pages in section.items()}
    sections["Methods"] += ["methods/index.md", *(f"methods/{name}" for name in methods if name != "index.md")]
    named = set(targets(nav))
    for page in sorted(DOCS.rglob("*.md")):
        place = page.relative_to(DOCS).as_posix()
        if GENERATED not in page.parents and place not in named:
            sections["Guide"].append(place)


def targets(entries: list[Any]) -> Iterator[str]:
    """The pages that a navigation names."""
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [target] if isinstance(target, str) else targets(target)


def on_files(files: Files, config: Any) -> Files:
    """docs/generated/methods/sora.md is the site's methods/sora.md."""
    for page in sorted(GENERATED.rglob("*.md")):
        files.append(File.generated(config, page.relative_to(GENERATED).as_posix(), abs_src_path=str(page)))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Wide tables scroll in a frame of their own, short words of code, as --data, stay on one line: for phones."""

    def joined(code: re.Match[str]) -> str:
        return re.sub(r"(?<!\S)(\S{1,28})(?!\S)", r'<span class="word">\1</span>', code[1])

    html = html.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")
    return re.sub(r"<code>([^<\n]+)</code>", lambda code: f"<code>{joined(code)}</code>", html)
