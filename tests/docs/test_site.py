"""The site builds strictly, fetches nothing, and has a page for each method."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import fences
import generate
import pytest

import weft


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path, pages, monkeypatch):
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed (make docs installs it)")
    monkeypatch.setattr(generate, "pages", lambda: pages)
    assert generate.main([]) == 0
    words = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=fences.ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for slug in weft.cards():
        page = (tmp_path / "methods" / f"{slug}.html").read_text(encoding="utf-8")
        assert f"src/weft/{weft.card(slug).pillar}/{slug}.py" in page
    assert not list(tmp_path.rglob("*.py"))
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', (tmp_path / "index.html").read_text())
    assert fetched == []
