"""No method knows another: the floors themselves are import-linter's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import weft


@pytest.mark.parametrize("slug", weft.cards())
def test_no_method_imports_another(slug: str) -> None:
    card = weft.card(slug)
    methods = {f"weft.{c.pillar}.{s}" for s, c in weft.cards().items() if s != slug}
    tree = ast.parse((Path(weft.__path__[0]) / card.pillar / f"{slug}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & methods
