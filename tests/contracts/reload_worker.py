"""Run in a new process: load adapters in every way there is and compare outputs bit for bit.

    python reload_worker.py FOLDER THREADS

FOLDER holds one folder an adapter, each with `case.json` (method, cell) and `expected.THREADS.safetensors`; the
verdicts go to `FOLDER/verdicts.THREADS.json`: {"slug|cell|way": "" or what went wrong}.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness
import specimens
import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

Way = Callable[[Path, specimens.Cell], nn.Module]


def peft(folder: Path, cell: specimens.Cell) -> nn.Module:
    return PeftModel.from_pretrained(specimens.base(cell), str(folder))


def peft_low_memory(folder: Path, cell: specimens.Cell) -> nn.Module:
    return PeftModel.from_pretrained(specimens.base(cell), str(folder), low_cpu_mem_usage=True)


def load_adapter(folder: Path, cell: specimens.Cell) -> nn.Module:
    model = specimens.base(cell)
    model.load_adapter(str(folder))
    return model


def add_adapter(folder: Path, cell: specimens.Cell) -> nn.Module:
    model = specimens.base(cell)
    model.add_adapter(PeftConfig.from_pretrained(str(folder)))
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model.eval()


def inject(folder: Path, cell: specimens.Cell) -> nn.Module:
    model, config = specimens.base(cell), PeftConfig.from_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    plain = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    # PEFT itself refuses state_dict= beside target_parameters
    inject_adapter_in_model(config, model, state_dict=None if config.target_parameters else plain)
    set_peft_model_state_dict(model, tensors)
    return model.eval()


def ways(cell: specimens.Cell) -> Iterator[tuple[str, Way]]:
    yield from {"peft": peft, "peft, low memory": peft_low_memory, "inject": inject}.items()
    if cell.is_hf:
        yield from {"load_adapter": load_adapter, "add_adapter": add_adapter}.items()


def verdict(way: Way, folder: Path, cell: specimens.Cell, expected: Tensor) -> str:
    try:
        torch.manual_seed(99)  # nothing of a reload may come from the global generator
        model = way(folder, cell)
        found = harness.outputs(model)
        if not torch.equal(found, expected):
            return f"outputs differ by {harness.relative(found, expected):.1e}"
        if way in (load_adapter, add_adapter):
            model.delete_adapter("default")
            if not torch.equal(harness.outputs(model), harness.outputs(specimens.base(cell))):
                return "delete_adapter left something behind"
    except Exception:
        return traceback.format_exc(limit=-3)
    return ""


def main(root: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    found = {}
    for folder in sorted(p.parent for p in root.glob("*/case.json")):
        case = json.loads((folder / "case.json").read_text())
        cell = next(c for c in [*specimens.CELLS, specimens.WIDE] if c.name == case["cell"])
        expected = load_file(folder / f"expected.{threads}.safetensors")["logits"]
        for name, way in ways(cell):
            found[f"{case['slug']}|{cell.name}|{name}"] = verdict(way, folder, cell, expected)
    (root / f"verdicts.{threads}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
