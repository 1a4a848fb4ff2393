"""One-shot compression of a small trained Llama: what each method costs, on the calibration corpus and on another.

    python benchmarks/compression.py --data-dir DIR              the tables below, and results/compression/NAME.json
    python benchmarks/compression.py --data-dir DIR --only svd   beginnings of names; the file keeps the other settings

DIR holds models/prose7m_llama, wikitext2 and c4_sample. Calibration: 64 windows of 256 tokens of wikitext2's validation
text. Test: 32 windows each of its test text, and of C4 documents that the model never saw. All linear layers of all
blocks. A setting is decomposed once, and cut to every share of the bits. Beside each loss stands the difference from
plain SVD at the same share, with the 95 % bootstrap interval over windows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import processor
from claims.ledger import interval
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import weft
from weft.files import write_text
from weft.run.compare import commit

KEEPS = (0.9, 0.8, 0.7, 0.5)
LENGTH, CALIBRATION, TEST = 256, 64, 32
AMOUNTS = (0.1, 0.3, 0.5, 0.7, 0.9, "auto")
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {}),
    "welore": ("welore", {}),
    "fwsvd": ("fwsvd", {}),
    "svd_llm": ("svd_llm", {"shrink": 0.0}),
    "lord": ("lord", {}),
    **{f"{slug}, shrink {a}": (slug, {"shrink": a}) for slug in ("svd_llm", "lord") for a in AMOUNTS},
    "svd_llm, sequential": ("svd_llm", {"shrink": 0.0, "sequential": True}),
    "svd_llm, water": ("svd_llm", {"shrink": 0.0, "allocate": "water"}),
    "svd_llm, sweep": ("svd_llm", {"shrink": 0.0, "allocate": "sweep"}),
    "svd_llm, block_influence": ("svd_llm", {"shrink": 0.0, "allocate": "block_influence"}),
}


def text(path: Path) -> str:
    return gzip.open(path, "rt", encoding="utf-8").read()


def corpora(data: Path, tokenizer: Any) -> dict[str, Tensor]:
    """Name → windows (n × LENGTH)."""
    documents = [json.loads(line)["text"] for line in text(data / "c4_sample" / "c4_300.jsonl.gz").splitlines()]
    found = {
        "calibration": (text(data / "wikitext2" / "valid.txt.gz"), CALIBRATION),
        "wikitext2": (text(data / "wikitext2" / "test.txt.gz"), TEST),
        "c4": ("\n".join(documents[240:]), TEST),
    }
    return {
        name: torch.tensor(tokenizer(words)["input_ids"][: count * LENGTH]).view(count, LENGTH)
        for name, (words, count) in found.items()
    }


@torch.no_grad()
def losses(model: Any, windows: Tensor) -> list[float]:
    """Nats a token of each window."""
    found: list[float] = []
    for ids in windows.split(8):
        logits = model(input_ids=ids).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found += each.mean(1).tolist()
    return found


def measure(name: str, path: Path, windows: dict[str, Tensor]) -> dict[str, Any]:
    """A setting at every share: what is stored, and the loss of every test window."""
    slug, options = SETTINGS[name]
    batches = [{"input_ids": ids} for ids in windows["calibration"].split(8)]
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for keep in KEEPS:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            work = None if options.get("sequential") else Path(folder) / "work"  # sequential work is one share's alone
            started = time.perf_counter()
            data = batches if weft.card(slug).needs or "allocate" in options else None
            report = weft.compress(model, slug, keep=keep, data=data, work=work, **options)
            row[str(keep)] = {
                "keep": report.keep,
                "seconds": time.perf_counter() - started,
                **{corpus: losses(model, windows[corpus]) for corpus in ("wikitext2", "c4")},
            }
    return row


def tables(document: dict[str, Any]) -> Iterator[str]:
    rows, plain = document["rows"], document["rows"].get("svd")
    for corpus in ("wikitext2", "c4"):
        dense = float(np.mean(document["dense"][corpus]))
        yield f"{corpus}: nats a token, {dense:.3f} before compressing"
        yield "| setting | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |"
        yield "| --- |" + " --- |" * len(KEEPS)
        for name, row in rows.items():
            cells = []
            for keep in map(str, KEEPS):
                own = np.array(row[keep][corpus])
                cell = f"{own.mean():.3f}"
                if plain is not None and name != "svd":
                    low, high = interval(own - np.array(plain[keep][corpus]))
                    cell += f" ({low:+.3f} to {high:+.3f})".replace("-", "−")
                cells.append(cell + (" collapsed" if own.mean() > dense + np.log(2) else ""))
            yield f"| {name} | " + " | ".join(cells) + " |"
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="prose7m_llama")
    parser.add_argument("--only", default="", help="comma-separated beginnings of settings' names")
    args = parser.parse_args()
    logging.disable_progress_bar()
    path = args.data_dir / "models" / args.model
    out = Path(__file__).parent / "results" / "compression" / f"{args.model}.json"
    windows = corpora(args.data_dir, AutoTokenizer.from_pretrained(path))
    only = tuple(filter(None, args.only.split(",")))
    before = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    document = {
        "command": "python benchmarks/compression.py --data-dir DIR",
        "device": processor(),
        "versions": {"torch": torch.__version__, "weft": weft.__version__},
        "commit": commit(),
        "dense": {corpus: losses(model, windows[corpus]) for corpus in ("wikitext2", "c4")},
        "rows": before,
    }
    for name in SETTINGS:
        if (only and not name.startswith(only)) or (not only and name in before):
            continue
        document["rows"] = {**document["rows"], name: measure(name, path, windows)}
        document["rows"] = {n: document["rows"][n] for n in SETTINGS if n in document["rows"]}
        write_text(out, json.dumps(document))
        shown = {keep: round(float(np.mean(each["c4"])), 3) for keep, each in document["rows"][name].items()}
        print(f"{name}, c4: {shown}", flush=True)
    print("\n".join(tables(document)))


if __name__ == "__main__":
    sys.exit(main())
