"""Small streams for tests: words of the loom that are easy to tell apart, and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import yaml

WORDS = {"a": ("weft", "warp"), "b": ("loom", "thread", "beats"), "c": ("over", "under")}


def classes(folder: Path, name: str, train: int = 48, test: int = 12) -> Path:
    """A data set in which the word that a text repeats is its class."""
    words = WORDS[name]
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", 6), ("test", test)):
        rows = [
            {"text": " ".join([words[n % len(words)]] * (2 + n % 3)), "label": words[n % len(words)]}
            for n in range(count)
        ]
        tiny.write_jsonl(place / f"{split}.jsonl", rows)
    return place


def write_tasks(path: Path, tasks: list[dict[str, Any]]) -> str:
    path.write_text(yaml.safe_dump({"tasks": tasks}), encoding="utf-8")
    return str(path)


def labelled(folder: Path, names: str = "abc") -> str:
    """A file of tasks of two, three and two classes."""
    return write_tasks(folder / "tasks.yaml", [{"name": n, "data": str(classes(folder, n))} for n in names])
