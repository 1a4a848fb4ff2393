"""List the methods: name, paper, what they are good for."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from weft import registry


def command(
    pillar: Annotated[str | None, typer.Option(help=f"Only one pillar: {', '.join(registry.PILLARS)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, one object a method.")] = False,
) -> None:
    """List the methods: name, paper, what they are good for."""
    cards = registry.cards(pillar).values()
    if as_json:
        print(json.dumps([dataclasses.asdict(card) for card in cards], indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("method", "pillar", "year", "arXiv", "what it is"):
        table.add_column(heading, no_wrap=heading != "what it is", overflow="fold")
    for card in cards:
        table.add_row(card.slug, card.pillar, str(card.year), card.arxiv, card.summary)
    Console().print(table)
