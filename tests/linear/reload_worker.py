"""In a process of its own: load what the tests saved by every loader, without weft, then with it, and tell what came."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """As compressed.py, which imports weft, has them."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)}
    tokens = torch.arange(14).reshape(2, 7) * 5 % 31
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.no_grad()
def outcome(loader: str, folder: Path) -> str:
    try:
        model = getattr(transformers, loader).from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    expected = load_file(folder / "expected.st")
    found = model(**inputs(model))
    key = "logits" if "logits" in found else "last_hidden_state"
    return "equal" if torch.equal(found[key], expected[key]) else "different"


def outcomes(jobs: list[tuple[str, str]]) -> dict[str, str]:
    return {f"{folder} {loader}": outcome(loader, Path(folder)) for folder, loader in jobs}


def main() -> None:
    jobs = json.loads(sys.argv[1])
    without = outcomes(jobs)
    assert "weft" not in sys.modules
    import weft  # noqa: F401

    print(json.dumps([without, outcomes(jobs)]))
    assert "peft" not in sys.modules


main()
