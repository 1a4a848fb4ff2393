"""In a process of its own: load what the tests saved by every loader, with weft or without, and say what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def inputs() -> dict[str, torch.Tensor]:
    tokens = torch.arange(14).reshape(2, 7) * 5 % 31
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.no_grad()
def outcome(loader: str, folder: Path) -> str:
    try:
        model = getattr(transformers, loader).from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    expected = load_file(folder / "expected.st")
    found = model(**inputs())
    key = "logits" if "logits" in found else "last_hidden_state"
    return "equal" if torch.equal(found[key], expected[key]) else "different"


def main() -> None:
    if sys.argv[1] == "with":
        import weft  # noqa: F401
    jobs = json.loads(sys.argv[2])
    found = {f"{folder} {loader}": outcome(loader, Path(folder)) for folder, loader in jobs}
    loaded = {name for name in ("weft", "peft") if name in sys.modules}
    print(json.dumps({"found": found, "loaded": sorted(loaded)}))


main()
