"""mkdocs hooks: the pages that docs/generate.py wrote take their places, and each method its line in the navigation."""

from __future__ import annotations

import logging
import re
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
    """Fill the navigation's empty section Methods from the pages there are."""
    pages = sorted((GENERATED / "methods").glob("*.md"))
    if not pages:
        raise PluginError("docs/generated holds no pages: run python docs/generate.py first")
    entries = [f"methods/{page.name}" for page in pages if page.name != "index.md"]
    for section in config.nav:
        if "Methods" in section:
            section["Methods"] = ["methods/index.md", *entries]
    return config


def on_files(files: Files, config: Any) -> Files:
    """docs/generated/methods/sora.md is the site's methods/sora.md."""
    for page in sorted(GENERATED.rglob("*.md")):
        files.append(File.generated(config, page.relative_to(GENERATED).as_posix(), abs_src_path=str(page)))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Wide tables scroll in a frame of their own, short words of code stay on one line: for phones."""
    html = html.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")
    return re.sub(r"<code>([^<\s]{1,28})</code>", r'<code class="word">\1</code>', html)
