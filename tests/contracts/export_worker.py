"""Run in a process that never imports weft: load what `weft.export` wrote, with PEFT or transformers alone.

    python export_worker.py FOLDER

FOLDER holds one folder a case, each with `case.json` (cell, form); logits go to `logits.safetensors` beside it, what
went wrong to `error.txt`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import specimens
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM


def loaded(folder: Path, case: dict[str, str]) -> nn.Module:
    cell = next(c for c in [*specimens.CELLS, specimens.SMALL, specimens.PLAIN_CONV] if c.name == case["cell"])
    if case["form"] == "merged":
        return AutoModelForCausalLM.from_pretrained(str(folder / "out"), experts_implementation="eager").eval()
    return PeftModel.from_pretrained(specimens.base(cell), str(folder / "out")).eval()


def main(root: Path) -> None:
    torch.set_num_threads(1)
    for file in sorted(root.glob("*/case.json")):
        try:
            with torch.no_grad():
                logits = loaded(file.parent, json.loads(file.read_text()))(**specimens.batch(50)).logits
            save_file({"logits": logits}, file.parent / "logits.safetensors")
        except Exception:
            (file.parent / "error.txt").write_text(traceback.format_exc())
    assert "weft" not in sys.modules, "weft was imported"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
