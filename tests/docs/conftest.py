"""The documentation's own scripts are importable, and its pages split into their fenced blocks."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "docs")]


@pytest.fixture(scope="session")
def pages(once) -> dict[str, str]:
    """All generated pages, made once for all workers."""
    import generate

    folder = once("pages", lambda folder: (folder / "pages.json").write_text(json.dumps(generate.pages())))
    return json.loads((folder / "pages.json").read_text())
