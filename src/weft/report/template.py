"""What the pages of all reports are made with: templates, values in words, modules as a grid."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2

from weft.report import quantities
from weft.report.library import library
from weft.report.quantities import NOTHING, finite
from weft.run.models import from_scratch
from weft.run.ranking import DRAWS, LEVEL


def page(name: str, script: str, data: Any, *, verb: str = "compare", **values: Any) -> str:
    """The text of a report.

    Args:
        name: of the template, which extends base.html.j2.
        script: the JavaScript file that draws its figures, behind figures.js.
        data: the numbers behind the figures, which travel as JSON.
        verb: of the command that wrote it.
        values: what the template names.
    """
    loader = jinja2.FunctionLoader(asset)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name).render(
        q=quantities,
        data=as_json(data),
        dictionary=dictionary,
        level=f"{LEVEL:.0%}".replace("%", " %"),
        draws=f"{DRAWS:,}",
        style=asset("page.css"),
        figures=asset("figures.js"),
        script=asset(script),
        library=library(),
        verb=verb,
        **values,
    )


@functools.cache
def asset(name: str) -> str:
    """A file of this folder."""
    return (files("weft.report") / name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, and holds no NaN, which JSON does not know."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def short(spec: Any) -> str:
    """A model or data set by its last name: a path's folders say nothing in a title."""
    if isinstance(spec, list):
        return quantities.listing([short(each) for each in spec]) or NOTHING
    text = str(spec or NOTHING).rstrip("/")
    text = text.partition("?")[0] if from_scratch(text) else text  # the facts have its fields
    return text.rsplit("/", 1)[-1] if text.startswith(("/", "./", "../", "~")) else text


def plain(value: Any) -> str:
    """Any value of a header row in words."""
    if isinstance(value, float):
        return quantities.number(finite(value))
    if isinstance(value, int) and abs(value) >= 10_000:
        return quantities.count(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return NOTHING if value is None else str(value)


def dictionary(value: Any) -> list[tuple[str, str]]:
    """A dictionary of the study row as term and description; anything else as one nameless line."""
    items = value.items() if isinstance(value, dict) else [("", value)]
    return [(str(key).replace("_", " "), plain(each)) for key, each in items if each not in (None, "", {}, [])]


def rank_strip(ranks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Module ranks, or whatever else modules have, as a grid: one row a kind of module, one column a layer.

    "model.layers.3.self_attn.q_proj" is layer 3 of kind "q_proj"; kinds whose last name is not unique keep more of it.
    A module without a number in its name stands in a column of its own (layer null).
    """
    if not ranks:
        return None
    cells = []
    for module, rank in ranks.items():
        found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", module)
        layer, kind = (int(found[1]), found[2]) if found else (None, module)
        cells.append((kind, layer, rank))
    kinds = list(dict.fromkeys(kind for kind, _, _ in cells))
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    names = dict(zip(kinds, last if len(set(last)) == len(last) else kinds, strict=True))
    return {
        "kinds": [names[kind] for kind in kinds],
        "layers": sorted({layer for _, layer, _ in cells if layer is not None})
        + ([None] if any(layer is None for _, layer, _ in cells) else []),
        "cells": [[names[kind], layer, rank] for kind, layer, rank in cells],
    }
